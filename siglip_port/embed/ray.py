"""Batches on a Ray cluster: tasks decode images, actors run the model."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import re
import socket
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from siglip_port.embed.batches import Batch, BatchResult, run_batch
from siglip_port.embed.decode import decode_items
from siglip_port.embed.encoder import BatchEncoder
from siglip_port.embed.errors import EmbedError
from siglip_port.extras import MissingExtraError, require
from siglip_port.image_processing import ImageProcessor
from siglip_port.optimize import EngineError

if TYPE_CHECKING:
    import ray

MAX_RETRIES = 3
"""Retries of a batch whose process died; an image may crash every process that decodes it."""

CONNECT_SECONDS = 10


def run_on_ray(
    encoder: BatchEncoder,
    batches: Sequence[Batch],
    num_workers: int | None = None,
    address: str | None = None,
) -> Generator[BatchResult]:
    """Run batches on a cluster, with Ray Data.

    Batches are the same as on one machine, and so are the embeddings. Every node must have
    siglip-port installed and see the images at the same paths; the model is sent to the nodes.
    Results return to this process, which writes them.

    Args:
        encoder: Encoder of the decoded images. Each process that holds it reserves `threads` CPUs,
            and one GPU if the model is on a GPU.
        batches: Batches to run.
        num_workers: Processes that hold the model; None fills the cluster, leaving one CPU per
            process for decoding.
        address: Address of the cluster; None for a detected one, or else a new one on this machine.

    Yields:
        Results, in any order.

    Raises:
        MissingExtraError: Ray is not installed.
        EmbedError: The cluster cannot be reached or is too small, or its processes keep dying.
    """
    # Ray reads these when it is imported. Nodes have siglip-port installed, so `uv run` need not
    # copy this folder's environment to them. A local cluster sends no usage statistics.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    require("ray")
    import ray
    import ray.data

    if not batches:
        return
    require_cluster(address)
    is_own_cluster = not ray.is_initialized()
    try:
        if is_own_cluster:
            ray.init(
                address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                include_dashboard=None if address else False,
            )
        yield from run_dataset(encoder, batches, model_count(encoder, num_workers))
    except (ConnectionError, ray.exceptions.RayError) as error:
        raise EmbedError(
            f"Ray cluster failed: {failure_reason(error)}; run the same command again to resume, "
            "with executor='local' if an image crashes the process that decodes it"
        ) from error
    finally:
        if is_own_cluster:
            ray.shutdown()


def runs_on_gpu(encoder: BatchEncoder) -> bool:
    """Return whether the model runs on a GPU."""
    return encoder.base_model.device.type == "cuda"


def model_count(encoder: BatchEncoder, num_workers: int | None) -> int:
    """Return the number of processes that hold the model.

    Args:
        encoder: Encoder of the decoded images.
        num_workers: Requested number; None fills the cluster.

    Raises:
        EmbedError: The cluster is too small.
    """
    import ray

    resources = ray.cluster_resources()
    if runs_on_gpu(encoder):
        kind, need = "GPU", "1 per model"
        remedy = "reduce num_workers= or use device='cpu'"
        capacity = int(resources.get("GPU", 0))
    else:
        cpus = encoder.threads + 1
        kind, need = "CPU", f"{cpus} per model ({encoder.threads} threads, 1 for decoding)"
        remedy = "reduce num_workers= or threads="
        capacity = int(resources.get("CPU", 0) // cpus)
    requested = num_workers or 1
    if capacity < requested:
        raise EmbedError(
            f"Ray cluster is too small for {requested} model processes: it has "
            f"{resources.get(kind, 0):g} {kind}s, needs {need}; {remedy}"
        )
    return num_workers or capacity


def run_dataset(
    encoder: BatchEncoder, batches: Sequence[Batch], models: int
) -> Iterator[BatchResult]:
    """Send batches through Ray Data and yield their results."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    encoder_ref = ray.put(encoder)  # kept alive until the end: restarted actors read it
    rows = [{"number": batch.number, "data": pickle.dumps(batch.items)} for batch in batches]
    decoded = ray.data.from_items(rows).map(
        DecodeStage(encoder.processor),
        num_cpus=1,
        max_retries=MAX_RETRIES,  # Ray Data's default is unlimited
    )
    stage: Any = ModelStage  # Ray's type hints reject a class
    results = decoded.map(
        stage,
        fn_constructor_args=[encoder_ref],
        compute=ray.data.ActorPoolStrategy(size=models),
        num_cpus=encoder.threads,
        num_gpus=1 if runs_on_gpu(encoder) else None,
        max_task_retries=MAX_RETRIES,
    )
    for row in results.iter_rows():
        yield pickle.loads(row["data"])


class DecodeStage:
    """Stage that maps a row with the items of a batch to a row with its decoded images."""

    def __init__(self, processor: ImageProcessor) -> None:
        self.processor = processor

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Decode the images of a row."""
        torch.set_num_threads(1)
        decoded = decode_items(pickle.loads(row["data"]), self.processor)
        return {"number": row["number"], "data": pickle.dumps(decoded)}


class ModelStage:
    """Stage that maps a row with decoded images to a row with the `BatchResult` of the batch."""

    def __init__(self, encoder_ref: ray.ObjectRef[BatchEncoder]) -> None:
        import ray

        self.encoder = ray.get(encoder_ref)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Run the model on a row."""
        result = run_batch(self.encoder, int(row["number"]), pickle.loads(row["data"]))
        return {"number": row["number"], "data": pickle.dumps(result)}


def require_cluster(address: str | None) -> None:
    """Check within seconds that a cluster answers; Ray itself times out after minutes.

    Raises:
        EmbedError: The address is malformed, or no cluster answers.
    """
    if address in (None, "auto", "local"):
        return
    match = re.fullmatch(r"(?:ray://)?\[?([^\]/]+?)\]?:(\d+)", address)
    if match is None:
        raise EmbedError(f"address must be HOST:PORT, auto or local, got {address!r}")
    endpoint = (match[1], int(match[2]))
    try:
        with contextlib.closing(socket.create_connection(endpoint, timeout=CONNECT_SECONDS)):
            pass
    except (OSError, OverflowError) as error:
        raise EmbedError(
            f"no Ray cluster answers at {address} ({error}); check the address"
        ) from error


def failure_reason(error: BaseException) -> str:
    """Return the last line of an error; those of Ray contain whole tracebacks."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, (EngineError, MissingExtraError, OSError)):
        return str(cause)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
