"""Sources of checkpoint files, and the names of these files."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Protocol

from siglip_port.checkpoint.formats import PICKLES_REFUSED, Header

CONFIG = "config.json"
OPEN_CLIP_CONFIG = "open_clip_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHTS_FILES = (WEIGHTS, INDEX, "open_clip_model.safetensors")
MAX_SUBFOLDERS_SHOWN = 12
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Source(Protocol):
    """The files of one checkpoint, local or on the Hub: see `siglip_port.hub`.

    Attributes:
        name: Path or Hub id that the user passed.
        address: Text that `siglip_port.hub.find_source` resolves to the same files; without the
            revision.
        title: Name for messages, with the revision if the user passed one.
        weights: Name of the weights file if the user passed one; else None.
    """

    name: str
    weights: str | None

    @property
    def commit(self) -> str | None:
        """Commit of a Hub repository, known after the first download; else None."""

    @property
    def address(self) -> str:
        """Path, Hub id or `hf://` address."""

    @property
    def title(self) -> str:
        """Name for messages."""

    def get(self, filename: str) -> Path | None:
        """Return the local path of a file, downloaded if necessary; None if it does not exist."""

    def get_sibling(self, folder: str, filename: str) -> Path | None:
        """Return the local path of a file in a folder beside this one; None if there is none.

        Nothing is beside the root of a repository.
        """

    def header(self, filename: str) -> Header | None:
        """Read the header of a weights file; None if the file does not exist."""

    def local(self, filename: str) -> Path | None:
        """Return the path of a file that is already on this machine; else None."""

    def fetch(self, tensors: Mapping[str, Collection[str]]) -> dict[str, Path]:
        """Download tensors if necessary.

        Args:
            tensors: Names of tensors by weights file.

        Returns:
            By weights file, the path of a local file that contains its tensors.
        """

    def listing(self) -> list[str]:
        """Return the known file names of the source, for messages."""

    def subfolders(self) -> list[str]:
        """Return the known subfolders that contain a checkpoint's weights, for messages."""


def pickle_advice(filenames: Iterable[str]) -> str:
    """Return why pickled weights are refused and what to do; empty if there are none."""
    pickles = [name for name in filenames if name.endswith(PICKLE_SUFFIXES)]
    if not pickles:
        return ""
    return f"; pickled weights ({', '.join(pickles)}) are not supported: {PICKLES_REFUSED}"


def subfolder_advice(source: Source) -> str:
    """Return which `subfolder=` to pass; empty if no subfolder contains a checkpoint's weights."""
    names = source.subfolders()
    if not names:
        return ""
    if len(names) == 1:
        return f"; weights are in its folder {names[0]}: pass subfolder={names[0]!r}"
    shown = ", ".join(names[:MAX_SUBFOLDERS_SHOWN])
    return f"; weights are in its folders {shown}: pass one of them as subfolder="


def parents_of_weights(filenames: Iterable[str]) -> list[str]:
    """Return the subfolders that contain one of `WEIGHTS_FILES`, from names in a repository."""
    folders = set()
    for filename in filenames:
        folder, _, name = filename.rpartition("/")
        if folder and name in WEIGHTS_FILES:
            folders.add(folder)
    return sorted(folders)
