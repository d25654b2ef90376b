"""Files of a run: settings, locks, damage, and folders of other versions."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from siglip_port import SigLipVisionModel
from siglip_port.embed import EmbedError, embed
from siglip_port.embed.search import embed_query, search
from siglip_port.embed.shards import exclusive_lock
from tests.helpers.embedding import OPTIONS, read_metadata, read_rows, read_settings_file
from tests.helpers.models import counting_model, random_model

RECORDED = Path(__file__).parent / "recorded"
"""A run of format version 2, killed after its first file."""

RECORDED_VERSION_1 = Path(__file__).parent / "recorded_version_1"
"""The same run of format version 1, whose settings have no version."""

RECORDED_OPTIONS: dict[str, Any] = {
    "engine": "eager",
    "batch_size": 2,
    "shard_size": 4,
    "num_workers": 0,
    "threads": 1,
}


@pytest.fixture
def recorded_images(tmp_path: Path) -> Path:
    """Images of the recorded run; one is broken."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(10):
        Image.new("RGB", (4, 4), (25 * number, 0, 90)).save(folder / f"{number}.png")
    (folder / "3.png").write_bytes(b"no")
    return folder


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """Output folder of a complete run over the fixture `photos`; tests may change it."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- compatibility --------------------------------------------------------------------------------


def test_settings_file_is_unchanged(recorded_images: Path, tmp_path: Path) -> None:
    """Byte for byte: any other key or hash would refuse existing output folders."""
    embed([recorded_images], tmp_path / "output", counting_model(), **RECORDED_OPTIONS)
    settings = (tmp_path / "output" / "_run.json").read_text()
    assert settings == (RECORDED / "_run.json").read_text()


def test_metadata_is_unchanged(recorded_images: Path, tmp_path: Path) -> None:
    embed([recorded_images], tmp_path / "output", counting_model(), **RECORDED_OPTIONS)
    name = "part-000000.parquet"
    recorded = parquet.read_schema(RECORDED / name)
    schema = parquet.read_schema(tmp_path / "output" / name)
    assert schema == recorded
    metadata = read_metadata(tmp_path / "output" / name)
    expected = read_metadata(RECORDED / name)
    assert metadata["version"] == 2
    assert list(metadata) == list(expected)
    assert list(metadata.pop("versions")) == list(expected.pop("versions"))
    assert metadata == expected


def test_resume_recorded_run(recorded_images: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(RECORDED, tmp_path / "output"))
    summary = embed([recorded_images], output, counting_model(), **RECORDED_OPTIONS)
    assert (summary.processed, summary.done, summary.failed) == (6, 10, 1)
    name = "part-000000.parquet"
    assert (output / name).read_bytes() == (RECORDED / name).read_bytes()
    embed([recorded_images], tmp_path / "whole", counting_model(), **RECORDED_OPTIONS)
    for row, expected in zip(read_rows(output), read_rows(tmp_path / "whole"), strict=True):
        # The text of an error may change between versions.
        assert (row["id"], bool(row["error"])) == (expected["id"], bool(expected["error"]))
        close = np.allclose(row["embedding"], expected["embedding"], atol=1e-5, equal_nan=True)
        assert close


def test_earlier_version_is_refused(recorded_images: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(RECORDED_VERSION_1, tmp_path / "output"))
    before = contents(output)
    message = (
        f"{output}: embeddings were written by an earlier version of siglip-port; use that "
        "version, or write to another folder"
    )
    with pytest.raises(EmbedError, match=f"^{re.escape(message)}$"):
        embed([recorded_images], output, counting_model(), **RECORDED_OPTIONS)
    with pytest.raises(EmbedError, match=f"^{re.escape(message)}$"):
        embed_query(output, recorded_images / "0.png")
    with pytest.raises(EmbedError, match=f"^{re.escape(message)}$"):
        search(output, torch.ones(2))
    assert contents(output) == before


def test_later_version_is_refused(photos: Path, model: SigLipVisionModel, run: Path) -> None:
    settings = read_settings_file(run)
    (run / "_run.json").write_text(json.dumps({**settings, "version": 3}))
    message = "run: embeddings have format version 3, this siglip-port reads 2; use the version"
    with pytest.raises(EmbedError, match=message):
        embed([photos], run, model, **OPTIONS)
    with pytest.raises(EmbedError, match=message):
        search(run, torch.ones(2))
    (run / "_run.json").write_text(json.dumps({"version": 3, "fields": "others"}))
    with pytest.raises(EmbedError, match=message):
        search(run, torch.ones(2))


# --- other runs of the same folder ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 6}, "batch_size is 4, requested 6"),
        ({"normalize": True}, "normalize is False, requested True"),
        ({"engine": "prepacked"}, "engine is 'eager', requested 'prepacked'"),
        ({"backend": "torchvision"}, "preprocessing is "),
        ({"output_dtype": "float16"}, "output_dtype is 'float32', requested 'float16'"),
        ({"dtype": torch.bfloat16}, "dtype is 'float32', requested 'bfloat16'"),
    ],
)
def test_other_settings_are_refused(
    changes: dict[str, Any], message: str, photos: Path, model: SigLipVisionModel, run: Path
) -> None:
    before = contents(run)
    with pytest.raises(
        EmbedError, match=f"run: existing embeddings have other settings: .*{message}"
    ):
        embed([photos], run, model, **{**OPTIONS, **changes})
    assert contents(run) == before


def test_other_weights_or_images_are_refused(
    photos: Path, model: SigLipVisionModel, run: Path
) -> None:
    before = contents(run)
    with pytest.raises(EmbedError, match=r"existing embeddings have other settings: .*weights is "):
        embed([photos], run, random_model(seed=1), **OPTIONS)
    with pytest.raises(
        EmbedError, match=r"existing embeddings have other settings: .*num_images is 50, "
    ):
        embed([str(photos / "000" / "*.jpg")], run, model, **OPTIONS)
    assert contents(run) == before


@pytest.mark.parametrize("engine", [None, "fastest"])
def test_engine_of_earlier_run(
    engine: str | None, photos: Path, model: SigLipVisionModel, run: Path
) -> None:
    assert embed([photos], run, model, **{**OPTIONS, "engine": engine}).processed == 0


def test_two_runs_at_once(
    photos: Path, model: SigLipVisionModel, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("siglip_port.embed.shards.LOCK_SECONDS", 0.1)
    with (
        exclusive_lock(run),
        pytest.raises(EmbedError, match="run: another run is writing to it; wait for it"),
    ):
        embed([photos], run, model, **OPTIONS)


def test_settings_without_rows_are_ignored(
    photos: Path, model: SigLipVisionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("siglip_port.embed.run.run_batch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            embed([photos], tmp_path, model, **OPTIONS)
    assert (tmp_path / "_run.json").exists()
    options = {**OPTIONS, "engine": "prepacked", "normalize": True}
    assert embed([photos], tmp_path, model, **options).processed == 50
    assert read_settings_file(tmp_path)["engine"] == "prepacked"


def test_file_in_place_of_folder(photos: Path, model: SigLipVisionModel, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EmbedError, match="file: not a folder; choose another output folder"):
        embed([photos], tmp_path / "file", model, **OPTIONS)


# --- damage ---------------------------------------------------------------------------------------


def test_damaged_shard(photos: Path, model: SigLipVisionModel, run: Path) -> None:
    part = run / "part-000001.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[:100])
    message = f"{part}: damaged, or not written by siglip-port .*; delete it and run again"
    with pytest.raises(EmbedError, match=message):
        embed([photos], run, model, **OPTIONS)
    part.write_bytes((run / "part-000004.parquet").read_bytes())
    with pytest.raises(
        EmbedError, match=f"{part}: has 2 rows, expected 12; delete it and run again"
    ):
        embed([photos], run, model, **OPTIONS)
    part.unlink()
    summary = embed([photos], run, model, **OPTIONS)
    assert (summary.processed, summary.done) == (12, 50)
    assert part.read_bytes() == whole


def test_damaged_settings(photos: Path, model: SigLipVisionModel, run: Path) -> None:
    (run / "_run.json").write_text("{")
    with pytest.raises(EmbedError, match=r"_run\.json: cannot be read \("):
        embed([photos], run, model, **OPTIONS)
    (run / "_run.json").unlink()
    with pytest.raises(EmbedError, match=r"contains Parquet files but no _run\.json"):
        embed([photos], run, model, **OPTIONS)
