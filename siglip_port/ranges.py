"""Parts of a file on the HuggingFace Hub, without the rest: requests for ranges of bytes, patient and exact.

The Hub redirects large files to another host (a content delivery network), by an address that is signed and soon
expires. The Hub's token is sent to the Hub alone; the address is asked for again when it has expired.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from types import NoneType
from typing import Any, TypeVar
from urllib.parse import urlsplit

from siglip_port.files import Header, header_length, parse_header, readable

T = TypeVar("T")

WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds before each further attempt, where the one before has brought next to nothing."""

LEAST = 65_536
"""Bytes that an attempt has to bring to count as progress: at less, a tower would take thousands of requests."""

_LONGEST_WAIT = 300  # seconds that the Hub may ask us to wait ("Retry-After") before that is told instead of done

_FIRST = 65_536  # bytes asked for at first: the headers of most files are shorter, so one request is enough

_PASSING = (408, 425, 429, 500, 502, 503, 504)  # what a server answers that may answer better a little later
_EXPIRED = (400, 401, 403, 404, 410)  # what the other host answers when the signed address has expired


class NoRangesError(Exception):
    """The file cannot be read in parts; the whole file has to be fetched."""


class GivenUpError(Exception):
    """Several attempts in a row have brought next to nothing. The message says what the last met, for a sentence."""


class _PassingError(Exception):
    """An attempt has failed in a way that the next one may not.

    Attributes:
        wait: seconds that the server asks for; None where it does not.
    """

    def __init__(self, what: str, wait: float | None = None) -> None:
        super().__init__(what)
        self.wait = wait


class Patience:
    """Waits between attempts, longer each time, and gives up after a few that have brought next to nothing.

    Args:
        stop: when set, nothing is waited for any more.
    """

    def __init__(self, stop: threading.Event | None = None) -> None:
        self.stop = stop or threading.Event()
        self.failed = 0

    def renew(self) -> None:
        """Begins to count anew: there has been progress."""
        self.failed = 0

    def wait(self, error: _PassingError, attempts: int = len(WAITS) + 1) -> None:
        """Waits before the next attempt.

        Args:
            error: how the last one ended.
            attempts: how many there are to be.

        Raises:
            GivenUpError: there have been enough, or the server asks for more time than anybody would wait.
        """
        self.failed += 1
        seconds = WAITS[min(self.failed, len(WAITS)) - 1] if error.wait is None else error.wait
        if seconds > _LONGEST_WAIT:
            raise GivenUpError(f"{error}, and asks to wait {seconds:.0f} seconds") from error
        if self.failed >= attempts:
            raise GivenUpError(str(error)) from error
        if self.stop.wait(seconds):
            raise GivenUpError("interrupted") from error


@dataclass(frozen=True)
class _Place:
    """Where the bytes of a file are to be had at present."""

    address: str
    commit: str | None
    etag: str
    size: int


