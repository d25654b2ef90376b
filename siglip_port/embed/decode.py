"""Images decoded and preprocessed, in this process or in worker processes that may die."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from siglip_port.embed.errors import EmbedError
from siglip_port.embed.inputs import Item, load_image_input
from siglip_port.image_processing import ImageError, ImageProcessor, to_rgb

WORKER_DIED = "the process that decoded it died, twice: out of memory, or a fault of the decoder"
"""The error of an image that kills every process that decodes it."""

PARENT_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class DecodedImage:
    """An image as the model takes it, or the reason why there is none.

    Attributes:
        pixels: [3, H, W], float32; None where the image cannot be read.
        size: (height, width) of the image itself, turned upright.
        error: why it cannot be read; empty if it can.
        decode_seconds: time of reading and decoding.
        preprocess_seconds: time of all else.
    """

    pixels: NDArray[np.float32] | None
    size: tuple[int, int] | None
    error: str
    decode_seconds: float
    preprocess_seconds: float = 0.0


def decode(image: object, processor: ImageProcessor) -> DecodedImage:
    """Read and preprocess an image; whatever is wrong with it becomes `error`.

    Args:
        image: what `siglip_port.embed.inputs.load_image_input` takes.
        processor: what makes its pixels.
    """
    started = time.perf_counter()
    try:
        rgb = to_rgb(load_image_input(image), processor.backend)
        decoded = time.perf_counter()
        pixels = processor.one(rgb).numpy()
    except (ImageError, MemoryError) as error:
        seconds = time.perf_counter() - started
        return DecodedImage(None, None, str(error) or "out of memory", seconds)
    return DecodedImage(
        pixels,
        size=(rgb.shape[1], rgb.shape[2]),
        error="",
        decode_seconds=decoded - started,
        preprocess_seconds=time.perf_counter() - decoded,
    )


def decode_items(items: Sequence[Item], processor: ImageProcessor) -> list[DecodedImage]:
    """Decode several images, one after the other."""
    return [decode(item, processor) for item in items]


def decode_batches(
    batches: Sequence[Sequence[Item]], processor: ImageProcessor, workers: int
) -> Iterator[list[DecodedImage]]:
    """Decode batches in their order, some of them ahead.

    When a worker process dies, the batch that was waited for is decoded once more, an image at a
    time: so an image that kills its worker becomes an error, and one that only had bad luck does
    not.

    Args:
        batches: of images.
        processor: what makes their pixels.
        workers: processes; 0 to decode in this one.
    """
    workers = min(workers, len(batches))
    if workers == 0:
        for items in batches:
            yield decode_items(items, processor)
        return
    pending = deque(batches)
    futures: deque[Future[list[DecodedImage]]] = deque()
    pool = start_workers(workers)
    try:
        while pending:
            try:
                while len(futures) < min(2 * workers, len(pending)):
                    items = pending[len(futures)]
                    futures.append(pool.submit(decode_items, items, processor))
                decoded = futures[0].result()
                futures.popleft()
            except BrokenProcessPool:  # all its processes end, and what they had to do is lost
                pool.shutdown()
                futures.clear()
                decoded = decode_one_by_one(pending[0], processor)
                pool = start_workers(workers)
            pending.popleft()
            yield decoded
    finally:
        pool.shutdown(cancel_futures=True)


def decode_one_by_one(items: Sequence[Item], processor: ImageProcessor) -> list[DecodedImage]:
    """Decode images in a worker process that has one of them at a time; each has two attempts."""
    results: list[DecodedImage] = []
    pool = start_workers(1)
    for item in items:
        decoded = [DecodedImage(None, None, WORKER_DIED, 0.0)]
        for _ in range(2):
            try:
                decoded = pool.submit(decode_items, [item], processor).result()
                break
            except BrokenProcessPool:
                pool.shutdown()
                pool = start_workers(1)
        results += decoded
    pool.shutdown()
    return results


# --- worker processes -----------------------------------------------------------------------------


def start_workers(count: int) -> ProcessPoolExecutor:
    """Start processes, and wait until they run.

    Otherwise every image would be found to kill a process that cannot even begin.

    Raises:
        EmbedError: they cannot be started.
    """
    pool = ProcessPoolExecutor(count, initializer=initialize_worker)
    try:
        pool.submit(os.getpid).result()
    except (BrokenProcessPool, OSError) as error:
        pool.shutdown()
        raise EmbedError(
            f"processes to decode cannot be begun: {error}; take fewer workers, or 0. A script of "
            "yours must call embed under `if __name__ == '__main__':` where Python begins "
            "processes by importing it"
        ) from error
    return pool


def initialize_worker() -> None:
    """Prepare a worker process.

    Ctrl-C goes to all processes of a terminal: the main one stops its workers itself, or is killed,
    and they end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=exit_with_parent, daemon=True).start()


def exit_with_parent() -> None:
    """End this process when its parent has ended.

    Otherwise a worker that still has images for a parent that was killed waits for ever, and keeps
    the parent's locks.
    """
    parent = multiprocessing.parent_process()
    while parent is not None and os.getppid() == parent.pid:
        time.sleep(PARENT_POLL_SECONDS)
    os._exit(1)


def processor_count() -> int:
    """Return how many processors this process may use; not every system reports it."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
