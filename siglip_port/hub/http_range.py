"""Files on the HuggingFace Hub, in parts or whole: requests that are patient, exact, and end.

The Hub redirects large files to another host (a content delivery network), by an address that is
signed and soon expires. The Hub's token is sent to the Hub alone; the address is asked for again
when it has expired.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urljoin, urlsplit

from siglip_port.checkpoint.formats import Header, header_length, parse_header, readable
from siglip_port.hub.network_errors import no_connection, proxy_of

T = TypeVar("T")

WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds before each further attempt, where the one before has brought next to nothing."""

LEAST = 65_536
"""Bytes that an attempt has to bring to count as progress.

At less, a tower would take thousands of requests.
"""

WINDOW = 10.0
"""Seconds in which a load has to bring `LEAST` bytes, all its connections together.

What is slower is broken off.
"""

BUDGET = 300.0
"""Seconds that a load may spend in vain before it makes progress, attempts and waits together.

Also where the Hub asks
for the wait."""

# bytes asked for at first: the headers of most files are shorter, so one request is enough
_FIRST = 65_536

_PASSING = (
    408,
    425,
    429,
    500,
    502,
    503,
    504,
)  # what a server answers that may answer better a little later
_EXPIRED = (
    400,
    401,
    403,
    404,
    410,
)  # what the other host answers when the signed address has expired
_NO_HEAD = (405, 501)  # what a server answers that knows GET alone
_MOST_REDIRECTS = 20
_CONTENT_RANGE = re.compile(r"bytes\s+(\d+)-(\d+)/(\d+|\*)", re.IGNORECASE)
_RATE_LIMIT = re.compile(
    r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d+)"
)  # nothing remains, and for how many seconds


class NoRangesError(Exception):
    """The file cannot be read in parts; the whole file has to be fetched. The message says why."""


class GivenUpError(Exception):
    """Several attempts in a row have brought next to nothing.

    The message says what the last met, for a sentence.
    """


class _PassingError(Exception):
    """An attempt has failed in a way that the next one may not.

    Attributes:
        wait: seconds that the server asks for; None where it does not.
        attempts: how many there are to be; None for the usual number.
    """

    attempts: int | None = None

    def __init__(self, what: str, wait: float | None = None) -> None:
        super().__init__(what)
        self.wait = wait


class _ExpiredError(_PassingError):
    """The signed address is not valid any more."""


class _RangeError(_PassingError):
    """The server has not understood the range; if it never does, there is the whole file."""


class _UnreachableError(_PassingError):
    """There is no connection at all, or nothing behind it that speaks as the Hub does."""


class _SlowError(_PassingError):
    """Less than `LEAST` bytes have arrived in `WINDOW` seconds.

    More attempts would bring no more.
    """

    attempts = 3


class Budget:
    """The time that one load spends in vain, and the bytes that it has fetched.

    By all its requests, in all threads.
    """

    def __init__(self) -> None:
        self.arrived = 0
        self._lock = threading.Lock()
        self._spent, self._until = 0.0, 0.0

    def count(self, number: int) -> None:
        """Notes bytes that have arrived. Enough of them are progress.

        What was spent before is forgotten.
        """
        with self._lock:
            before, self.arrived = self.arrived, self.arrived + number
            if self.arrived // LEAST > before // LEAST:
                self._spent, self._until = 0.0, max(self._until, time.monotonic())

    def spend(self, begun: float, seconds: float = 0.0) -> bool:
        """Takes the time from `begun` until so many seconds from now, but for what came before progress, or is taken.

        Args:
            begun: by `time.monotonic()`.
            seconds: that are to be waited now.

        Returns:
            Whether that much is left. If not, nothing is to be waited for any more.
        """
        with self._lock:
            end = time.monotonic() + seconds
            self._spent += max(end - max(begun, self._until), 0.0)
            self._until = max(self._until, end)
            return self._spent <= BUDGET


