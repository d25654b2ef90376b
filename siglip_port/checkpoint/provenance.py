"""Where a model's weights come from, and what files written here say of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from siglip_port.config import SigLipVisionConfig

# Keys of the metadata of files written here.
ORIGIN = "origin"  # see `Provenance.origin`
FINGERPRINT = "siglip_port_config"  # of the configuration that belongs to them: see `fingerprint`

UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


@dataclass(frozen=True)
class Provenance:
    """Where a model's weights come from, and what was made of the file. `print` it.

    Attributes:
        source: the Hub id or path that was asked for.
        commit: the Hub commit, or None for a local path.
        files: the files that were read.
        layout: the layout that was recognized.
        tensors_read: number of stored tensors that make up the encoder.
        bytes_read: their size in the files.
        bytes_whole: the size of all weights files, as far as the source tells.
        dropped: number of stored tensors left unread, by reason.
        stored_dtypes: the dtypes of the encoder's tensors in the file.
        dtype: the dtype they were loaded in.
        origin: the Hub id and commit of the weights, `name@commit`; of a local file, where a file
            that was written here says so; else None.
    """

    source: str
    commit: str | None
    files: tuple[Path, ...]
    layout: str
    tensors_read: int
    bytes_read: int
    bytes_whole: int
    dropped: Mapping[str, int]
    stored_dtypes: tuple[torch.dtype, ...]
    dtype: torch.dtype
    origin: str | None

    def __str__(self) -> str:
        source = self.source
        if self.commit:
            source += f" at commit {self.commit}"
        elif self.origin:
            source += f", made from {self.origin}"
        files = ", ".join(path.name for path in self.files)
        dropped = "; ".join(f"{count} of the {reason}" for reason, count in self.dropped.items())
        dtype = str(self.dtype)
        stored = ", ".join(map(str, self.stored_dtypes))
        if stored != dtype:
            dtype += f" (stored: {stored})"
        return "\n".join(
            (
                f"source   {source}",
                f"files    {files}",
                f"layout   {self.layout}",
                f"read     {self.amount_read()}, {self.tensors_read} tensors",
                f"dropped  {dropped or 'nothing'}",
                f"dtype    {dtype}",
            )
        )

    def amount_read(self) -> str:
        """Write the bytes that were read and those of all files in one unit: `1.50 of 3.25 GB`."""
        unit, name = UNITS[-1]
        for size, unit_name in UNITS:
            if self.bytes_whole >= size:
                unit, name = size, unit_name
                break
        return f"{self.bytes_read / unit:.2f} of {self.bytes_whole / unit:.2f} {name}"


def fingerprint(config: SigLipVisionConfig) -> str:
    """Return a hash of all that a configuration says of what its model computes.

    Not of what no file says (`interpolation`), of what the tensors say better (`pooling_head`), of
    the dropout, which timm does not store, nor of pixels at the edge of a NaFlex model's image.
    """
    config = replace(config, interpolation=None, pooling_head=False, attention_dropout=0.0)
    values = asdict(config)
    if config.naflex:
        values["image_size"] = config.grid_size * config.patch_size
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
