"""Decoding and preprocessing, in this process or in worker processes that may crash."""

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

WORKER_DIED = "the decoding process died twice (out of memory, or the decoder crashed)"
"""Error of an image that crashes every process that decodes it."""

PARENT_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class DecodedImage:
    """Model input of one image, or the reason why there is none.

    Attributes:
        pixels: Model input, [3, H, W], float32; None on error.
        size: (height, width) of the original image in pixels, after EXIF rotation; None on error.
        error: Error message; empty on success.
        decode_seconds: Time to read and decode.
        preprocess_seconds: Time to resize and normalize.
    """

    pixels: NDArray[np.float32] | None
    size: tuple[int, int] | None
    error: str
    decode_seconds: float
    preprocess_seconds: float = 0.0


def decode(image: object, processor: ImageProcessor) -> DecodedImage:
    """Read and preprocess an image; a failure is returned in `error`, never raised.

    Args:
        image: Input of `siglip_port.embed.inputs.load_image_input`.
        processor: Image processor of the model.
    """
    start = time.perf_counter()
    try:
        rgb = to_rgb(load_image_input(image), processor.backend)
        decode_end = time.perf_counter()
        pixels = processor.one(rgb).numpy()
    except (ImageError, MemoryError) as error:
        seconds = time.perf_counter() - start
        return DecodedImage(None, None, str(error) or "out of memory", seconds)
    return DecodedImage(
        pixels,
        size=(rgb.shape[1], rgb.shape[2]),
        error="",
        decode_seconds=decode_end - start,
        preprocess_seconds=time.perf_counter() - decode_end,
    )


def decode_items(items: Sequence[Item], processor: ImageProcessor) -> list[DecodedImage]:
    """Decode images one after another."""
    return [decode(item, processor) for item in items]


def decode_batches(
    batches: Sequence[Sequence[Item]], processor: ImageProcessor, num_workers: int
) -> Iterator[list[DecodedImage]]:
    """Decode batches in order, prefetching two per worker.

    When a worker process dies, the next batch is decoded again one image at a time, so that only
    the image that crashes its worker becomes an error.

    Args:
        batches: Images of each batch.
        processor: Image processor of the model.
        num_workers: Worker processes; 0 decodes in this process.
    """
    num_workers = min(num_workers, len(batches))
    if num_workers == 0:
        for items in batches:
            yield decode_items(items, processor)
        return
    pending = deque(batches)
    futures: deque[Future[list[DecodedImage]]] = deque()
    pool = start_workers(num_workers)
    try:
        while pending:
            try:
                while len(futures) < min(2 * num_workers, len(pending)):
                    items = pending[len(futures)]
                    futures.append(pool.submit(decode_items, items, processor))
                decoded = futures[0].result()
                futures.popleft()
            except BrokenProcessPool:  # its other processes end, too, and their batches are lost
                pool.shutdown()
                futures.clear()
                decoded = decode_one_by_one(pending[0], processor)
                pool = start_workers(num_workers)
            pending.popleft()
            yield decoded
    finally:
        pool.shutdown(cancel_futures=True)


def decode_one_by_one(items: Sequence[Item], processor: ImageProcessor) -> list[DecodedImage]:
    """Decode images one at a time in a worker process, with two attempts each."""
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
    """Start worker processes and wait until one of them runs.

    Without the wait, processes that cannot start would look like crashes caused by images.

    Raises:
        EmbedError: The processes cannot be started.
    """
    pool = ProcessPoolExecutor(count, initializer=initialize_worker)
    try:
        pool.submit(os.getpid).result()
    except (BrokenProcessPool, OSError, AssertionError) as error:  # AssertionError: a daemon
        pool.shutdown()
        raise EmbedError(
            f"decoding processes cannot start ({error}); reduce num_workers= (0 decodes in the "
            "main process), and in scripts call embed() under `if __name__ == '__main__':`"
        ) from error
    return pool


def initialize_worker() -> None:
    """Prepare a worker process.

    Ctrl-C reaches all processes of a terminal; workers ignore it, since the main process stops
    them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=exit_with_parent, daemon=True).start()


def exit_with_parent() -> None:
    """Exit when the parent process has ended.

    Otherwise a worker with results for a killed parent would wait forever and keep its locks.
    """
    parent = multiprocessing.parent_process()
    while parent is not None and os.getppid() == parent.pid:
        time.sleep(PARENT_POLL_SECONDS)
    os._exit(1)


def worker_count(num_workers: int | None) -> int:
    """Return the number of decoding processes.

    Args:
        num_workers: Requested number; None for one per CPU core, or 0 in a daemonic process (of a
            `multiprocessing.Pool`, a DataLoader or Celery), which may not start processes.

    Raises:
        EmbedError: Processes are requested in a daemonic process.
    """
    is_daemonic = multiprocessing.current_process().daemon
    if num_workers is None:
        return 0 if is_daemonic else processor_count()
    if is_daemonic and num_workers > 0:
        raise EmbedError(
            "num_workers must be 0 in a daemonic process, which may not start processes, got "
            f"{num_workers}; pass num_workers=0, or None to decode in this process"
        )
    return num_workers


def processor_count() -> int:
    """Return the number of CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
