"""Where a checkpoint's bytes come from: a folder, a file in a folder, or a repository of the HuggingFace Hub."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from siglip_port import towers
from siglip_port.checkpoint import (
    CONFIG,
    PICKLE_SUFFIXES,
    CheckpointError,
    HubUnreachableError,
    Source,
    header_of,
    pickle_advice,
)
from siglip_port.files import LONGEST_JSON, SUFFIXES, Header, UnreadableFileError
from siglip_port.ranges import GivenUpError, NoRangesError, RemoteFile, patiently

_COMMIT = re.compile(r"[0-9a-f]{40}")
_OURS = ".siglip_port"  # a folder in a repository's folder of the cache: see `siglip_port.towers`
_MOST = 0.8  # of a file: a tower that is more of it is not worth a copy of its own, which nobody else can use

_FILE_SUFFIXES = (*SUFFIXES, ".json", *PICKLE_SUFFIXES)


class LocalFolder:
    """A checkpoint in a folder of this machine. Never touches the network."""

    def __init__(self, folder: Path, name: str, weights: str | None = None) -> None:
        self.folder, self.name, self.weights = folder, name, weights
        self.commit: str | None = None

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
        return None if path is None else header_of(path)

    def local(self, filename: str) -> Path | None:
        """As `get`: all of it is here."""
        return self.get(filename)

    def fetch(self, wanted: Mapping[str, Collection[str]]) -> dict[str, Path]:
        """Returns where the weights files are."""
        return {filename: self.folder / filename for filename in wanted}

    def listing(self) -> list[str]:
        """Returns the names of the files in the folder."""
        return sorted(path.name for path in self.folder.iterdir() if path.is_file())


class HubRepository:
    """A checkpoint in a model repository of the Hub, through `huggingface_hub`: its cache, variables and login.

    Once the first file has told the commit, all others are taken from that commit, so that a push between two
    requests cannot mix two versions.

    Args:
        name: the Hub id.
        revision: branch, tag or commit.
        local_files_only: use the cache only, never the network.
        token: a Hub token, True for the stored one, False for none.
        cache_dir: instead of the Hub's usual cache folder.
        vision_only: of weights that the cache has not got, read the headers and fetch the tower alone.
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
    ) -> None:
        self.name, self.revision, self.local_files_only = name, revision, local_files_only
        self.token, self.cache_dir = token, None if cache_dir is None else Path(cache_dir)
        self.vision_only = vision_only
        self.commit: str | None = None
        self.weights: str | None = None
        self._headers: dict[str, tuple[Header, str]] = {}  # by file, of those not fetched as a whole: with the etag
        self._files: dict[str, RemoteFile] = {}  # that have been asked for

    def get(self, filename: str) -> Path | None:
        """Fetches the file into the cache, or finds it there; None where the repository has no such file.

        Raises:
            HubUnreachableError: the file is not cached, and the Hub cannot be reached or may not be asked.
            CheckpointError: the Hub refuses, or the file cannot be stored.
        """
        # Imported here: a fifth of a second that a local checkpoint does not need.
        from huggingface_hub import _CACHED_NO_EXIST
        from huggingface_hub.errors import RemoteEntryNotFoundError

        known = self._known(filename)
        if (self._offline or self._commit()) and known is _CACHED_NO_EXIST:
            return None
        try:
            with self._in_plain_words(filename):
                if known is None and not self._offline:
                    self._reach(filename)
                path = self._download(filename, local_files_only=self.local_files_only)
                self.commit = path.parent.name  # .../snapshots/<commit>/<filename>
                self._verify(path, fresh=str(path) != known)
        except RemoteEntryNotFoundError:
            return None
        return path

    def header(self, filename: str) -> Header | None:
        """Reads which tensors a weights file holds; None where there is no such file.

        Raises:
            CheckpointError: as `get` does; or the file is damaged.
        """
        if self.vision_only and not self.local(filename):
            if self._kept(filename):
                return self._headers[filename][0]
            if not self._offline:
                with contextlib.suppress(NoRangesError):
                    return self._remote_header(filename)
        path = self.get(filename)
        return None if path is None else header_of(path)

    def fetch(self, wanted: Mapping[str, Collection[str]]) -> dict[str, Path]:
        """Fetches tensors, or finds them in the cache.

        The tower alone, where it is the lesser part of files that are not in the cache and can be read in parts.

        Args:
            wanted: the names of the tensors, by weights file.

        Returns:
            By weights file, a file on this machine that holds these tensors, and perhaps others.

        Raises:
            CheckpointError: as `get` does.
        """
        whole = {filename: path for filename in wanted if (path := self.local(filename)) is not None}
        if self.vision_only and len(whole) < len(wanted):
            with self._in_plain_words(" and ".join(wanted)), contextlib.suppress(NoRangesError):
                if (tower := self._tower(wanted)) is not None:
                    return dict.fromkeys(wanted, tower)
        for filename in wanted.keys() - whole.keys():
            if (path := self.get(filename)) is None:
                raise CheckpointError(f"{self.name} has no file {filename}")
            whole[filename] = path
        return whole

    def local(self, filename: str) -> Path | None:
        """Returns the path of the file, where the cache has it whole; without asking the Hub."""
        path = self._known(filename)
        return Path(path) if isinstance(path, str) else None

    @property
    def _offline(self) -> bool:
        from huggingface_hub import constants

        return self.local_files_only or constants.HF_HUB_OFFLINE

    def _known(self, filename: str) -> object:
        """What the cache knows of the file: its path, that there is no such file, or nothing (None)."""
        from huggingface_hub import try_to_load_from_cache

        with self._in_plain_words(filename):
            return try_to_load_from_cache(self.name, filename, self.cache_dir, self.commit or self.revision)

    @property
    def _folder(self) -> Path:
        """Where the repository is in the Hub's cache."""
        from huggingface_hub import constants

        return Path(self.cache_dir or constants.HF_HUB_CACHE).expanduser() / f"models--{self.name.replace('/', '--')}"

    def _commit(self) -> str | None:
        """The commit, where it is known without asking the Hub: told by a file, or demanded; offline, what was last."""
        if self.commit is None and self.revision is not None and _COMMIT.fullmatch(self.revision):
            return self.revision
        if self.commit is None and self._offline:
            with contextlib.suppress(OSError, ValueError):
                last = (self._folder / "refs" / (self.revision or "main")).read_text(encoding="ascii")
                return last if _COMMIT.fullmatch(last) else None
        return self.commit

    def _download(self, filename: str, *, local_files_only: bool = False, force_download: bool = False) -> Path:
        """The client's `hf_hub_download`, with patience: by itself it gives up at the first connection that breaks."""
        from huggingface_hub import hf_hub_download, hf_hub_url

        revision = self.commit or self.revision

        def download() -> str:
            return hf_hub_download(
                self.name,
                filename,
                revision=revision,
                local_files_only=local_files_only,
                force_download=force_download,
                token=self.token,
                cache_dir=self.cache_dir,
            )

        if self._offline:
            return Path(download())
        return Path(patiently(download, hf_hub_url(self.name, filename, revision=revision)))

    def _reach(self, filename: str) -> None:
        """Asks for a file's size before it is fetched: tells soon when nobody answers, and refuses what is no JSON."""
        from huggingface_hub.errors import RemoteEntryNotFoundError

        with contextlib.suppress(RemoteEntryNotFoundError, NoRangesError):
            file = self._open(filename)
            if filename.endswith(".json") and file.size > LONGEST_JSON:
                raise CheckpointError(
                    f"{filename} of {self.name!r} has {file.size} bytes, more than the {LONGEST_JSON} that such a file "
                    "may have; it is not fetched"
                )

    def _open(self, filename: str) -> RemoteFile:
        if filename not in self._files:
            file = RemoteFile(self.name, filename, self.commit or self.revision, self.token)
            if file.commit is None or not _COMMIT.fullmatch(file.commit):
                raise NoRangesError("the Hub does not tell the commit")
            self._files[filename] = file
        return self._files[filename]

    def _verify(self, path: Path, fresh: bool) -> None:
        """Checks a file that was fetched as a whole, where the Hub has told its hash.

        What is in the cache for long is checked where that costs nothing: where it is small.

        Args:
            path: in the cache.
            fresh: whether it has just been fetched. If so, and it is not right, it is fetched again, and then removed.
        """
        if (not fresh and path.suffix != ".json") or _is_as_it_left(path):
            return
        if not fresh:
            raise CheckpointError(
                f"{path} has changed since it was fetched from the Hub: delete it, and it is fetched again; or, to "
                "keep the change, copy the checkpoint to a folder and pass that"
            )
        # Perhaps a push came between the client's two requests, for the hash and for the file: now by its commit.
        self._download(path.name, force_download=True)
        if not _is_as_it_left(path):
            blob = path.resolve()
            path.unlink(missing_ok=True)
            blob.unlink(missing_ok=True)
            raise CheckpointError(
                f"{path.name} of {self.name!r} did not arrive as it left: its hash should be {blob.name}; it has been "
                "removed: try again"
            )

    def _kept(self, filename: str) -> bool:
        """Whether the header of a file is known already."""
        if filename not in self._headers and (commit := self._commit()) is not None:
            kept = towers.kept_header(self._place_of_header(commit, filename))
            if kept is not None:
                self.commit, self._headers[filename] = commit, kept
        return filename in self._headers

    def _place_of_header(self, commit: str, filename: str) -> Path:
        return self._folder / _OURS / commit / f"{filename}.header"

    def _remote_header(self, filename: str) -> Header | None:
        """Reads the first bytes of a safetensors file, by requests for a range of it."""
        from huggingface_hub.errors import RemoteEntryNotFoundError

        try:
            with self._in_plain_words(filename):
                file = self._open(filename)
                header, content = file.header()
        except RemoteEntryNotFoundError:
            return None if self.get(filename) is None else self.header(filename)  # so that the cache learns of it
        self.commit = file.commit
        self._headers[filename] = header, file.etag
        towers.keep_header(self._place_of_header(file.commit or "", filename), file, content)
        return header

    def _tower(self, wanted: Mapping[str, Collection[str]]) -> Path | None:
        """Fetches the tower alone, or finds it in the cache; None where the whole files are to be had instead."""
        missing = [filename for filename in wanted if not self._kept(filename)]
        if missing and self._offline:
            return None
        for filename in missing:
            self._remote_header(filename)
        parts = [towers.Part(filename, *self._headers[filename], names) for filename, names in wanted.items()]
        tower = towers.Tower(self._folder / _OURS, self.name, parts)
        if tower.nbytes > _MOST * sum(part.header.size for part in parts):
            return None
        if tower.is_whole():
            return tower.path
        if self._offline:
            if tower.path.exists():
                raise CheckpointError(
                    f"{tower.path} is damaged; it is fetched again when the Hub may be asked (now: local files only)"
                )
            return None
        files = {part.filename: self._open(part.filename) for part in parts}
        if changed := [part.filename for part in parts if files[part.filename].etag != part.etag]:
            raise GivenUpError(f"{' and '.join(changed)} changed while it was read")
        tower.fetch(files, f"{self.name}, tower")
        return tower.path

    def listing(self) -> list[str]:
        """Returns the names of the files in the repository, or nothing where the Hub does not say."""
        from huggingface_hub import HfApi

        if self._offline:
            return []
        try:
            return sorted(HfApi(token=self.token).list_repo_files(self.name, revision=self.commit))
        except Exception:  # It only adds to a message about another fault.
            return []

    @contextmanager
    def _in_plain_words(self, filename: str) -> Iterator[None]:
        from huggingface_hub import constants, errors

        at = f"{self.name!r} at revision {self.revision!r}" if self.revision else f"{self.name!r}"
        try:
            yield
        except (errors.RemoteEntryNotFoundError, NoRangesError, CheckpointError):
            raise
        except GivenUpError as error:
            raise HubUnreachableError(
                f"{filename} of {at} could not be fetched: {error}; try again later, or pass a folder that holds the "
                "checkpoint (there is none of this name here: check the spelling)"
            ) from error
        except UnreadableFileError as error:
            raise CheckpointError(
                f"{filename} of {at} is not a whole safetensors file ({error}); {error.advice}"
            ) from error
        except errors.HFValidationError as error:
            raise CheckpointError(f"{self.name!r} is neither a path nor a Hub id: {error}") from error
        except errors.GatedRepoError as error:
            raise CheckpointError(
                f"{at} is gated: ask for access at {constants.ENDPOINT}/{self.name}, then log in with "
                "`hf auth login` or pass token="
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise CheckpointError(
                f"the Hub has no repository {at}; check the spelling, or, if it is private, log in with "
                "`hf auth login` or pass token="
            ) from error
        except errors.RevisionNotFoundError as error:
            raise CheckpointError(f"the Hub repository {self.name!r} has no revision {self.revision!r}") from error
        except errors.LocalEntryNotFoundError as error:
            why = "only local files were allowed" if self.local_files_only else "the Hub could not be reached"
            if isinstance(error.__cause__, errors.HfHubHTTPError):
                why = f"the Hub answered HTTP {error.__cause__.response.status_code}"
            raise HubUnreachableError(
                f"{filename} of {at} is not in the local cache, and {why}; connect once to fetch it, or pass a "
                "folder that holds the checkpoint (there is none of this name here: check the spelling)"
            ) from error
        except errors.HfHubHTTPError as error:
            raise CheckpointError(
                f"the Hub refused {filename} of {at} (HTTP {error.response.status_code}); try again later, "
                "or pass a folder that holds the checkpoint"
            ) from error
        except OSError as error:
            raise CheckpointError(f"{filename} of {at} could not be fetched: {error}") from error
        except ValueError as error:
            raise CheckpointError(
                f"{filename} of {at}: what the cache says of it makes no sense ({error}); delete {self._folder}, and "
                "it is fetched again"
            ) from error
        except Exception as error:  # The client lets its HTTP library's errors through, which have no base in common.
            raise HubUnreachableError(
                f"{filename} of {at} could not be fetched ({type(error).__name__}); try again later, or pass a folder "
                "that holds the checkpoint"
            ) from error


def _is_as_it_left(path: Path) -> bool:
    """Whether a file of the cache has the hash that its link's target is called by; True where that is no hash.

    SHA-256 of large files; of others git's own, or, from some proxies, SHA-1.
    """
    blob = path.resolve()
    with blob.open("rb") as file:
        if re.fullmatch(r"[0-9a-f]{64}", blob.name):
            return hashlib.file_digest(file, "sha256").hexdigest() == blob.name
        if not _COMMIT.fullmatch(blob.name):
            return True
        content = file.read()
    git = b"blob %d\0" % len(content) + content
    return blob.name in (hashlib.sha1(data, usedforsecurity=False).hexdigest() for data in (git, content))


def find_source(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    vision_only: bool = True,
) -> Source:
    """Decides what `source` is: what exists on this machine is local, else what looks like a Hub id is one.

    Args:
        source: a folder, a `.safetensors` file with its `config.json` beside it, an `.npz` file, or a Hub id.
        revision: of a Hub repository; like the rest, of no meaning for a local path.
        local_files_only: use the Hub's cache only, never the network.
        token: a Hub token, True for the stored one, False for none.
        cache_dir: instead of the Hub's usual cache folder.
        vision_only: of weights on the Hub, fetch the tower alone, where that is less than the file.

    Raises:
        CheckpointError: it is none of these, or a file of another format.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise CheckpointError(f"the source must be a path or a Hub id, got a {type(source).__name__}")
    name = str(source)
    try:
        path = Path(name).expanduser()
        is_folder, is_file = bool(name) and path.is_dir(), path.is_file()  # Path("") would be this folder
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{name} cannot be read: {error}") from error
    if is_folder:
        return LocalFolder(path, name)
    if is_file:
        if path.suffix not in SUFFIXES:
            raise CheckpointError(
                f"{name} is neither a .safetensors nor an .npz file; pass one, or the folder that holds the checkpoint"
                + pickle_advice([path.name])
            )
        return LocalFolder(path.parent, name, weights=path.name)
    if isinstance(source, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and path.suffix not in _FILE_SUFFIXES:
        return HubRepository(
            name,
            revision=revision,
            local_files_only=local_files_only,
            token=token,
            cache_dir=cache_dir,
            vision_only=vision_only,
        )
    raise CheckpointError(
        f"{name!r} does not exist on this machine, and is no Hub id such as 'google/siglip-base-patch16-224'; "
        "pass a folder, a .safetensors or .npz file, or a Hub id"
    )


def hub_answers(name: str, seconds: float = 10.0) -> bool:
    """Whether the Hub answers when asked for a repository, told within `seconds`, whatever hangs.

    Any answer will do, a refusal too, but for a server's own errors (HTTP 500 and above).

    Args:
        name: the Hub id.
        seconds: how long to wait: for name lookup, connection and reply together.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    answered = threading.Event()

    def ask() -> None:
        try:
            get_hf_file_metadata(hf_hub_url(name, CONFIG), timeout=seconds)
        except HfHubHTTPError as error:
            if error.response.status_code >= 500:
                return
        except Exception:  # Whatever else goes wrong means the same: no answer.
            return
        answered.set()

    # A thread, since a hanging name lookup obeys no timeout; a daemon, so that it cannot keep the process alive.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    return answered.is_set()
