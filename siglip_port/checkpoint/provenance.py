"""Origin of a model's weights, and the metadata that records it in saved files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from siglip_port.config import SigLipVisionConfig

# Metadata keys of saved files.
ORIGIN = "origin"  # see `Provenance.origin`
FINGERPRINT = "siglip_port_config"  # hash of the configuration, see `fingerprint`

UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


@dataclass(frozen=True)
class Evidence:
    """Where the properties of a model come from that its tensors do not show.

    Each is a file name or a rule, followed by what was assumed.

    Attributes:
        architecture: Source of the configuration, such as `config.json`.
        pooling: How the model pools, and why.
        preprocessing: Source of the `preprocessor_config.json`.
    """

    architecture: str
    pooling: str
    preprocessing: str


@dataclass(frozen=True)
class Provenance:
    """Origin of a model's weights, and a summary of loading. `print` it.

    Attributes:
        source: Hub id or path that was loaded.
        commit: Hub commit; None for a local path.
        files: Files that were read.
        layout: Recognized layout and prefix.
        evidence: Source of the architecture, the pooling and the preprocessing.
        tensors_read: Number of stored tensors of the encoder.
        bytes_read: Their size in bytes.
        bytes_total: Size in bytes of all weights files, as far as known.
        ignored: Number of ignored stored tensors by reason.
        stored_dtypes: Dtypes of the encoder's stored tensors.
        dtype: Dtype of the parameters.
        origin: Hub id and commit of the weights, `name@commit`, also of a local file that was saved
            from them; None if unknown.
    """

    source: str
    commit: str | None
    files: tuple[Path, ...]
    layout: str
    evidence: Evidence
    tensors_read: int
    bytes_read: int
    bytes_total: int
    ignored: Mapping[str, int]
    stored_dtypes: tuple[torch.dtype, ...]
    dtype: torch.dtype
    origin: str | None

    def __str__(self) -> str:
        source = self.source
        if self.commit:
            source += f" at commit {self.commit}"
        elif self.origin:
            source += f", saved from {self.origin}"
        files = ", ".join(path.name for path in self.files)
        ignored = ", ".join(f"{reason} ({count})" for reason, count in self.ignored.items())
        dtype = str(self.dtype)
        stored = ", ".join(map(str, self.stored_dtypes))
        if stored != dtype:
            dtype += f" (stored: {stored})"
        return "\n".join(
            (
                f"source   {source}",
                f"files    {files}",
                f"layout   {self.layout}",
                f"config   {self.evidence.architecture}",
                f"pooling  {self.evidence.pooling}",
                f"pixels   {self.evidence.preprocessing}",
                f"read     {self.amount_read()}, {self.tensors_read} tensors",
                f"ignored  {ignored or 'nothing'}",
                f"dtype    {dtype}",
            )
        )

    def amount_read(self) -> str:
        """Format the bytes read and the total in one unit: `1.50 of 3.25 GB`."""
        unit, name = UNITS[-1]
        for size, unit_name in UNITS:
            if self.bytes_total >= size:
                unit, name = size, unit_name
                break
        return f"{self.bytes_read / unit:.2f} of {self.bytes_total / unit:.2f} {name}"


def fingerprint(config: SigLipVisionConfig) -> str:
    """Return a hash of the fields that determine what a model computes.

    Excluded are fields that files do not store (`interpolation`), that the tensors determine
    (`pooling_head`) or that timm does not store (`attention_dropout`), and the pixels beyond the
    last whole patch of a NaFlex model.
    """
    config = replace(config, interpolation=None, pooling_head=False, attention_dropout=0.0)
    values = asdict(config)
    if config.naflex:
        values["image_size"] = config.grid_size * config.patch_size
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
