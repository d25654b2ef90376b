"""Where a checkpoint's bytes come from: a folder, a file in a folder, or a repository of the HuggingFace Hub."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from siglip_port.checkpoint import (
    CONFIG,
    PICKLE_SUFFIXES,
    CheckpointError,
    HubUnreachableError,
    Source,
    header_of,
    pickle_advice,
)
from siglip_port.files import SUFFIXES, Header, Stored, nbytes

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
        headers_only: read the headers of weights files over the network, without the weights, where the cache has not
            got the file.
    """

    def __init__(
        self,
        name: str,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        headers_only: bool = False,
    ) -> None:
        self.name, self.revision, self.local_files_only = name, revision, local_files_only
        self.token, self.cache_dir = token, None if cache_dir is None else Path(cache_dir)
        self.headers_only = headers_only
        self.commit: str | None = None
        self.weights: str | None = None

    def get(self, filename: str) -> Path | None:
        """Fetches the file into the cache, or finds it there; None where the repository has no such file.

        Raises:
            HubUnreachableError: the file is not cached, and the Hub cannot be reached or may not be asked.
            CheckpointError: the Hub refuses, or the file cannot be stored.
        """
        # Imported here: a fifth of a second that a local checkpoint does not need.
        from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import RemoteEntryNotFoundError

        known = try_to_load_from_cache(self.name, filename, self.cache_dir, self.commit or self.revision)
        if self.local_files_only and known is _CACHED_NO_EXIST:
            return None
        try:
            with self._in_plain_words(filename):
                path = hf_hub_download(
                    self.name,
                    filename,
                    revision=self.commit or self.revision,
                    local_files_only=self.local_files_only,
                    token=self.token,
                    cache_dir=self.cache_dir,
                )
        except RemoteEntryNotFoundError:
            return None
        self.commit = Path(path).parent.name  # .../snapshots/<commit>/<filename>
        return Path(path)

    def header(self, filename: str) -> Header | None:
        """Reads which tensors a weights file holds; None where there is no such file.

        Raises:
            CheckpointError: as `get` does; or the file is damaged.
        """
        from huggingface_hub import constants

        offline = self.local_files_only or constants.HF_HUB_OFFLINE
        if self.headers_only and not offline and not self._is_cached(filename):
            return self._remote_header(filename)
        path = self.get(filename)
        return None if path is None else header_of(path)

    def _is_cached(self, filename: str) -> bool:
        from huggingface_hub import try_to_load_from_cache

        revision = self.commit or self.revision
        return isinstance(try_to_load_from_cache(self.name, filename, self.cache_dir, revision), str)

    def _remote_header(self, filename: str) -> Header | None:
        """Reads the first bytes of a safetensors file, by requests for a range of it."""
        from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import RemoteEntryNotFoundError

        try:
            with self._in_plain_words(filename):
                if self.commit is None:  # No other file has told it.
                    url = hf_hub_url(self.name, filename, revision=self.revision)
                    self.commit = get_hf_file_metadata(url, token=self.token).commit_hash
                revision = self.commit or self.revision
                api = HfApi(token=self.token)
                found = api.parse_safetensors_file_metadata(self.name, filename, revision=revision).tensors
                shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
                return Header(
                    {name: Stored(s, found[name].dtype, nbytes(s, found[name].dtype)) for name, s in shapes.items()}, 0
                )
        except RemoteEntryNotFoundError:
            return None

    def listing(self) -> list[str]:
        """Returns the names of the files in the repository, or nothing where the Hub does not say."""
        from huggingface_hub import HfApi

        if self.local_files_only:
            return []
        try:
            return sorted(HfApi(token=self.token).list_repo_files(self.name, revision=self.commit))
        except Exception:  # It only adds to a message about another fault.
            return []

    @contextmanager
    def _in_plain_words(self, filename: str) -> Iterator[None]:
        from huggingface_hub import errors

        at = f"{self.name!r} at revision {self.revision!r}" if self.revision else f"{self.name!r}"
        try:
            yield
        except errors.RemoteEntryNotFoundError:
            raise
        except errors.HFValidationError as error:
            raise CheckpointError(f"{self.name!r} is neither a path nor a Hub id: {error}") from error
        except errors.GatedRepoError as error:
            raise CheckpointError(
                f"{at} is gated: ask for access on its Hub page, then log in with `hf auth login` or pass token="
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
        except errors.SafetensorsParsingError as error:
            raise CheckpointError(
                f"{filename} of {at} is not a whole safetensors file ({error}); it is damaged or of another format"
            ) from error
        except errors.HfHubHTTPError as error:
            raise CheckpointError(
                f"the Hub refused {filename} of {at} (HTTP {error.response.status_code}); try again later, "
                "or pass a folder that holds the checkpoint"
            ) from error
        except OSError as error:
            raise CheckpointError(f"{filename} of {at} could not be fetched: {error}") from error
        except Exception as error:  # The client lets its HTTP library's errors through, which have no base in common.
            raise HubUnreachableError(
                f"{filename} of {at} could not be fetched ({type(error).__name__}); try again later, or pass a folder "
                "that holds the checkpoint"
            ) from error


def find_source(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    headers_only: bool = False,
) -> Source:
    """Decides what `source` is: what exists on this machine is local, else what looks like a Hub id is one.

    Args:
        source: a folder, a `.safetensors` file with its `config.json` beside it, an `.npz` file, or a Hub id.
        revision: of a Hub repository; like the rest, of no meaning for a local path.
        local_files_only: use the Hub's cache only, never the network.
        token: a Hub token, True for the stored one, False for none.
        cache_dir: instead of the Hub's usual cache folder.
        headers_only: of weights on the Hub, fetch no more than the headers; then nothing can be loaded.

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
            headers_only=headers_only,
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
