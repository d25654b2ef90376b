"""Shared by the tests of embedding runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pyarrow import parquet

from siglip_port.embed.shards import METADATA_KEY

OPTIONS: dict[str, Any] = {"engine": "eager", "batch_size": 4, "shard_size": 12, "num_workers": 0}
"""Options of `embed`: the 50 images of the fixture `photos` are 13 batches in 5 files."""


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Read all rows of a run."""
    rows = []
    for path in sorted(folder.glob("part-*.parquet")):
        rows += parquet.read_table(path).to_pylist()
    return rows


def readable_rows(folder: Path) -> list[dict[str, Any]]:
    """Read the rows without an error."""
    return [row for row in read_rows(folder) if not row["error"]]


def read_column(folder: Path, name: str) -> list[Any]:
    """Read one column of all rows."""
    return [row[name] for row in read_rows(folder)]


def row_texts(folder: Path) -> list[str]:
    """Read all rows of a run as text, which compares NaN as equal."""
    return [repr(row) for row in read_rows(folder)]


def read_settings_file(folder: Path) -> dict[str, Any]:
    """Read the settings of a run."""
    settings: dict[str, Any] = json.loads((folder / "_run.json").read_text())
    return settings


def read_metadata(path: Path) -> dict[str, Any]:
    """Read the siglip_port metadata of a shard."""
    metadata: dict[str, Any] = json.loads(parquet.read_schema(path).metadata[METADATA_KEY])
    return metadata


def image_names(photos: Path) -> list[str]:
    """List the ids of the images of the fixture `photos`, in the order of a run."""
    return sorted(path.relative_to(photos).as_posix() for path in photos.glob("*/*"))


def image_paths(photos: Path) -> list[str]:
    """List the paths of the images of the fixture `photos`, in the same order."""
    return [str(photos / name) for name in image_names(photos)]


def broken_images(photos: Path) -> dict[str, str]:
    """Return the broken images of the fixture `photos`: id -> kind of damage."""
    return dict(json.loads((photos / "broken.json").read_text()))