class RemoteFile:
    """A file in a repository of the Hub.

    Args:
        name: the Hub id.
        filename: in the repository.
        revision: branch, tag or commit.
        token: a Hub token, True for the stored one, False for none.

    Attributes:
        commit: the commit that the Hub has taken `revision` for.
        etag: the Hub's identifier of the contents.
        size: in bytes.

    Raises:
        NoRangesError: the Hub does not tell size and etag.
        GivenUpError: the Hub cannot be reached.
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses.
    """

    def __init__(self, name: str, filename: str, revision: str | None, token: str | bool | None) -> None:
        from huggingface_hub import hf_hub_url

        self.filename, self._token = filename, token
        self._url = hf_hub_url(name, filename, revision=revision)
        self._lock, self._seen = threading.Lock(), ""
        self._place = self._find()
        self.commit, self.etag, self.size = self._place.commit, self._place.etag, self._place.size

    def header(self) -> tuple[Header, bytes]:
        """Reads the header of a safetensors file; returns it, and the bytes of its JSON.

        Raises:
            siglip_port.files.UnreadableFileError: it is none.
            NoRangesError, GivenUpError, huggingface_hub.errors.HfHubHTTPError: as `read`.
        """
        content = b"".join(self.read(0, min(_FIRST, self.size)))
        with readable():
            length = header_length(content[:8], self.size)
        content += b"".join(self.read(len(content), max(len(content), 8 + length)))
        with readable():
            return parse_header(content[8 : 8 + length], self.size), content[8 : 8 + length]

    def read(self, first: int, stop: int, interrupt: threading.Event | None = None) -> Iterator[bytes]:
        """Yields the bytes from `first` to before `stop`, as they arrive. What has arrived is not asked for again.

        Args:
            first: of the bytes.
            stop: one after the last.
            interrupt: when set, nothing more is waited for.

        Raises:
            NoRangesError: the server has only the whole file to give.
            GivenUpError: the bytes cannot be had.
            huggingface_hub.errors.HfHubHTTPError: the Hub refuses.
        """
        patience = Patience(interrupt)
        while first < stop:
            place, begun = self._place, first
            try:
                for chunk in self._ask(place, first, stop):
                    if patience.stop.is_set():
                        raise GivenUpError("interrupted")
                    first += len(chunk)
                    if first - begun >= LEAST:
                        patience.renew()
                    yield chunk
            except _ExpiredError as error:
                if self._renew(place):
                    patience.wait(error)
            except _PassingError as error:
                try:
                    patience.wait(error)
                except GivenUpError as end:
                    if isinstance(error, _RangeError):
                        raise NoRangesError(str(end)) from end
                    raise

    def _find(self) -> _Place:
        """Asks the Hub for the file's address, etag and size."""
        from huggingface_hub import HfFileMetadata, constants, get_hf_file_metadata

        def ask() -> HfFileMetadata:
            return get_hf_file_metadata(self._url, token=self._token, timeout=constants.HF_HUB_ETAG_TIMEOUT)

        found = patiently(ask, self._url, if_unreachable=2)
        if found.etag is None or found.size is None:
            raise NoRangesError("the Hub does not tell its size and etag")
        return _Place(found.location, found.commit_hash, found.etag, found.size)

    def _renew(self, place: _Place) -> bool:
        """Asks for the address again, unless another thread has just done so; returns whether it has asked."""
        with self._lock:
            if self._place is not place:
                return False
            new = self._find()
            if (new.etag, new.size) != (place.etag, place.size):
                raise GivenUpError("the file has been replaced while it was read")
            self._place = new
            return True

    def _ask(self, place: _Place, first: int, stop: int) -> Iterator[bytes]:
        """One request. Yields bytes from `first` on, perhaps not all; whatever ends it early is a `_PassingError`."""
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session

        here = _origin(place.address) == _origin(self._url)
        headers = {**_headers(self._token if here else False), "Range": f"bytes={first}-{stop - 1}"}
        with (
            _passing(self._url, place.address),
            get_session().stream(
                "GET", place.address, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, follow_redirects=True
            ) as response,
        ):
            self._check(response, place, first, stop)
            for chunk in response.iter_raw():
                if len(chunk) > stop - first:
                    raise _RangeError("the server sends more bytes than were asked for")
                first += len(chunk)
                yield chunk
        if first < stop:
            raise _PassingError("the connection was closed before all bytes had arrived")

    def _check(self, response: Any, place: _Place, first: int, stop: int) -> None:  # noqa: ANN401
        """Checks that what is coming are the bytes that were asked for, of the file that was asked for."""
        from huggingface_hub.utils import hf_raise_for_status

        status, headers = response.status_code, response.headers
        if status == 200:
            raise NoRangesError("the server does not serve parts of files")
        if status == 416:
            raise _RangeError("the server has no such bytes (HTTP 416)")
        hf_raise_for_status(response)  # what may pass is sorted out by `_passing`
        begin, _, rest = headers.get("Content-Range", "").removeprefix("bytes ").partition("-")
        end, _, size = rest.partition("/")
        if (
            begin != str(first)
            or not end.isdecimal()
            or not first <= int(end) < stop
            or size not in ("*", str(place.size))
        ):
            raise _RangeError(f"the server answers with other bytes than were asked for (HTTP {status})")
        if headers.get("Content-Encoding", "identity") != "identity":
            raise _RangeError("the server compresses what it sends")
        etag = headers.get("ETag", "")
        with self._lock:
            self._seen = self._seen or etag
            if etag not in ("", self._seen):
                raise _RangeError("the file changes while it is read")


class _ExpiredError(_PassingError):
    """The signed address is not valid any more."""


class _RangeError(_PassingError):
    """The server has not understood the range; if it never does, there is the whole file."""


class _UnreachableError(_PassingError):
    """There is no connection at all."""


def patiently(ask: Callable[[], T], url: str, if_unreachable: int = len(WAITS) + 1) -> T:
    """Calls a function of the Hub's client, again where it fails in a way that may pass.

    Args:
        ask: the call.
        url: of the file at the Hub.
        if_unreachable: how many attempts there are to be where there is no connection at all.

    Raises:
        GivenUpError: it keeps failing.
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses.
        OSError: of this machine's own: the disk, say.
    """
    patience = Patience()
    while True:
        try:
            with _passing(url):
                return ask()
        except _UnreachableError as error:
            patience.wait(error, if_unreachable)
        except _PassingError as error:
            patience.wait(error)


@contextmanager
def _passing(url: str, address: str | None = None) -> Iterator[None]:
    """Sorts out what the client raises: what may pass becomes a `_PassingError`; what is final does not.

    Args:
        url: of the file at the Hub.
        address: that is asked, if another.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except (_PassingError, NoRangesError, GivenUpError, OfflineModeIsEnabled, HFValidationError):
        raise
    except LocalEntryNotFoundError as error:
        if isinstance(error.__cause__, (NoneType, OfflineModeIsEnabled)):  # the Hub was not to be asked
            raise
        raise _UnreachableError(f"no connection to {urlsplit(url).hostname}") from error
    except HfHubHTTPError as error:
        status, wait = error.response.status_code, error.response.headers.get("Retry-After", "")
        asked = str(error.response.url)
        if status in _EXPIRED and _origin(asked) != _origin(url):
            what = f"the address that the Hub gave for the file is refused (HTTP {status})"
            raise _ExpiredError(what, wait=0) from error
        if status not in _PASSING:
            raise
        what = f"{urlsplit(asked).hostname} answers HTTP {status}"
        raise _PassingError(what, float(wait) if wait.isdecimal() else None) from error
    except Exception as error:  # Of the client's HTTP library, without a base in common. Its text may hold addresses.
        if isinstance(error, OSError) and error.errno is not None:  # of this machine; the client's own have no number
            raise
        raise _UnreachableError(
            f"no connection to {urlsplit(address or url).hostname} ({type(error).__name__})"
        ) from error


def _headers(token: str | bool | None) -> dict[str, str]:
    from huggingface_hub.utils import build_hf_headers

    headers = build_hf_headers(token=token, library_name="siglip-port", library_version=version("siglip-port"))
    return {**headers, "Accept-Encoding": "identity"}


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port
