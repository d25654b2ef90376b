"""Where the files of a checkpoint come from, and what they are called."""

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
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Source(Protocol):
    """Something that holds the files of one checkpoint: see `siglip_port.hub`.

    Attributes:
        name: what the user called it, for provenance.
        title: the same for messages: with the revision, where one was asked for.
        weights: the name of the weights file, where the user named it; else None.
    """

    name: str
    weights: str | None

    @property
    def commit(self) -> str | None:
        """The commit of a Hub repository, once its first file has been fetched; else None."""

    @property
    def title(self) -> str:
        """What messages call it."""

    def get(self, filename: str) -> Path | None:
        """Return where the file lies on this machine, or None where the source does not hold it."""

    def header(self, filename: str) -> Header | None:
        """Read which tensors a weights file holds.

        None where the source does not hold the file.
        """

    def local(self, filename: str) -> Path | None:
        """Return where the file lies on this machine, if it does already."""

    def fetch(self, tensors: Mapping[str, Collection[str]]) -> dict[str, Path]:
        """Make tensors available: names by weights file.

        Returns, by weights file, a file that holds them.
        """

    def listing(self) -> list[str]:
        """Return the names of the files that the source holds, as far as it can tell.

        For messages.
        """


def pickle_advice(filenames: Iterable[str]) -> str:
    """Say why pickled weights are refused and what to do, where there are any among the files.

    Else nothing.
    """
    pickles = [name for name in filenames if name.endswith(PICKLE_SUFFIXES)]
    if not pickles:
        return ""
    return f". Pickled weights ({', '.join(pickles)}) are refused: {PICKLES_REFUSED}"
