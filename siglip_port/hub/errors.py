"""The exceptions inside this package. What leaves it is a `CheckpointError`: see `messages`."""

from __future__ import annotations


class NotCachedError(Exception):
    """A file is not in the cache, and the Hub may not be asked, or could not be, for another file.

    Attributes:
        cause: why it could not be asked; None where it may not.
    """

    def __init__(self, cause: Exception | None = None) -> None:
        super().__init__()
        self.cause = cause


class RangesNotSupportedError(Exception):
    """A file cannot be read in parts; it has to be fetched whole. The message says why."""


class RetriesExhaustedError(Exception):
    """Several attempts in a row have brought next to nothing.

    The message says what the last one met, for a sentence.
    """


class TransientError(Exception):
    """An attempt has failed in a way that the next one may not.

    Attributes:
        wait: seconds that the server asks for; None where it does not.
        max_attempts: at an error of this kind; None for the usual number.
    """

    max_attempts: int | None = None

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


class AddressExpiredError(TransientError):
    """A signed address is not valid any more."""


class BadRangeError(TransientError):
    """The server has not understood the range; if it never does, there is the whole file."""


class NoConnectionError(TransientError):
    """There is no connection at all, or nothing behind it that speaks as the Hub does."""


class TooSlowError(TransientError):
    """Next to nothing arrives. More attempts would bring no more."""

    max_attempts = 3
