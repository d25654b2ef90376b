"""Where a checkpoint's bytes come from.

A folder, a file in a folder, or a repository of the HuggingFace Hub.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote, urlsplit

from siglip_port.checkpoint.errors import CheckpointError, HubUnreachableError
from siglip_port.checkpoint.formats import (
    MAX_JSON_BYTES,
    SUFFIXES,
    Header,
    UnreadableFileError,
    read_header,
)
from siglip_port.checkpoint.source import CONFIG, PICKLE_SUFFIXES, Source, pickle_advice
from siglip_port.checkpoint.weight_files import read_weights_header
from siglip_port.hub import partial_download as towers
from siglip_port.hub.cache import Receipt, RepositoryCache, is_still, verified
from siglip_port.hub.http_range import Budget, GivenUpError, NoRangesError, RemoteFile, within
from siglip_port.hub.network_errors import harmless, quoted

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

log = logging.getLogger(__name__)

T = TypeVar("T")

_Fetch = Callable[
    [RemoteFile, Path], Path
]  # fetches a file to a place beside a path; returns which

_COMMIT = re.compile(r"[0-9a-f]{40}")
# of a file: a tower that is more of it is not worth a copy of its own, which nobody else can use
_MOST = 0.8

_FILE_SUFFIXES = (*SUFFIXES, ".json", *PICKLE_SUFFIXES)


class LocalFolder:
    """A checkpoint in a folder of this machine. Never touches the network."""

    def __init__(self, folder: Path, name: str, weights: str | None = None) -> None:
        self.folder, self.name, self.weights = folder, name, weights
        self.commit: str | None = None

    @property
    def title(self) -> str:
        """What messages call it."""
        return self.name

    def get(self, filename: str) -> Path | None:
        """Returns the path of the file, or None where there is none."""
        path = self.folder / filename
        try:
            return path if path.is_file() else None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    def header(self, filename: str) -> Header | None:
        """Reads which tensors a weights file holds; None where there is no such file."""
        path = self.get(filename)
        return None if path is None else read_weights_header(path)

    def local(self, filename: str) -> Path | None:
        """As `get`: all of it is here."""
        return self.get(filename)

    def fetch(self, wanted: Mapping[str, Collection[str]]) -> dict[str, Path]:
        """Returns where the weights files are."""
        return {filename: self.folder / filename for filename in wanted}

    def listing(self) -> list[str]:
        """Returns the names of the files in the folder."""
        return sorted(path.name for path in self.folder.iterdir() if path.is_file())


class _NotCachedError(Exception):
    """A file is not in the cache, and the Hub may not be asked, or could not be, for another file.

    Attributes:
        cause: why it could not be asked; None where it may not.
    """

    def __init__(self, cause: Exception | None = None) -> None:
        super().__init__()
        self.cause = cause


class HubRepository:
    """A checkpoint in a model repository of the Hub.

    With the cache, the variables and the login of `huggingface_hub`.

    Once the Hub has told the commit, with the first file, all others are taken from that commit, so
    that a push between two requests cannot mix two versions. Where the Hub cannot be asked, it is
    the commit that the cache knows.

    Every file that is fetched is compared with what the Hub says of it, and again at every use.

    Args:
        name: the Hub id.
        revision: branch, tag or commit.
        local_files_only: use the cache only, never the network.
        token: a Hub token, True for the stored one, False for none.
        cache_dir: instead of the Hub's usual cache folder.
        vision_only: of weights that the cache has not got, read the headers and fetch the tower
            alone.
        weights: the name of the weights file; None for the usual ones.
    """

    def __init__(
        self,
        name: str,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        vision_only: bool = True,
        weights: str | None = None,
    ) -> None:
        self.name, self.revision, self.local_files_only = name, revision, local_files_only
        self.token, self.cache_dir = token, cache_dir
        self.vision_only, self.weights = vision_only, weights
        self.commit: str | None = None
        self._budget = Budget()
        self._failure: Exception | None = None  # of the last request: nothing more is asked
        self._files: dict[str, RemoteFile] = {}  # that have been asked for
        self._absent: set[str] = set()  # files that the repository has not got
        self._damaged: set[str] = set()  # files that the cache has, but not as the Hub has them
        self._headers: dict[
            str, tuple[Header, str]
        ] = {}  # by file, of those not fetched as a whole: with the etag
        self._whole: dict[str, Exception] = {}  # files that cannot be fetched in parts, and why
        self._scratch: Path | None = None  # a folder for small files, where the cache is read-only

    def get(self, filename: str) -> Path | None:
        """Fetches the file into the cache, or finds it there.

        None where the repository has no such file.

        Raises:
            HubUnreachableError: the file is not cached, and the Hub cannot be reached or may not be
                asked.
            CheckpointError: the Hub refuses, or the file cannot be stored.
        """
        return self._in_plain_words(filename, lambda: self._get(filename))

    def header(self, filename: str) -> Header | None:
        """Reads which tensors a weights file holds; None where there is no such file.

        Raises:
            CheckpointError: as `get` does; or the file is damaged.
        """
        return self._in_plain_words(filename, lambda: self._header(filename))

    def fetch(self, wanted: Mapping[str, Collection[str]]) -> dict[str, Path]:
        """Fetches tensors, or finds them in the cache.

        The tower alone, where it is the lesser part of files that are not in the cache and can be
        read in parts.

        Args:
            wanted: the names of the tensors, by weights file.

        Returns:
            By weights file, a file on this machine that holds these tensors, and perhaps others.

        Raises:
            CheckpointError: as `get` does.
        """
        return self._in_plain_words(" and ".join(wanted), lambda: self._fetch(wanted))

    def local(self, filename: str) -> Path | None:
        """Returns the path of the file, where the cache has it whole; without asking the Hub."""
        commit = self._known_commit
        return (
            None
            if commit is None or filename in self._damaged
            else self.cache.find(commit, filename)
        )

    def listing(self) -> list[str]:
        """Returns the names of the files in the repository, or nothing where the Hub does not say."""
        from huggingface_hub import HfApi

        if self._offline or self._failure is not None:
            return []
        revision = self.commit or self.revision
        try:
            return sorted(
                within(
                    20,
                    lambda: HfApi(token=self.token).list_repo_files(self.name, revision=revision),
                )
            )
        except Exception:  # It only adds to a message about another fault.
            return []

    @property
    def title(self) -> str:
        """What messages call it."""
        return f"{self.name} at revision {self.revision!r}" if self.revision else self.name

    @property
    def cache(self) -> RepositoryCache:
        """The repository's place in the Hub's cache."""
        from huggingface_hub import constants

        return RepositoryCache(Path(self.cache_dir or constants.HF_HUB_CACHE), self.name)

    @property
    def _offline(self) -> bool:
        from huggingface_hub import constants

        return self.local_files_only or constants.HF_HUB_OFFLINE

    @property
    def _known_commit(self) -> str | None:
        """The commit, where the Hub need not be asked: told by a file, or demanded.

        Offline, what was last.
        """
        if self.commit is None and self.revision is not None and _COMMIT.fullmatch(self.revision):
            return self.revision
        if self.commit is None and self._offline:
            return self.cache.commit_of(self.revision or "main")
        return self.commit

    # --- what is asked of the Hub -----------------------------------------------------------------

    def _settle(self, filename: str) -> None:
        """Settles which commit is read: as the Hub tells of this file.

        Where it cannot be asked, as the cache does.
        """
        from huggingface_hub.errors import RemoteEntryNotFoundError, RevisionNotFoundError

        self.commit = self._known_commit
        if self.commit is not None or self._offline:
            return
        last = self.cache.commit_of(self.revision or "main")
        try:
            self._ask(
                filename, attempts=1 if last is not None and self.cache.has_weights(last) else None
            )
        except RemoteEntryNotFoundError:
            return
        except RevisionNotFoundError:
            raise
        except Exception as error:
            if last is None:
                raise
            if not self.cache.knows(last, filename):  # perhaps it knows another that will do
                raise _NotCachedError(self._failure or error) from error
            self.commit = last
            log.warning(
                "the Hub cannot be asked for %s (%s): the cache's commit %s is taken, which may "
                "not be the newest",
                self._title,
                self._cause(filename, error),
                last,
            )

    def _ask(self, filename: str, attempts: int | None = None) -> RemoteFile:
        """Asks the Hub for a file's etag, size and commit, once.

        And nothing more once it could not be asked.

        Raises:
            huggingface_hub.errors.RemoteEntryNotFoundError: the repository has no such file, which
                is noted.
            Exception: the Hub cannot be asked, or refuses.
        """
        from huggingface_hub.errors import RemoteEntryNotFoundError

        if self._failure is not None:
            raise _NotCachedError(self._failure)
        if filename not in self._files:
            revision = self.commit or self.revision
            try:
                file = RemoteFile(self.name, filename, revision, self.token, self._budget, attempts)
            except RemoteEntryNotFoundError as error:
                self._absent.add(filename)
                commit = error.response.headers.get("X-Repo-Commit", "")
                if _COMMIT.fullmatch(commit):
                    self._take(commit)
                    self.cache.note_absent(commit, filename)
                raise
            except Exception as error:
                self._failure = error
                raise
            self._files[filename] = file
            self._take(file.commit)
        return self._files[filename]

    def _is_absent(self, filename: str) -> bool:
        """Whether the repository is known not to have the file."""
        known = self.commit is not None and self.cache.knows_absent(self.commit, filename)
        return known or filename in self._absent

    def _take(self, commit: str) -> None:
        """Takes the commit that the Hub has told.

        The one that the cache knew stays its own until this one is here.
        """
        if self.commit is None:
            self.commit = commit
            if self.cache.commit_of(self.revision or "main") is None:
                self.cache.note_commit(self.revision or "main", commit)

    # --- whole files ------------------------------------------------------------------------------

    def _get(self, filename: str) -> Path | None:
        from huggingface_hub.errors import RemoteEntryNotFoundError

        self._settle(filename)
        if self._is_absent(filename):
            return None
        if (path := self.local(filename)) is not None:
            if path.suffix == ".json":
                self._check_small(path, filename)
            return path
        if self._offline:
            raise _NotCachedError
        try:
            file = self._ask(filename)
        except RemoteEntryNotFoundError:
            return None
        return self._fetch_small(file) if filename.endswith(".json") else self._fetch_whole(file)

    def _check_small(self, path: Path, filename: str) -> None:
        if not self._is_right(path, filename, [(0, path.stat().st_size)]):
            raise CheckpointError(
                f"{path} has changed since it was fetched from the Hub: delete it, and it is "
                "fetched again; or, to "
                "keep the change, copy the checkpoint to a folder and pass that"
            )

    def _fetch_small(self, file: RemoteFile) -> Path:
        """Fetches a configuration.

        It is kept beside the cache where the cache cannot be written.
        """
        with contextlib.suppress(NoRangesError):
            if file.size > MAX_JSON_BYTES:
                raise CheckpointError(
                    f"{file.filename} of {self._title} has {file.size} bytes, more than the "
                    f"{MAX_JSON_BYTES} that such a "
                    "file may have; it is not fetched"
                )
        try:
            if (path := self._blob(file)) is not None:
                return path
            self.cache.own.mkdir(parents=True, exist_ok=True)
            return self._put(file, self.cache.own / file.filename, self._fetch_json)
        except OSError as error:
            if error.errno is None:
                raise
            log.warning(
                "%s of %s cannot be kept in the cache (%s)", file.filename, self._title, error
            )
        if self._scratch is None:
            self._scratch = Path(tempfile.mkdtemp(prefix="siglip_port-"))
            weakref.finalize(self, shutil.rmtree, self._scratch, ignore_errors=True)
        path = self._scratch / file.filename
        _, arrived = self._verified(file, path, self._fetch_json)
        return arrived.replace(path)

    def _fetch_whole(self, file: RemoteFile) -> Path:
        """Fetches weights, or finds their bytes in the cache, of another commit perhaps."""
        if (path := self._blob(file)) is not None:
            return path
        place = self.cache.own / self.cache.blob(file.etag).name
        place.parent.mkdir(parents=True, exist_ok=True)
        attempts = 3
        with towers.alone(place):
            while (path := self._blob(file)) is None:  # unless another process has just fetched it
                attempts -= 1
                try:
                    return self._put(file, place, self._fetch_weights)
                except OSError as error:
                    # Where locks do not hold, as on some network file systems, others may move the
                    # file.
                    if error.errno != errno.ENOENT or not attempts:
                        raise
        return path

    def _fetch_weights(self, file: RemoteFile, path: Path) -> Path:
        """Fetches a file by ranges, as a stream where these are refused, by Xet where both are."""
        from huggingface_hub.errors import HfHubHTTPError

        why = self._whole.get(file.filename)
        try:
            if why is None:
                try:
                    return towers.fetch_whole(file, path, f"{self.name}, {file.filename}")
                except NoRangesError as error:
                    log.info(
                        "%s of %s cannot be fetched in parts (%s)",
                        file.filename,
                        self._title,
                        error,
                    )
            if isinstance(why, GivenUpError):
                raise why
            return self._stream(file, path)
        except (GivenUpError, HfHubHTTPError) as error:
            if not file.can_xet:
                raise
            log.warning(
                "%s of %s: %s; trying hf_xet", file.filename, self._title, harmless(str(error))
            )
            try:
                return towers.fetch_by_client(self.name, file, path, self.token)
            except GivenUpError as end:
                raise GivenUpError(f"{error}; and {end}") from end

    def _fetch_json(self, file: RemoteFile, path: Path) -> Path:
        return self._stream(file, path, MAX_JSON_BYTES)

    def _stream(self, file: RemoteFile, path: Path, most: int | None = None) -> Path:
        with contextlib.suppress(NoRangesError):
            towers.check_room(path.parent, file.size)
        unfinished = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.stream")
        try:
            with unfinished.open("w+b") as out:
                file.whole(out, most)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        return unfinished

    def _blob(self, file: RemoteFile) -> Path | None:
        """Finds the bytes of a file in the cache, of another commit perhaps.

        None where they are not right.
        """
        cache, blob = self.cache, self.cache.blob(file.etag)
        if not blob.is_file() or (receipt := verified(blob, file.etag)) is None:
            return None
        try:
            path = cache.link(file.commit, file.filename, file.etag)
        except OSError:  # The cache cannot be written; it has the bytes nevertheless.
            path = blob
        return self._noted(file, path, receipt)

    def _put(self, file: RemoteFile, place: Path, fetch: _Fetch) -> Path:
        """Fetches a file, compares it with what the Hub says of it, and makes it one of the cache."""
        stood = self.cache.blob(file.etag).is_file() or file.filename in self._damaged
        receipt, arrived = self._verified(file, place, fetch)
        for aside in self.cache.set_aside(file.commit, file.filename, file.etag) if stood else ():
            log.warning(
                "what stood in the place of %s of %s is kept as %s",
                file.filename,
                self._title,
                aside,
            )
        return self._noted(
            file, self.cache.put(file.commit, file.filename, receipt.etag, arrived), receipt
        )

    def _noted(self, file: RemoteFile, path: Path, receipt: Receipt) -> Path:
        self._damaged.discard(file.filename)
        self.cache.note_receipt(file.commit, file.filename, receipt)
        return path

    def _verified(self, file: RemoteFile, place: Path, fetch: _Fetch) -> tuple[Receipt, Path]:
        """Fetches a file, and compares it with what the Hub says of it.

        Twice where they differ, then tells.
        """
        for attempt in range(2):
            if attempt:  # Perhaps it was what the Hub says that was spoiled on its way.
                file = RemoteFile(self.name, file.filename, file.commit, self.token, self._budget)
            arrived = fetch(file, place)
            size = arrived.stat().st_size
            receipt = verified(arrived, file.etag) if file.has_size(size) else None
            if receipt is not None:
                return receipt, arrived
            arrived.unlink()
        raise CheckpointError(
            f"{file.filename} of {self._title} did not arrive as it left: its hash should be "
            f"{file.etag}, which the "
            f"{size} bytes that came have not; they have been removed: try again"
        )

    # --- weights ----------------------------------------------------------------------------------

    def _header(self, filename: str) -> Header | None:
        self._settle(filename)
        if self._is_absent(filename):
            return None
        if (path := self.local(filename)) is not None:
            try:
                return read_header(path)
            except UnreadableFileError:
                if not self._is_damaged(path, filename):
                    return read_weights_header(
                        path
                    )  # which says what is wrong with the file that the Hub has
        if self.vision_only and filename.endswith(".safetensors"):
            if self._kept(filename):
                return self._headers[filename][0]
            if not self._offline:
                try:
                    return self._remote_header(filename)
                except (NoRangesError, GivenUpError) as error:
                    self._go_on_with_whole([filename], error)
        path = self._get(filename)
        return None if path is None else read_weights_header(path)

    def _fetch(self, wanted: Mapping[str, Collection[str]]) -> dict[str, Path]:
        whole = {
            filename: path
            for filename, names in wanted.items()
            if (path := self.local(filename)) is not None
            and not self._is_damaged(path, filename, names)
        }
        in_parts = (
            self.vision_only
            and not self._whole
            and all(name.endswith(".safetensors") for name in wanted)
        )
        if in_parts and len(whole) < len(wanted):
            try:
                if (tower := self._tower(wanted)) is not None:
                    return self._loaded(dict.fromkeys(wanted, tower))
            except (NoRangesError, GivenUpError) as error:
                self._go_on_with_whole(sorted(wanted.keys() - whole.keys()), error)
        for filename in wanted.keys() - whole.keys():
            if (path := self._get(filename)) is None:
                raise CheckpointError(f"{self.title} has no file {filename}")
            whole[filename] = path
        return self._loaded(whole)

    def _loaded(self, files: dict[str, Path]) -> dict[str, Path]:
        """Notes that the commit is here.

        From now on it is what the branch is, when the Hub cannot be asked.
        """
        if self.commit is not None and not self._offline:
            self.cache.note_commit(self.revision or "main", self.commit)
        return files

    def _go_on_with_whole(
        self, filenames: Iterable[str], error: NoRangesError | GivenUpError
    ) -> None:
        """Tells that more than the tower is fetched, and why.

        Raises the error where that would not help.
        """
        files = [self._files[filename] for filename in filenames if filename in self._files]
        if isinstance(error, GivenUpError) and not (files and all(file.can_xet for file in files)):
            raise error
        for file in files:
            self._whole[file.filename] = error
            log.warning(
                "%s of %s cannot be fetched in parts, so all %s of it are fetched, not the tower "
                "alone: %s",
                file.filename,
                self._title,
                f"{file.size / 1e6:,.1f} MB" if not file.has_size(-1) else "bytes",
                harmless(str(error)),
            )

    def _is_damaged(self, path: Path, filename: str, names: Collection[str] | None = None) -> bool:
        """Whether a whole file of the cache is something else than the Hub has.

        Args:
            path: where it lies.
            filename: in the repository.
            names: the tensors that count, where it is known that the file was right once; None for
                all of it.

        Raises:
            CheckpointError: it is, and the Hub may not be asked.
        """
        spans = None if names is None else _spans(read_header(path), names)
        if self._is_right(path, filename, spans):
            return False
        if self._offline:
            raise _damaged(path)
        log.warning(
            "%s is damaged, or was changed, since it was fetched from the Hub: fetching it again",
            path,
        )
        self._damaged.add(filename)
        return True

    def _is_right(self, path: Path, filename: str, spans: list[tuple[int, int]] | None) -> bool:
        """Whether a file of the cache is what it was, or as the Hub says, as far as that is known.

        Args:
            path: where it lies.
            filename: in the repository.
            spans: the parts of it that count, where it is known that it was right once; None for
                all of it.
        """
        commit = self.commit or ""
        if (etag := self.cache.etag_of(commit, filename)) is None:
            # fetched by another program, to where there are no links: nobody says what it should be
            return True
        receipt = self.cache.receipt(commit, filename)
        if spans is not None and receipt is not None and receipt.etag == etag:
            return is_still(path, receipt, spans)
        if (receipt := verified(path, etag)) is not None:
            self.cache.note_receipt(commit, filename, receipt)
        return receipt is not None

    def _kept(self, filename: str) -> bool:
        """Whether the header of a file is known already."""
        if filename not in self._headers and (commit := self._known_commit) is not None:
            kept = towers.kept_header(self.cache.header_place(commit, filename))
            if kept is not None:
                self._headers[filename] = kept
        return filename in self._headers

    def _remote_header(self, filename: str) -> Header | None:
        """Reads the first bytes of a safetensors file, by requests for a range of it."""
        from huggingface_hub.errors import RemoteEntryNotFoundError

        try:
            file = self._ask(filename)
        except RemoteEntryNotFoundError:
            return None
        header, content = file.header()
        self._headers[filename] = header, file.etag
        towers.keep_header(self.cache.header_place(file.commit, filename), file, content)
        return header

    def _tower(self, wanted: Mapping[str, Collection[str]]) -> Path | None:
        """Fetches the tower alone, or finds it in the cache.

        None where the whole files are to be had instead.
        """
        missing = [filename for filename in wanted if not self._kept(filename)]
        if missing and self._offline:
            return None
        for filename in missing:
            self._remote_header(filename)
        parts = [
            towers.Part(filename, *self._headers[filename], names)
            for filename, names in wanted.items()
        ]
        tower = towers.Tower(self.cache.own, self.name, parts)
        if tower.nbytes > _MOST * sum(part.header.size for part in parts):
            return None
        if not tower.is_whole():
            if self._offline:
                if tower.path.exists():
                    raise _damaged(tower.path)
                return None
            files = {part.filename: self._ask(part.filename) for part in parts}
            if changed := [
                part.filename for part in parts if files[part.filename].etag != part.etag
            ]:
                raise GivenUpError(f"{' and '.join(changed)} changed while it was read")
            tower.fetch(files, f"{self.name}, tower")
        towers.tidy(self.cache, self.commit or "", tower.path)
        return tower.path

    # --- messages ---------------------------------------------------------------------------------

    @property
    def _title(self) -> str:
        return f"{self.name!r} at revision {self.revision!r}" if self.revision else f"{self.name!r}"

    def _in_plain_words(self, filename: str, do: Callable[[], T]) -> T:
        """Does something; what the client raises becomes one sentence, which has no signed address in its wake."""
        try:
            return do()
        except CheckpointError:
            raise
        except Exception as error:
            failure = self._explained(filename, error)
        raise failure  # out of the handler, so that it does not carry what it came of

    def _explained(self, filename: str, error: Exception) -> CheckpointError:
        """Says what went wrong, and what to do."""
        from huggingface_hub import errors

        at, elsewhere = self._title, "or pass a folder that holds the checkpoint"
        spelling = f"{elsewhere} (there is none of this name here: check the spelling)"
        match error:
            case _NotCachedError(cause=Exception() as failure):
                return HubUnreachableError(
                    f"{filename} of {at} is not in the local cache, and the Hub could not be "
                    "asked: "
                    f"{self._cause(filename, failure)}; try again later, {spelling}"
                )
            case _NotCachedError():
                why = (
                    "only local files were allowed"
                    if self.local_files_only
                    else "HF_HUB_OFFLINE is set"
                )
                return HubUnreachableError(
                    f"{filename} of {at} is not in the local cache, and {why}; connect once to "
                    f"fetch it, {spelling}"
                )
            case GivenUpError() | NoRangesError():
                cause = self._cause(filename, error)
                return HubUnreachableError(
                    f"{filename} of {at} could not be fetched: {cause}; try again later, {spelling}"
                )
            case errors.HfHubHTTPError() | UnreadableFileError() | errors.HFValidationError():
                return CheckpointError(self._cause(filename, error))
            case OSError():
                last = self.cache.commit_of(self.revision or "main")
                before = (
                    f"; what was cached before, commit {last}, loads with local_files_only=True"
                )
                return CheckpointError(
                    f"{filename} of {at} could not be fetched: {self._cause(filename, error)}"
                    f"{before if last not in (None, self.commit) else ''}"
                )
            case _:
                return HubUnreachableError(
                    f"{filename} of {at} could not be fetched ({self._cause(filename, error)}); "
                    "try again later, "
                    f"{elsewhere}"
                )

    def _cause(self, filename: str, error: Exception) -> str:
        """Says what went wrong, for a sentence."""
        from huggingface_hub import errors

        match error:
            case UnreadableFileError():
                return f"{filename} of {self._title} is not a whole safetensors file ({error}); {error.advice}"
            case errors.HFValidationError():
                return f"{self.name!r} is neither a path nor a Hub id: {error}"
            case errors.HfHubHTTPError():
                return f"{self._refusal(filename, error)} ({quoted(error)})"
            case GivenUpError() | NoRangesError() | OSError():
                return harmless(str(error))
        return quoted(error)

    def _refusal(self, filename: str, error: HfHubHTTPError) -> str:
        """Says why the Hub refuses, and what to do."""
        from huggingface_hub import constants, errors

        login = "log in with `hf auth login`, or pass token="
        status, sent = (
            error.response.status_code,
            error.response.request.headers.get("Authorization"),
        )
        is_named = error.response.headers.get("X-Error-Code") in ("RepoNotFound", "GatedRepo")
        if status == 401 and sent and (not is_named or "invalid credentials" in str(error).lower()):
            return (
                f"the Hub does not accept the token with which {filename} of {self._title} was "
                "asked for: it has "
                f"expired or was revoked; {login}; or, for what is public, pass token=False or "
                "unset HF_TOKEN"
            )
        match error:
            case errors.GatedRepoError():
                page = f"{constants.ENDPOINT}/{self.name}"
                return f"{self._title} is gated: ask for access at {page}, then {login}"
            case errors.RepositoryNotFoundError():
                return f"the Hub has no repository {self._title}; check the spelling, or, if it is private, {login}"
            case errors.RevisionNotFoundError():
                return f"the Hub repository {self.name!r} has no revision {self.revision!r}"
        return (
            f"the Hub refused {filename} of {self._title} (HTTP {status}); try again later, or "
            "pass a folder that "
            "holds the checkpoint"
        )


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged; it is fetched again when the Hub may be asked (now: local files only)"
    )


def _spans(header: Header, names: Collection[str]) -> list[tuple[int, int]]:
    """Where the header and some tensors are in a file: first byte, and one after the last.

    All of an `.npz` file.
    """
    if not header.offsets:
        return [(0, header.size)]
    tensors = [
        (header.offsets[name], header.offsets[name] + header.tensors[name].nbytes) for name in names
    ]
    return [(0, min(header.offsets.values())), *tensors]


@dataclass(frozen=True)
class _Address:
    """A repository as an address names it.

    `hf://`, `hf-hub:`, a page of the Hub, or `name@revision`.
    """

    name: str
    revision: str | None
    filename: str | None


_ID = r"(?P<name>[\w-][\w.-]*/[\w.-]+)"
_BARE = re.compile(rf"{_ID}(?:@(?P<revision>[^\s@]+))?")
_PATH = re.compile(rf"(?:models/)?{_ID}(?:@(?P<revision>[^/\s]+))?(?:/(?P<file>.+))?")
_PAGE = re.compile(
    rf"/(?:models/)?{_ID}(?:/(?:tree|blob|resolve|raw)/(?P<revision>[^/]+)(?:/(?P<file>.+))?)?"
)


def _address(source: str) -> _Address | None:
    """Reads a Hub id or an address of the Hub; None where it is neither.

    Raises:
        CheckpointError: it is an address, but of no model of the Hub.
    """
    from huggingface_hub import constants

    text = source.strip().rstrip("/")
    if re.match(r"((www\.)?huggingface\.co|hf\.co)/[^/]+/", text):
        text = f"https://{text}"
    scheme, colon, rest = text.partition(":")
    if not colon:
        match = _BARE.fullmatch(text)
        if match is None or Path(match["name"]).suffix in _FILE_SUFFIXES:
            return None
        return _Address(match["name"], match["revision"], None)
    if scheme in ("hf", "hf-hub", "hf_hub"):
        match = _PATH.fullmatch(rest.removeprefix("//"))
        kind = rest.removeprefix("//").partition("/")[0]
    elif scheme in ("http", "https"):
        parts = urlsplit(text)
        hubs = {
            urlsplit(constants.ENDPOINT).netloc,
            "huggingface.co",
            "www.huggingface.co",
            "hf.co",
        }
        if parts.netloc not in hubs:
            raise CheckpointError(
                f"{harmless(text)} is an address of {parts.hostname}, which is not the Hub; pass a "
                "Hub id such as "
                "'google/siglip-base-patch16-224', or set HF_ENDPOINT where it is a mirror"
            )
        path = parts.path
        if parts.netloc == urlsplit(constants.ENDPOINT).netloc:
            path = path.removeprefix(urlsplit(constants.ENDPOINT).path)
        match, kind = _PAGE.fullmatch(path), path.strip("/").partition("/")[0]
    else:
        return None
    if kind in ("datasets", "spaces", "buckets", "kernels"):
        raise CheckpointError(
            f"{harmless(text)} is one of the Hub's {kind}, and no model; pass the Hub id of a model"
        )
    if match is None:
        raise CheckpointError(
            f"{harmless(text)} names no model of the Hub; pass a Hub id such as "
            "'google/siglip-base-patch16-224'"
        )
    revision = None if match["revision"] is None else unquote(match["revision"])
    return _Address(
        match["name"], revision, None if match["file"] is None else unquote(match["file"])
    )


def find_source(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    vision_only: bool = True,
) -> Source:
    """Decides what `source` is.

    What exists on this machine is local, else what looks like a Hub id is one.

    Args:
        source: a folder, a `.safetensors` file with its `config.json` beside it, an `.npz` file, or
            a Hub id. Also `name@revision`, `hf://name@revision/file`, `hf-hub:name`, and the
            address of the Hub's page of a model or of one of its files.
        revision: of a Hub repository; like the rest, of no meaning for a local path.
        local_files_only: use the Hub's cache only, never the network.
        token: a Hub token, True for the stored one, False for none.
        cache_dir: instead of the Hub's usual cache folder.
        vision_only: of weights on the Hub, fetch the tower alone, where that is less than the file.

    Raises:
        CheckpointError: it is none of these, or a file of another format.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise CheckpointError(
            f"the source must be a path or a Hub id, got a {type(source).__name__}"
        )
    name = str(source)
    try:
        path = Path(name).expanduser()
        is_folder, is_file = (
            bool(name) and path.is_dir(),
            path.is_file(),
        )  # Path("") would be this folder
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{name!r} cannot be read: {error}") from error
    if is_folder:
        return LocalFolder(path, name)
    if is_file:
        if path.suffix not in SUFFIXES:
            raise CheckpointError(
                f"{name} is neither a .safetensors nor an .npz file; pass one, or the folder that "
                "holds the checkpoint" + pickle_advice([path.name])
            )
        return LocalFolder(path.parent, name, weights=path.name)
    if isinstance(source, str) and (address := _address(source)) is not None:
        return HubRepository(
            address.name,
            revision=_one_revision(source, address.revision, revision),
            local_files_only=local_files_only,
            token=token,
            cache_dir=cache_dir,
            vision_only=vision_only,
            weights=_weights_of(source, address.filename),
        )
    raise CheckpointError(
        f"{name!r} does not exist on this machine, and is no Hub id such as "
        "'google/siglip-base-patch16-224'; "
        "pass a folder, a .safetensors or .npz file, or a Hub id"
    )