class Patience:
    """Waits between attempts, longer each time, and gives up after a few that have brought next to nothing.

    Args:
        budget: of the load.
        attempts: how many there are to be at most; None for the usual number.
        stop: when set, nothing is waited for any more.
    """

    def __init__(
        self, budget: Budget, attempts: int | None = None, stop: threading.Event | None = None
    ) -> None:
        self.budget, self.attempts = budget, attempts
        self.stop = stop or threading.Event()
        self.renew()

    def renew(self) -> None:
        """Begins to count anew: there has been progress."""
        self.failed, self._begun = 0, time.monotonic()

    def wait(self, error: _PassingError, attempts: int | None = None) -> None:
        """Waits before the next attempt.

        Args:
            error: how the last one ended.
            attempts: how many there are to be of this kind; None for the usual number.

        Raises:
            GivenUpError: there have been enough, or the server asks for more time than is left.
        """
        self.failed += 1
        most = min(
            n for n in (len(WAITS) + 1, attempts, self.attempts, error.attempts) if n is not None
        )
        if self.failed >= most:
            raise GivenUpError(str(error)) from error
        seconds = WAITS[min(self.failed, len(WAITS)) - 1] if error.wait is None else error.wait
        if not self.budget.spend(self._begun, seconds):
            asks = f", and asks to wait {seconds:.0f} seconds" if error.wait else ""
            raise GivenUpError(
                f"{error}{asks} (a load waits {BUDGET:.0f} seconds in all)"
            ) from error
        if self.stop.wait(seconds):
            raise GivenUpError("interrupted") from error
        self._begun = time.monotonic()


@dataclass(frozen=True)
class Place:
    """Where the bytes of a file are to be had at present, and what the Hub says of them.

    Attributes:
        address: perhaps signed.
        commit: that the Hub took the revision for.
        etag: the Hub's identifier of the contents: SHA-256, or git's own hash of what git holds
            itself.
        size: in bytes; None where nobody says.
        is_xet: whether the Hub has it in its Xet store, too.
    """

    address: str
    commit: str
    etag: str
    size: int | None
    is_xet: bool


