"""Local checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from siglip_port.checkpoint.errors import CheckpointError
from siglip_port.checkpoint.formats import Header
from siglip_port.checkpoint.source import WEIGHTS_FILES, parents_of_weights
from siglip_port.checkpoint.weight_files import read_weights_header


@dataclass
class LocalFolder:
    """A checkpoint in a local folder. Never uses the network.

    Attributes:
        folder: Folder of the checkpoint.
        name: Path that the user passed.
        weights: Name of the weights file; None for the default names.
        commit: Always None; only Hub repositories have one.
    """

    folder: Path
    name: str
    weights: str | None = None
    commit: str | None = field(default=None, init=False)

    @property
    def address(self) -> str:
        """Path that the user passed."""
        return self.name

    @property
    def title(self) -> str:
        """The checkpoint in messages."""
        return self.name

    def get(self, filename: str) -> Path | None:
        """Return the path of a file; None if it does not exist."""
        path = self.folder / filename
        try:
            is_file = path.is_file()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error})") from error
        return path if is_file else None

    def get_sibling(self, folder: str, filename: str) -> Path | None:
        """Return the path of a file in a folder beside this one; None if it does not exist."""
        path = self.folder.absolute().parent / folder / filename
        return path if path.is_file() else None

    def header(self, filename: str) -> Header | None:
        """Read the header of a weights file; None if the file does not exist."""
        path = self.get(filename)
        return None if path is None else read_weights_header(path)

    def local(self, filename: str) -> Path | None:
        """Return the path of a file, like `get`: all files are local."""
        return self.get(filename)

    def fetch(self, tensors: Mapping[str, Collection[str]]) -> dict[str, Path]:
        """Return the paths of weights files by name."""
        return {filename: self.folder / filename for filename in tensors}

    def listing(self) -> list[str]:
        """Return the names of the files in the folder."""
        return sorted(path.name for path in self.folder.iterdir() if path.is_file())

    def subfolders(self) -> list[str]:
        """Return the folders up to two levels down that contain a checkpoint's weights."""
        paths: list[Path] = []
        for name in WEIGHTS_FILES:
            paths += self.folder.glob(f"*/{name}")
            paths += self.folder.glob(f"*/*/{name}")
        return parents_of_weights(path.relative_to(self.folder).as_posix() for path in paths)