def _one_revision(source: str, named: str | None, wanted: str | None) -> str | None:
    if named is not None and wanted not in (None, named):
        raise CheckpointError(
            f"{harmless(source)} names the revision {named!r}, and revision={wanted!r}: pass one"
        )
    return named or wanted


def _weights_of(source: str, filename: str | None) -> str | None:
    """The weights file that an address names.

    None where it names the repository, or its configuration.
    """
    if filename is None or filename == CONFIG:
        return None
    if "/" in filename or not filename.endswith(SUFFIXES):
        raise CheckpointError(
            f"{harmless(source)} names {filename!r}; pass the repository, or a .safetensors or "
            ".npz file at its top" + pickle_advice([filename])
        )
    return filename


def no_answer(name: str, seconds: float = 10.0) -> str | None:
    """Why the Hub does not answer when asked for a repository, told within `seconds`, whatever hangs; None if it does.

    Any answer will do, a refusal too, but for a server's own errors (HTTP 500 and above).

    Args:
        name: the Hub id.
        seconds: how long to wait: for name lookup, connection and reply together.
    """
    from huggingface_hub.errors import HfHubHTTPError

    try:
        within(seconds, lambda: RemoteFile(name, CONFIG, None, None, Budget(), attempts=1))
    except HfHubHTTPError as error:
        status = error.response.status_code
        return f"HTTP {status}" if status >= 500 else None
    except Exception as error:  # Whatever goes wrong means the same.
        return HubRepository(name)._cause(CONFIG, error)
    return None
