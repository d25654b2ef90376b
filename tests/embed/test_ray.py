"""The same vectors on a Ray cluster, and by Daft."""

from __future__ import annotations

import builtins
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import daft
import numpy as np
import pytest
from pyarrow import parquet

from siglip_port import SigLipVisionModel
from siglip_port.embed.embedder import Embedder
from siglip_port.embed.inputs import find_items
from siglip_port.embed.ray import on_ray
from siglip_port.embed.run import Batch, EmbedError, Progress, embed

HOW: dict[str, Any] = {
    "form": "eager",
    "batch_size": 4,
    "shard_size": 12,
    "threads": 2,
    "workers": 0,
}


def rows(folder: Path) -> list[str]:
    return [
        repr(row)
        for path in sorted(folder.glob("part-*.parquet"))
        for row in parquet.read_table(path).to_pylist()
    ]


def test_a_cluster_of_two_workers(photos: Path, tower: Path, tmp_path: Path) -> None:
    """It goes on with what was begun here, and ends with the same bits.

    So does Ray Data with an `Embedder`.
    """

    class StopError(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.fresh >= 25:
            raise StopError

    model = SigLipVisionModel.from_hf(tower)
    whole = embed([photos], tmp_path / "here", model, **HOW)
    with pytest.raises(StopError):
        embed([photos], tmp_path / "run", model, report=stop, **HOW)
    arguments = [
        sys.executable,
        "tests/helpers/ray_cluster.py",
        str(photos),
        str(tower),
        str(tmp_path),
    ]
    subprocess.run(arguments, cwd=Path(__file__).parents[2], check=True, timeout=600)
    told = json.loads((tmp_path / "ray.json").read_text())
    assert (told["fresh"], told["failed"]) == (26, whole.failed)
    assert rows(tmp_path / "run") == rows(tmp_path / "here")
    assert re.match(
        "the Ray cluster gave up: .*died.* without --engine ray also past a picture", told["deadly"]
    )
    embedder = Embedder(tower)
    files = [str(path) for path in sorted(photos.glob("*/*"))]
    expected = embedder({"path": files})
    assert [told["embedder"][name][0] for name in files] == expected["error"].tolist()
    vectors = np.array([told["embedder"][name][1] for name in files], np.float32)
    assert np.allclose(vectors, expected["embedding"], rtol=1e-4, atol=1e-4, equal_nan=True)


def test_daft(photos: Path, tower: Path) -> None:
    embedder = Embedder(tower)
    kind = daft.DataType.embedding(daft.DataType.float32(), embedder.embedding_dim)

    @daft.func.batch(return_dtype=kind)
    def vectors(path: daft.Series) -> daft.Series:
        return daft.Series.from_numpy(embedder({"path": path.to_pylist()})["embedding"]).cast(kind)

    files = [str(path) for path in sorted(photos.glob("*/*"))]
    table = daft.from_pydict({"path": files})
    found = table.with_column("embedding", vectors(table["path"])).to_pydict()
    assert found["path"] == files
    assert np.array_equal(
        np.array(found["embedding"]), embedder({"path": files})["embedding"], equal_nan=True
    )


def test_without_ray(photos: Path, tower: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = builtins.__import__

    def absent(name: str, *arguments: Any) -> ModuleType:  # noqa: ANN401
        if name.partition(".")[0] == "ray":
            raise ImportError(name)
        return there(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", absent)
    batch = Batch(0, 0, tuple(find_items([photos])[:2]))
    with pytest.raises(EmbedError, match=r"needs Ray: pip install 'siglip-port\[ray\]'"):
        next(on_ray(Embedder(tower), [batch]))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1: "),
        ("ray://127.0.0.1:1", "no Ray cluster answers at "),
        ("127.0.0.1:99999", "no Ray cluster answers at "),
        ("here", "'here' is no address of a Ray cluster: HOST:PORT, or auto"),
    ],
)
def test_a_cluster_that_is_not_there(
    address: str, message: str, photos: Path, tower: Path, tmp_path: Path
) -> None:
    model = SigLipVisionModel.from_hf(tower)
    with pytest.raises(EmbedError, match=message):
        embed([photos], tmp_path / "out", model, engine="ray", address=address, **HOW)
