"""The work of `siglip_port.embed.run` on a Ray cluster.

Pictures are decoded by tasks, models are held by actors.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import re
import socket
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch

from siglip_port.embed.embedder import Embedder, decode
from siglip_port.embed.run import Batch, EmbedError, Result, result
from siglip_port.image_processing import ImageProcessor
from siglip_port.optimize.selection import EngineError

RETRIES = 3
"""How often a batch is begun again whose process has died: a picture may kill each of them."""


def on_ray(
    embedder: Embedder,
    batches: Sequence[Batch],
    workers: int | None = None,
    address: str | None = None,
) -> Generator[Result]:
    """Does batches on a cluster, by Ray Data.

    The same batches, of the same size, and so the same vectors.

    Pictures must lie where every node finds them under the same path, and siglip-port be installed
    there; the model is sent along. Results come back to this process, which writes them.

    Args:
        embedder: the model. Each process that holds it has its `threads` of the CPU, and a GPU, if
            it runs on one.
        batches: what is to be done.
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
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise EmbedError("--engine ray needs Ray: pip install 'siglip-port[ray]'") from error
    if not batches:
        return
    _reach(address)
    begun = not ray.is_initialized()
    try:
        if begun:
            ray.init(
                address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                include_dashboard=False if not address else None,
            )
        yield from _run(ray, embedder, batches, workers)
    except (ConnectionError, ray.exceptions.RayError) as error:
        raise EmbedError(
            f"the Ray cluster gave up: {_reason(error)}; the same command goes on from there; "
            "without --engine "
            "ray also past a picture that kills the process that decodes it"
        ) from error
    finally:
        if begun:
            ray.shutdown()


def _run(
    ray: Any,  # noqa: ANN401 (the module)
    embedder: Embedder,
    batches: Sequence[Batch],
    workers: int | None,
) -> Iterator[Result]:
    gpu = next(iter(embedder.plain.parameters())).device.type == "cuda"
    there = ray.cluster_resources()
    fitting = int(there.get("GPU", 0) if gpu else there.get("CPU", 0) // (embedder.threads + 1))
    if fitting < (workers or 1):
        kind = "GPU" if gpu else "CPU"
        each = (
            "1"
            if gpu
            else f"{embedder.threads + 1}: --threads {embedder.threads}, and one to decode"
        )
        raise EmbedError(
            f"the Ray cluster has {there.get(kind, 0):g} {kind}s, and {workers or 1} models need "
            f"{each}, for each"
        )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    model = ray.put(embedder)  # held until all is done: an actor that is begun again needs it
    rows = [{"number": batch.number, "data": pickle.dumps(batch.items)} for batch in batches]
    found = (
        ray.data.from_items(rows)
        .map(
            _Decode(embedder.processor), num_cpus=1, max_retries=RETRIES
        )  # Ray Data's own default is for ever
        .map(
            _Model,
            fn_constructor_args=[model],
            compute=ray.data.ActorPoolStrategy(size=workers or fitting),
            num_cpus=embedder.threads,
            num_gpus=1 if gpu else None,
            max_task_retries=RETRIES,
        )
    )
    for row in found.iter_rows():
        yield pickle.loads(row["data"])


def _reach(address: str | None) -> None:
    """Finds out in seconds whether somebody listens there; Ray itself takes minutes to give up."""
    found = re.fullmatch(r"(?:ray://)?\[?([^\]/]+?)\]?:(\d+)", address or "")
    if address not in (None, "auto", "local") and found is None:
        raise EmbedError(f"{address!r} is no address of a Ray cluster: HOST:PORT, or auto")
    if found is not None:
        try:
            with contextlib.closing(
                socket.create_connection((found[1], int(found[2])), timeout=10)
            ):
                pass
        except (OSError, OverflowError) as error:
            raise EmbedError(f"no Ray cluster answers at {address}: {error}") from error


class _Decode:
    """A row of a batch's pictures -> the same, decoded."""

    def __init__(self, processor: ImageProcessor) -> None:
        self.processor = processor

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        torch.set_num_threads(1)
        decoded = [decode(item, self.processor) for item in pickle.loads(row["data"])]
        return {"number": row["number"], "data": pickle.dumps(decoded)}


class _Model:
    """A row of a batch's decoded pictures -> its `Result`."""

    def __init__(self, embedder: Any) -> None:  # noqa: ANN401 (a reference of Ray's)
        import ray

        self.embedder: Embedder = ray.get(embedder)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        found = result(self.embedder, int(row["number"]), pickle.loads(row["data"]))
        return {"number": row["number"], "data": pickle.dumps(found)}


def _reason(error: BaseException) -> str:
    """The last line that says something: Ray's errors hold whole tracebacks."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, (EngineError, OSError)):
        return str(cause)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
