"""Internal exceptions of this package; callers see a `CheckpointError` (see `messages`)."""

from __future__ import annotations


class NotCachedError(Exception):
    """A file is not cached and cannot be downloaded.

    Attributes:
        cause: Error of the last request; None if downloads are disabled.
    """

    def __init__(self, cause: Exception | None = None) -> None:
        super().__init__()
        self.cause = cause


class RangesNotSupportedError(Exception):
    """A file cannot be read in parts and must be downloaded whole. The message gives the reason."""


class RetriesExhaustedError(Exception):
    """Several attempts in a row made no progress.

    The message gives the error of the last attempt, without a final period.
    """


class TransientError(Exception):
    """An attempt failed; the next one may succeed.

    Attributes:
        wait: Wait that the server asks for, in seconds; None if it does not.
        max_attempts: Maximum number of attempts after this error; None for the default.
    """

    max_attempts: int | None = None

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


class AddressExpiredError(TransientError):
    """A signed URL has expired."""


class BadRangeError(TransientError):
    """The server did not honor a Range header; if it never does, the whole file is downloaded."""


class NoConnectionError(TransientError):
    """There is no connection, or the server is not the Hub."""


class TooSlowError(TransientError):
    """The transfer is too slow; further attempts are unlikely to help."""

    max_attempts = 3
