"""What the tests of runs over many images share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pyarrow import parquet

from siglip_port.embed.shards import METADATA_KEY

OPTIONS: dict[str, Any] = {"form": "eager", "batch_size": 4, "shard_size": 12, "workers": 0}
"""Of `embed`: 13 batches in 5 files, of the 50 images of the fixture `photos`."""


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """All rows of a run."""
    rows = []
    for path in sorted(folder.glob("part-*.parquet")):
        rows += parquet.read_table(path).to_pylist()
    return rows


def readable_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows without an error."""
    return [row for row in read_rows(folder) if not row["error"]]


def read_column(folder: Path, name: str) -> list[Any]:
    """One column of all rows."""
    return [row[name] for row in read_rows(folder)]


def row_texts(folder: Path) -> list[str]:
    """All rows of a run, for comparison: NaN is not even equal to itself."""
    return [repr(row) for row in read_rows(folder)]


def read_settings_file(folder: Path) -> dict[str, Any]:
    """The settings of a run."""
    settings: dict[str, Any] = json.loads((folder / "_run.json").read_text())
    return settings


def read_metadata(path: Path) -> dict[str, Any]:
    """What a shard tells of itself."""
    metadata: dict[str, Any] = json.loads(parquet.read_schema(path).metadata[METADATA_KEY])
    return metadata


def image_names(photos: Path) -> list[str]:
    """All images of the fixture `photos`, as a run names them."""
    return sorted(path.relative_to(photos).as_posix() for path in photos.glob("*/*"))


def image_paths(photos: Path) -> list[str]:
    """All images of the fixture `photos`, in the same order."""
    return [str(photos / name) for name in image_names(photos)]


def broken_images(photos: Path) -> dict[str, str]:
    """The broken images of the fixture `photos`, with how they are broken."""
    return dict(json.loads((photos / "broken.json").read_text()))