class RemoteFile:
    """A file in a repository of the Hub.

    Args:
        name: the Hub id.
        filename: in the repository.
        revision: branch, tag or commit.
        token: a Hub token, True for the stored one, False for none.
        budget: of the load.
        attempts: how many there are to be to find it; None for the usual number.

    Attributes:
        commit: the commit that the Hub has taken `revision` for.
        etag: the Hub's identifier of the contents.

    Raises:
        GivenUpError: the Hub cannot be reached, or what answers is not the Hub.
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses.
    """

    def __init__(
        self,
        name: str,
        filename: str,
        revision: str | None,
        token: str | bool | None,
        budget: Budget,
        attempts: int | None = None,
    ) -> None:
        from huggingface_hub import hf_hub_url

        self.filename, self._token, self._budget = filename, token, budget
        self._url = hf_hub_url(name, filename, revision=revision)
        self._lock = threading.Lock()
        self._seen: dict[str, str] = {}  # the ETag of the bytes, by host
        place = self._find(attempts)
        self.commit, self.etag = place.commit, place.etag
        # From now on it is asked for by its commit, so that a push between two requests changes
        # nothing.
        asked, self._url = self._url, hf_hub_url(name, filename, revision=place.commit)
        self._place = replace(place, address=self._url) if place.address == asked else place

    @property
    def size(self) -> int:
        """The size in bytes.

        Raises:
            NoRangesError: nobody says.
        """
        if self._place.size is None:
            raise NoRangesError(
                "neither the Hub nor the host that it names says how large the file is"
            )
        return self._place.size

    @property
    def can_xet(self) -> bool:
        """Whether the Hub has it in its Xet store, too, and the Hub's client may fetch it from there."""
        from huggingface_hub import constants

        return (
            self._place.is_xet
            and not constants.HF_HUB_DISABLE_XET
            and find_spec("hf_xet") is not None
        )

    def has_size(self, size: int) -> bool:
        """Whether this is the size of the file, as far as anybody says."""
        return self._place.size in (None, size)

    def header(self) -> tuple[Header, bytes]:
        """Reads the header of a safetensors file; returns it, and the bytes of its JSON.

        Raises:
            siglip_port.checkpoint.formats.UnreadableFileError: it is none.
            NoRangesError, GivenUpError, huggingface_hub.errors.HfHubHTTPError: as `read`.
        """
        content = b"".join(self.read(0, min(_FIRST, self.size)))
        with readable():
            length = header_length(content[:8], self.size)
        content += b"".join(self.read(len(content), max(len(content), 8 + length)))
        with readable():
            return parse_header(content[8 : 8 + length], self.size), content[8 : 8 + length]

    def read(
        self, first: int, stop: int, interrupt: threading.Event | None = None
    ) -> Iterator[bytes]:
        """Yields the bytes from `first` to before `stop`, as they arrive.

        What has arrived is not asked for again.

        Args:
            first: of the bytes.
            stop: one after the last.
            interrupt: when set, nothing more is waited for.

        Raises:
            NoRangesError: the server has only the whole file to give.
            GivenUpError: the bytes cannot be had.
            huggingface_hub.errors.HfHubHTTPError: the Hub refuses.
        """
        patience = Patience(self._budget, stop=interrupt)
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
            except _PassingError as error:
                try:
                    self._recover(error, place, patience)
                except GivenUpError as end:
                    if isinstance(error, (_RangeError, _ExpiredError)) and str(end) == str(error):
                        raise NoRangesError(str(end)) from end
                    raise

    def whole(self, out: BinaryIO, most: int | None = None) -> None:
        """Fetches the file without asking for a part of it.

        After an attempt that fails, all of it is asked for again.

        Whether it is the file that the Hub describes is for the caller to find out.

        Args:
            out: what is written to, from its beginning.
            most: bytes that it may have; None for any number.

        Raises:
            GivenUpError: it cannot be had.
            ValueError: it is longer than `most`.
            huggingface_hub.errors.HfHubHTTPError: the Hub refuses.
        """
        patience = Patience(self._budget)
        while True:
            place = self._place
            out.seek(0)
            out.truncate()
            try:
                for chunk in self._ask(place):
                    out.write(chunk)
                    if most is not None and out.tell() > most:
                        raise ValueError(f"it has more than {most} bytes")
                return
            except _PassingError as error:
                self._recover(error, place, patience)

    def _recover(self, error: _PassingError, place: Place, patience: Patience) -> None:
        """Waits before the next attempt, which may need a new address.

        Gives up where there is to be none.
        """
        if not isinstance(error, _ExpiredError) or self._renew(place):
            patience.wait(error)

    def _find(self, attempts: int | None = None) -> Place:
        """Asks the Hub for the file's address, etag and size."""
        from huggingface_hub import constants

        patience = Patience(self._budget, attempts)
        seconds = 2 * constants.HF_HUB_ETAG_TIMEOUT + 5
        while True:
            try:
                with _sorted_out(self._url):
                    return within(seconds, self._look_up)
            except _UnreachableError as error:
                patience.wait(error, attempts=2)
            except _PassingError as error:
                patience.wait(error)

    def _look_up(self) -> Place:
        """One answer of the Hub, or several.

        It redirects to itself where a repository is renamed, say.
        """
        url, told = self._url, dict[str, str]()
        for _ in range(_MOST_REDIRECTS):
            status, headers = self._head(url)
            # A mirror may tell of the file in its first answer, and not in that which it redirects
            # to.
            told = {name.lower(): value for name, value in headers.items()} | {
                name: value for name, value in told.items() if name.startswith("x-")
            }
            if not 300 <= status < 400 or "location" not in told:
                break
            url, linked = urljoin(url, told["location"]), "x-linked-etag" in told
            if (linked and "x-repo-commit" in told) or not _is_hub(url, self._url):
                break
        else:
            raise GivenUpError(
                f"{urlsplit(self._url).hostname} redirects in a circle: check HF_ENDPOINT, and "
                "proxies"
            )
        etag = _plain(told.get("x-linked-etag") or told.get("etag", ""))
        commit = told.get("x-repo-commit", "")
        if not etag or not re.fullmatch(r"[0-9a-f]{40}", commit):
            missing = "ETag" if commit else "X-Repo-Commit"
            raise _UnreachableError(
                f"{urlsplit(self._url).hostname} does not answer as the Hub does (no {missing}; "
                f"HTTP {status}"
                f"{', a web page' if 'html' in told.get('content-type', '') else ''}): check "
                "HF_ENDPOINT, and whether "
                "a proxy, a firewall or a login page stands between"
            )
        is_all = (
            200 <= status < 300 and "content-encoding" not in told
        )  # and no message beside a redirect
        length = told.get("x-linked-size") or (told.get("content-length", "") if is_all else "")
        size = int(length) if length.isdecimal() else self._size_at(url)
        return Place(url, commit, etag, size, "x-xet-hash" in told)

    def _head(self, url: str) -> tuple[int, Mapping[str, str]]:
        """Asks for what the Hub says of a file, without its bytes.

        By HEAD, or, where that is not allowed, by GET.
        """
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session, hf_raise_for_status

        headers = _headers(self._token if _is_hub(url, self._url) else False)
        how: dict[str, Any] = {"timeout": constants.HF_HUB_ETAG_TIMEOUT, "follow_redirects": False}
        response = get_session().request("HEAD", url, headers=headers, **how)
        if response.status_code not in _NO_HEAD:
            hf_raise_for_status(response)
            return response.status_code, response.headers
        with get_session().stream(
            "GET", url, headers={**headers, "Range": "bytes=0-0"}, **how
        ) as response:
            hf_raise_for_status(response)
            told = {
                name: value
                for name, value in response.headers.items()
                if name.lower() != "content-length"
            }
            if size := _size_of(response):
                told["Content-Length"] = str(size)
            return response.status_code, told

    def _size_at(self, address: str) -> int | None:
        """Asks for the first byte of a file, for its size; None where that does not tell."""
        with (
            contextlib.suppress(Exception),
            self._stream(address, {"Range": "bytes=0-0"}) as response,
        ):
            return _size_of(response)
        return None

    def _renew(self, place: Place) -> bool:
        """Asks for the address again, unless another thread has just done so.

        Returns whether it has asked.
        """
        with self._lock:
            if self._place is not place:
                return False
            new = self._find()
            if (new.etag, new.size) != (place.etag, place.size):
                raise GivenUpError("the file has been replaced while it was read")
            self._place = new
            return True

    def _stream(self, address: str, headers: Mapping[str, str]) -> Any:  # noqa: ANN401 (the client's HTTP library's)
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session

        mine = _headers(self._token if _is_hub(address, self._url) else False)
        return get_session().stream(
            "GET",
            address,
            headers={**mine, **headers},
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            follow_redirects=True,
        )

    def _ask(self, place: Place, first: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """One request. Yields bytes from `first` on, perhaps not all.

        Whatever ends it early is a `_PassingError`.

        Without `stop`, it is for the whole file.
        """
        from huggingface_hub.utils import hf_raise_for_status

        asked = {} if stop is None else {"Range": f"bytes={first}-{stop - 1}"}
        with _sorted_out(self._url, place.address), self._stream(place.address, asked) as response:
            if stop is None:
                hf_raise_for_status(response)
                yield from self._at_speed(response.iter_bytes())
                return
            self._check(response, place, first, stop)
            for chunk in self._at_speed(response.iter_raw()):
                if len(chunk) > stop - first:
                    raise _RangeError("the server sends more bytes than were asked for")
                first += len(chunk)
                yield chunk
        if first < stop:
            raise _PassingError("the connection was closed before all bytes had arrived")

    def _at_speed(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """Passes on what arrives, unless too little does."""
        begun, before = time.monotonic(), self._budget.arrived
        for chunk in chunks:
            self._budget.count(len(chunk))
            yield chunk
            if (now := time.monotonic()) - begun > WINDOW:
                if self._budget.arrived - before < LEAST:
                    brought = (self._budget.arrived - before) / 1000
                    raise _SlowError(
                        f"only {brought:.1f} kB have arrived in {now - begun:.0f} seconds"
                    )
                begun, before = now, self._budget.arrived

    def _check(self, response: Any, place: Place, first: int, stop: int) -> None:  # noqa: ANN401
        """Checks that what is coming are the bytes that were asked for, of the file that was asked for."""
        from huggingface_hub.utils import hf_raise_for_status

        status, headers = response.status_code, response.headers
        if status == 200:
            raise NoRangesError("the server does not serve parts of files")
        if status == 416:
            raise _RangeError("the server has no such bytes (HTTP 416)")
        hf_raise_for_status(response)  # what may pass is sorted out by `_sorted_out`
        told = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
        if (
            told is None
            or int(told[1]) != first
            or not first <= int(told[2]) < stop
            or told[3] not in ("*", str(place.size))
        ):
            raise _RangeError(
                f"the server answers with other bytes than were asked for (HTTP {status})"
            )
        if headers.get("Content-Encoding", "identity") != "identity":
            raise _RangeError("the server compresses what it sends")
        # Each host may have an ETag of its own for the same bytes, but must stay with it.
        etag, host = _plain(headers.get("ETag", "")), str(response.url.host)
        with self._lock:
            seen = self._seen[host] = self._seen.get(host) or etag
        if etag not in ("", seen):
            raise _RangeError("the file changes while it is read")


def within(
    seconds: float, call: Callable[[], T], progress: Callable[[], object] | None = None
) -> T:
    """Calls, and waits for the result so long.

    Name lookups, and servers that send a little at a time, obey no timeout.

    Args:
        seconds: how long to wait. The call is then left alone, in a thread that does not keep the
            process alive.
        call: what to do.
        progress: tells how far it is; as long as that changes, it is waited for.

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

    thread = threading.Thread(target=run, daemon=True)
    before = progress and progress()
    thread.start()
    thread.join(seconds)
    while progress and thread.is_alive() and (now := progress()) != before:
        before = now
        thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:.0f} seconds")
    return results[0]


@contextmanager
def _sorted_out(url: str, address: str | None = None) -> Iterator[None]:
    """Sorts out what the client raises: what may pass becomes a `_PassingError`.

    What is final does not.

    Args:
        url: of the file at the Hub.
        address: that is asked, if another.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except (_PassingError, NoRangesError, GivenUpError, OfflineModeIsEnabled):
        raise
    except HfHubHTTPError as error:
        status, asked = error.response.status_code, str(error.response.url)
        host = urlsplit(asked).hostname
        if status == 407:
            proxy = proxy_of(asked) or "in between"
            raise GivenUpError(
                f"the proxy {proxy} asks for a name and password (HTTP 407)"
            ) from error
        if status in _EXPIRED and not _is_hub(asked, url):
            what = (
                f"the address that the Hub gave for the file is refused (HTTP {status} of {host})"
            )
            raise _ExpiredError(what, wait=0) from error
        if status not in _PASSING:
            raise
        raise _PassingError(
            f"{host} answers HTTP {status}", _wait_of(error.response.headers)
        ) from error
    except Exception as error:  # Of the client's HTTP library, without a base in common. Its text may hold addresses.
        if (
            isinstance(error, OSError) and error.errno is not None
        ):  # of this machine; the client's own have no number
            raise
        what, final = no_connection(error, address or url)
        raise (GivenUpError if final else _UnreachableError)(what) from error


def _wait_of(headers: Mapping[str, str]) -> float | None:
    """How many seconds a server asks to wait.

    By a rate limit that is used up, or in `Retry-After`, also as a date.
    """
    if limit := _RATE_LIMIT.search(headers.get("RateLimit", "")):
        return float(limit[1]) + 1  # it is rounded
    wait = headers.get("Retry-After", "").strip()
    if wait.isdecimal():
        return float(wait)
    try:
        return max(parsedate_to_datetime(wait).timestamp() - time.time(), 0.0)
    except ValueError:
        return None


def _size_of(response: Any) -> int | None:  # noqa: ANN401
    """How large the file is of which an answer brings a part, or all."""
    told = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    is_all = response.status_code == 200
    size = told[3] if told else response.headers.get("Content-Length", "") if is_all else ""
    return int(size) if size.isdecimal() and "Content-Encoding" not in response.headers else None


def _headers(token: str | bool | None) -> dict[str, str]:
    """What is sent with every request.

    Raises:
        GivenUpError: the stored token cannot be one.
    """
    from huggingface_hub.utils import build_hf_headers

    headers = build_hf_headers(
        token=token, library_name="siglip-port", library_version=version("siglip-port")
    )
    if not re.fullmatch(r"(Bearer [!-~]+)?", headers.get("authorization", "")):
        raise GivenUpError(
            "the stored Hub token has characters that no token has: set HF_TOKEN anew, or log in "
            "with `hf auth login`; "
            "or pass token=False, for what is public"
        )
    return {**headers, "Accept-Encoding": "identity"}


def _plain(etag: str) -> str:
    """An ETag without its quotes; a weak one without its mark."""
    return etag.removeprefix("W/").strip('"')


def _is_hub(address: str, url: str) -> bool:
    """Whether an address is of the Hub itself, which may see the token.

    As in `url`, or one that is known.

    A mirror may redirect to the Hub that it mirrors.
    """
    from huggingface_hub import constants

    known = (
        url,
        constants.ENDPOINT,
        "https://huggingface.co",
        "https://hub-ci.huggingface.co",
        "https://hf.co",
    )
    return _origin(address) in {_origin(hub) for hub in known}


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)
