"""Retries with backoff, within the time budget of a load."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from siglip_port.hub.errors import RetriesExhaustedError, TooSlowError, TransientError

T = TypeVar("T")

BACKOFF_SECONDS = (1.0, 2.0, 4.0, 8.0)
"""Wait before each retry after an attempt without progress, in seconds."""

MIN_PROGRESS_BYTES = 65_536
"""Bytes that count as progress; with less per attempt, a download would take thousands of requests.
"""

PROGRESS_WINDOW_SECONDS = 10.0
"""Window in which all connections of a load must receive `MIN_PROGRESS_BYTES`, in seconds."""

RETRY_BUDGET_SECONDS = 300.0
"""Time that a load may spend without progress, in seconds: attempts and waits, also those that the
Hub asks for."""


class RetryBudget:
    """Time without progress and bytes received by all requests of a load, in all threads.

    Attributes:
        received: Bytes received.
    """

    def __init__(self) -> None:
        self.received = 0
        self._lock = threading.Lock()
        self._spent = 0.0
        self._counted_until = 0.0  # concurrent waits of two threads count once

    def receive(self, count: int) -> None:
        """Record received bytes; `MIN_PROGRESS_BYTES` of them reset the budget."""
        with self._lock:
            before = self.received // MIN_PROGRESS_BYTES
            self.received += count
            if self.received // MIN_PROGRESS_BYTES > before:
                self._spent = 0.0
                self._counted_until = max(self._counted_until, time.monotonic())

    def spend(self, start: float, wait: float = 0.0) -> bool:
        """Spend the time since `start` and an upcoming wait.

        Args:
            start: Start of the attempt, by `time.monotonic()`.
            wait: Upcoming wait, in seconds.

        Returns:
            Whether the budget covers it; if not, the load must give up.
        """
        with self._lock:
            end = time.monotonic() + wait
            self._spent += max(end - max(start, self._counted_until), 0.0)
            self._counted_until = max(self._counted_until, end)
            return self._spent <= RETRY_BUDGET_SECONDS


class Retry:
    """Exponential backoff between attempts, up to a number of failures in a row.

    Args:
        budget: Retry budget of the load.
        max_attempts: Maximum number of attempts; None for the default.
        interrupt: Event that cancels waits.
    """

    def __init__(
        self,
        budget: RetryBudget,
        max_attempts: int | None = None,
        interrupt: threading.Event | None = None,
    ) -> None:
        self.budget = budget
        self.max_attempts = max_attempts
        self.interrupt = interrupt or threading.Event()
        self._attempt_bytes = 0
        self.reset()

    def reset(self) -> None:
        """Reset the number of failures after progress."""
        self.failures = 0
        self._start = time.monotonic()

    def start_attempt(self) -> None:
        """Reset the byte count of the attempt."""
        self._attempt_bytes = 0

    def receive(self, count: int) -> None:
        """Record received bytes; `MIN_PROGRESS_BYTES` of them reset the failures.

        Raises:
            RetriesExhaustedError: The download was interrupted.
        """
        if self.interrupt.is_set():
            raise RetriesExhaustedError("interrupted")
        self._attempt_bytes += count
        if self._attempt_bytes >= MIN_PROGRESS_BYTES:
            self.reset()

    def wait(self, error: TransientError, max_attempts: int | None = None) -> None:
        """Wait before the next attempt.

        Args:
            error: Error of the last attempt.
            max_attempts: Maximum number of attempts for this error; None for the default.

        Raises:
            RetriesExhaustedError: No attempts or not enough of the budget is left.
        """
        self.failures += 1
        if self.failures >= self._limit(max_attempts, error.max_attempts):
            raise RetriesExhaustedError(str(error)) from error
        seconds = error.wait
        if seconds is None:
            seconds = BACKOFF_SECONDS[min(self.failures, len(BACKOFF_SECONDS)) - 1]
        if not self.budget.spend(self._start, seconds):
            wait = f" and asks to wait {seconds:.0f} seconds" if error.wait else ""
            raise RetriesExhaustedError(
                f"{error}{wait} (limit: {RETRY_BUDGET_SECONDS:.0f} seconds without progress)"
            ) from error
        if self.interrupt.wait(seconds):
            raise RetriesExhaustedError("interrupted") from error
        self._start = time.monotonic()

    def _limit(self, *limits: int | None) -> int:
        """Return the minimum of several numbers of attempts and the default."""
        known = [limit for limit in (self.max_attempts, *limits) if limit is not None]
        return min([len(BACKOFF_SECONDS) + 1, *known])


def require_progress(chunks: Iterator[bytes], budget: RetryBudget) -> Iterator[bytes]:
    """Yield chunks as they arrive, as long as the load makes progress.

    Raises:
        TooSlowError: Less than `MIN_PROGRESS_BYTES` arrived within `PROGRESS_WINDOW_SECONDS`.
    """
    window_start = time.monotonic()
    before = budget.received
    for chunk in chunks:
        budget.receive(len(chunk))
        yield chunk
        now = time.monotonic()
        if now - window_start <= PROGRESS_WINDOW_SECONDS:
            continue
        received = budget.received - before
        if received < MIN_PROGRESS_BYTES:
            raise TooSlowError(
                f"only {received / 1000:.1f} kB arrived in {now - window_start:.0f} seconds"
            )
        window_start = now
        before = budget.received


def call_with_timeout(
    seconds: float, call: Callable[[], T], progress: Callable[[], int] | None = None
) -> T:
    """Call a function in a daemon thread, with a timeout.

    Name lookups and servers that send a few bytes at a time escape the timeouts of the client.

    Args:
        seconds: Timeout; after it, the thread is abandoned.
        call: Function to call.
        progress: Measure of progress; while its value changes, the timeout restarts.

    Raises:
        TimeoutError: The function did not return in time.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    def measure() -> int:
        return 0 if progress is None else progress()

    thread = threading.Thread(target=run, daemon=True)
    before = measure()
    thread.start()
    thread.join(seconds)
    while thread.is_alive():
        now = measure()
        if now == before:
            break
        before = now
        thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no response within {seconds:.0f} seconds")
    return results[0]
