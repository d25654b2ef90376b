"""Attempts that are repeated, with waits between them, until a load has spent its budget."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from siglip_port.hub.errors import RetriesExhaustedError, TooSlowError, TransientError

T = TypeVar("T")

BACKOFF_SECONDS = (1.0, 2.0, 4.0, 8.0)
"""Before each further attempt, where the one before has brought next to nothing."""

MIN_PROGRESS_BYTES = 65_536
"""What an attempt has to bring to count as progress.

At less, a vision encoder would take thousands of requests.
"""

PROGRESS_WINDOW_SECONDS = 10.0
"""In which a load has to bring `MIN_PROGRESS_BYTES`, all its connections together.

What is slower is broken off.
"""

RETRY_BUDGET_SECONDS = 300.0
"""That a load may spend in vain before it makes progress, attempts and waits together.

Also where the Hub asks for the wait.
"""


class RetryBudget:
    """The time that one load spends in vain, and the bytes that it has fetched.

    By all its requests, in all threads.

    Attributes:
        received: bytes.
    """

    def __init__(self) -> None:
        self.received = 0
        self._lock = threading.Lock()
        self._spent = 0.0
        self._counted_until = 0.0  # a time that two threads wait at once is counted once

    def receive(self, count: int) -> None:
        """Note bytes that have arrived. Enough of them are progress: the budget is whole again."""
        with self._lock:
            before = self.received // MIN_PROGRESS_BYTES
            self.received += count
            if self.received // MIN_PROGRESS_BYTES > before:
                self._spent = 0.0
                self._counted_until = max(self._counted_until, time.monotonic())

    def spend(self, start: float, wait: float = 0.0) -> bool:
        """Take the time since `start` from the budget, and a wait.

        Args:
            start: of the attempt, by `time.monotonic()`.
            wait: seconds from now.

        Returns:
            Whether that much was left. If not, nothing is to be waited for any more.
        """
        with self._lock:
            end = time.monotonic() + wait
            self._spent += max(end - max(start, self._counted_until), 0.0)
            self._counted_until = max(self._counted_until, end)
            return self._spent <= RETRY_BUDGET_SECONDS


class Retry:
    """Waits between attempts, longer each time, until several in a row have failed.

    Args:
        budget: of the load.
        max_attempts: None for the usual number.
        interrupt: when set, nothing is waited for any more.
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
        """Count attempts anew: there has been progress."""
        self.failures = 0
        self._start = time.monotonic()

    def start_attempt(self) -> None:
        """Count the bytes of an attempt from here."""
        self._attempt_bytes = 0

    def receive(self, count: int) -> None:
        """Note bytes that an attempt has brought. Enough of them are progress.

        Raises:
            RetriesExhaustedError: there was an interrupt.
        """
        if self.interrupt.is_set():
            raise RetriesExhaustedError("interrupted")
        self._attempt_bytes += count
        if self._attempt_bytes >= MIN_PROGRESS_BYTES:
            self.reset()

    def wait(self, error: TransientError, max_attempts: int | None = None) -> None:
        """Wait before the next attempt.

        Args:
            error: how the last one ended.
            max_attempts: at an error of this kind; None for the usual number.

        Raises:
            RetriesExhaustedError: there have been enough attempts, or the server asks for more
                time than is left.
        """
        self.failures += 1
        if self.failures >= self._limit(max_attempts, error.max_attempts):
            raise RetriesExhaustedError(str(error)) from error
        seconds = error.wait
        if seconds is None:
            seconds = BACKOFF_SECONDS[min(self.failures, len(BACKOFF_SECONDS)) - 1]
        if not self.budget.spend(self._start, seconds):
            asks = f", and asks to wait {seconds:.0f} seconds" if error.wait else ""
            raise RetriesExhaustedError(
                f"{error}{asks} (a load waits {RETRY_BUDGET_SECONDS:.0f} seconds in all)"
            ) from error
        if self.interrupt.wait(seconds):
            raise RetriesExhaustedError("interrupted") from error
        self._start = time.monotonic()

    def _limit(self, *limits: int | None) -> int:
        """Return the least of several numbers of attempts, and of the usual ones."""
        known = [limit for limit in (self.max_attempts, *limits) if limit is not None]
        return min([len(BACKOFF_SECONDS) + 1, *known])


def require_progress(chunks: Iterator[bytes], budget: RetryBudget) -> Iterator[bytes]:
    """Pass on what arrives, unless too little does.

    Raises:
        TooSlowError: less than `MIN_PROGRESS_BYTES` have arrived in `PROGRESS_WINDOW_SECONDS`.
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
                f"only {received / 1000:.1f} kB have arrived in {now - window_start:.0f} seconds"
            )
        window_start = now
        before = budget.received


def call_with_timeout(
    seconds: float, call: Callable[[], T], progress: Callable[[], int] | None = None
) -> T:
    """Call a function in a thread, and wait so long for its result.

    Name lookups, and servers that send a little at a time, obey no timeout of the client.

    Args:
        seconds: how long to wait. The thread is then left alone; it does not keep the process
            alive.
        call: the function.
        progress: how far it is; as long as that changes, it is waited for.

    Raises:
        TimeoutError: there is no result yet.
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
        raise TimeoutError(f"no answer within {seconds:.0f} seconds")
    return results[0]
