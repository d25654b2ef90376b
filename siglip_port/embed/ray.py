"""The batches of a run on a Ray cluster: tasks decode images, actors hold models."""

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
"""How often a batch is begun again whose process has died: an image may kill each of them."""

CONNECT_SECONDS = 10


def run_on_ray(
    encoder: BatchEncoder,
    batches: Sequence[Batch],
    workers: int | None = None,
    address: str | None = None,
) -> Generator[BatchResult]:
    """Do batches on a cluster, by Ray Data.

    They are the same batches, of the same size, and so the same vectors. Images must lie where
    every node finds them under the same path, and siglip-port be installed there; the model is sent
    along. Results come back to this process, which writes them.

    Args:
        encoder: the model. Each process that holds it has its `threads` of the CPU, and a GPU, if
            it runs on one.
        batches: to be done.
        workers: processes that hold the model; None for as many as fit, with a CPU each for
            decoding.
        address: of the cluster; None for the one that Ray finds, or a new one on this machine.

    Yields:
        What became of each, in any order.

    Raises:
        EmbedError: Ray is not installed, the cluster cannot be reached or is too small, or a
            process of it died again and again.
    """
    # Read when Ray is imported. Nodes have siglip-port installed: `uv run` need not make them an
    # environment of a copy of this folder. And a cluster that is begun here reports to nobody.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    require("ray")
    import ray
    import ray.data

    if not batches:
        return
    require_cluster(address)
    started_here = not ray.is_initialized()
    try:
        if started_here:
            ray.init(
                address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                include_dashboard=None if address else False,
            )
        yield from run_dataset(encoder, batches, model_count(encoder, workers))
    except (ConnectionError, ray.exceptions.RayError) as error:
        raise EmbedError(
            f"the Ray cluster gave up: {failure_reason(error)}; the same command goes on from "
            "there; without --engine ray also past an image that kills the process that decodes it"
        ) from error
    finally:
        if started_here:
            ray.shutdown()


def runs_on_gpu(encoder: BatchEncoder) -> bool:
    """Whether each model needs a GPU."""
    return encoder.base_model.device.type == "cuda"


def model_count(encoder: BatchEncoder, workers: int | None) -> int:
    """Return how many processes are to hold the model.

    Args:
        encoder: the model.
        workers: how many are asked for; None for as many as fit.

    Raises:
        EmbedError: so many do not fit into the cluster.
    """
    import ray

    resources = ray.cluster_resources()
    if runs_on_gpu(encoder):
        kind, need = "GPU", "1"
        fitting = int(resources.get("GPU", 0))
    else:
        cpus = encoder.threads + 1
        kind, need = "CPU", f"{cpus}: --threads {encoder.threads}, and one to decode"
        fitting = int(resources.get("CPU", 0) // cpus)
    if fitting < (workers or 1):
        raise EmbedError(
            f"the Ray cluster has {resources.get(kind, 0):g} {kind}s, and {workers or 1} models "
            f"need {need}, for each"
        )
    return workers or fitting


def run_dataset(
    encoder: BatchEncoder, batches: Sequence[Batch], models: int
) -> Iterator[BatchResult]:
    """Send batches through Ray Data, and yield their results."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    encoder_ref = ray.put(encoder)  # held until all is done: an actor that is begun again needs it
    rows = [{"number": batch.number, "data": pickle.dumps(batch.items)} for batch in batches]
    decoded = ray.data.from_items(rows).map(
        DecodeStage(encoder.processor),
        num_cpus=1,
        max_retries=MAX_RETRIES,  # Ray Data's own default is for ever
    )
    stage: Any = ModelStage  # a class, which Ray's types do not foresee
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
    """A row of a batch's images -> the same, decoded."""

    def __init__(self, processor: ImageProcessor) -> None:
        self.processor = processor

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Decode the images of a row."""
        torch.set_num_threads(1)
        decoded = decode_items(pickle.loads(row["data"]), self.processor)
        return {"number": row["number"], "data": pickle.dumps(decoded)}


class ModelStage:
    """A row of a batch's decoded images -> its `BatchResult`."""

    def __init__(self, encoder_ref: ray.ObjectRef[BatchEncoder]) -> None:
        import ray

        self.encoder = ray.get(encoder_ref)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Run the model on a row."""
        result = run_batch(self.encoder, int(row["number"]), pickle.loads(row["data"]))
        return {"number": row["number"], "data": pickle.dumps(result)}


def require_cluster(address: str | None) -> None:
    """Find out in seconds whether a cluster answers; Ray itself takes minutes to give up.

    Raises:
        EmbedError: the address is none, or nobody answers there.
    """
    if address in (None, "auto", "local"):
        return
    match = re.fullmatch(r"(?:ray://)?\[?([^\]/]+?)\]?:(\d+)", address)
    if match is None:
        raise EmbedError(f"{address!r} is no address of a Ray cluster: HOST:PORT, or auto")
    endpoint = (match[1], int(match[2]))
    try:
        with contextlib.closing(socket.create_connection(endpoint, timeout=CONNECT_SECONDS)):
            pass
    except (OSError, OverflowError) as error:
        raise EmbedError(f"no Ray cluster answers at {address}: {error}") from error


def failure_reason(error: BaseException) -> str:
    """Return the last line that says something: Ray's errors hold whole tracebacks."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, (EngineError, MissingExtraError, OSError)):
        return str(cause)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
