"""A checkpoint in a subfolder of a local folder or of a repository on the Hub."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath

from siglip_port.checkpoint.errors import CheckpointError
from siglip_port.checkpoint.formats import Header
from siglip_port.checkpoint.source import Source, subfolder_advice
from siglip_port.hub.local import LocalFolder


class Subfolder:
    """A checkpoint in a subfolder. File names are relative to the subfolder.

    Args:
        root: Local folder or repository.
        subfolder: Result of `parse_subfolder`.
        weights: Name of the weights file in the subfolder; None for the default names.
    """

    def __init__(self, root: Source, subfolder: str, weights: str | None = None) -> None:
        self.root = root
        self.name = root.name
        self.subfolder = subfolder
        self.weights = weights

    @property
    def commit(self) -> str | None:
        """Commit of a Hub repository, known after the first download; else None."""
        return self.root.commit

    @property
    def address(self) -> str:
        """Path or `hf://` address of the subfolder or its weights file."""
        address = f"{self.root.address.rstrip('/')}/{self.subfolder}"
        if isinstance(self.root, LocalFolder):
            return address
        return f"hf://{address}" if self.weights is None else f"hf://{address}/{self.weights}"

    @property
    def title(self) -> str:
        """The checkpoint in messages."""
        return f"{self.root.title.rstrip('/')}/{self.subfolder}"

    def get(self, filename: str) -> Path | None:
        """Return the local path of a file, downloaded if necessary; None if it does not exist."""
        return self.root.get(self._in_root(filename))

    def get_sibling(self, folder: str, filename: str) -> Path | None:
        """Return the local path of a file in a folder beside the subfolder, as `get`."""
        parent = PurePosixPath(self.subfolder).parent
        return self.root.get(str(parent / folder / filename))

    def header(self, filename: str) -> Header | None:
        """Read the header of a weights file; None if the file does not exist."""
        return self.root.header(self._in_root(filename))

    def local(self, filename: str) -> Path | None:
        """Return the path of a file that is already on this machine; else None."""
        return self.root.local(self._in_root(filename))

    def fetch(self, tensors: Mapping[str, Collection[str]]) -> dict[str, Path]:
        """Return local files with these tensors by weights file, downloaded if necessary."""
        in_root = {self._in_root(filename): names for filename, names in tensors.items()}
        paths = self.root.fetch(in_root)
        return {filename: paths[self._in_root(filename)] for filename in tensors}

    def listing(self) -> list[str]:
        """Return the known file names in the subfolder, for messages.

        Raises:
            CheckpointError: The subfolder does not exist.
        """
        names = self.root.listing()
        prefix = self._in_root("")
        inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        if names and not inside:
            raise no_subfolder(self.root, self.subfolder)
        return inside

    def subfolders(self) -> list[str]:
        """Return the other known subfolders of the root that contain a checkpoint's weights."""
        return [name for name in self.root.subfolders() if name != self.subfolder]

    def _in_root(self, filename: str) -> str:
        return f"{self.subfolder}/{filename}"


def parse_subfolder(subfolder: object) -> str:
    """Return a subfolder without redundant slashes and dots.

    Raises:
        CheckpointError: It is not a relative path that stays below the folder.
    """
    expected = "subfolder must be the relative path of a folder, such as 'image_encoder'"
    if not isinstance(subfolder, str):
        raise CheckpointError(f"{expected}, got {type(subfolder).__name__}")
    path = PurePosixPath(subfolder)
    if not path.parts:
        raise CheckpointError(
            f"{expected}, got {subfolder!r}; omit subfolder= for files outside of subfolders"
        )
    if path.is_absolute() or ".." in path.parts or "\\" in subfolder or "\0" in subfolder:
        raise CheckpointError(
            f"{expected}, with forward slashes and without '..', got {subfolder!r}"
        )
    return str(path)


def no_subfolder(root: Source, subfolder: str) -> CheckpointError:
    """Return the error for a subfolder that does not exist."""
    advice = subfolder_advice(root) or "; omit subfolder= if the weights are not in a subfolder"
    return CheckpointError(f"{root.title} has no folder {subfolder!r}{advice}")
