"""The files of a run: settings, locks, damage, and folders of older releases."""

from __future__ import annotations

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
from siglip_port.embed.shards import exclusive_lock
from tests.helpers.embedding import OPTIONS, read_metadata, read_rows, read_settings_file
from tests.helpers.models import counting_model, random_model

RECORDED = Path(__file__).parent / "recorded"
"""A run of release 0.1.0, killed after its first part."""

RECORDED_OPTIONS: dict[str, Any] = {
    "form": "eager",
    "batch_size": 2,
    "shard_size": 4,
    "workers": 0,
    "threads": 1,
}


@pytest.fixture
def recorded_images(tmp_path: Path) -> Path:
    """The images of the recorded run."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(10):
        Image.new("RGB", (4, 4), (25 * number, 0, 90)).save(folder / f"{number}.png")
    (folder / "3.png").write_bytes(b"no")
    return folder


@pytest.fixture
def run(embedded: Path, tmp_path: Path) -> Path:
    """A finished run of the fixture `photos`, to be changed."""
    return Path(shutil.copytree(embedded, tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- folders of older releases --------------------------------------------------------------------


def test_settings_file_is_that_of_older_releases(recorded_images: Path, tmp_path: Path) -> None:
    """Byte for byte: another key or another hash would refuse every folder that there is."""
    embed([recorded_images], tmp_path / "out", counting_model(), **RECORDED_OPTIONS)
    settings = (tmp_path / "out" / "_run.json").read_text()
    assert settings == (RECORDED / "_run.json").read_text()


def test_metadata_is_that_of_older_releases(recorded_images: Path, tmp_path: Path) -> None:
    embed([recorded_images], tmp_path / "out", counting_model(), **RECORDED_OPTIONS)
    name = "part-000000.parquet"
    recorded = parquet.read_schema(RECORDED / name)
    schema = parquet.read_schema(tmp_path / "out" / name)
    assert schema == recorded
    about = read_metadata(tmp_path / "out" / name)
    expected = read_metadata(RECORDED / name)
    assert list(about) == list(expected)
    assert list(about.pop("versions")) == list(expected.pop("versions"))
    assert about == expected


def test_resume_run_of_older_release(recorded_images: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(RECORDED, tmp_path / "out"))
    summary = embed([recorded_images], out, counting_model(), **RECORDED_OPTIONS)
    assert (summary.fresh, summary.done, summary.failed) == (6, 10, 1)
    assert (out / "part-000000.parquet").read_bytes() == contents(RECORDED)["part-000000.parquet"]
    embed([recorded_images], tmp_path / "whole", counting_model(), **RECORDED_OPTIONS)
    for row, expected in zip(read_rows(out), read_rows(tmp_path / "whole"), strict=True):
        assert (row["id"], row["error"]) == (expected["id"], expected["error"])
        close = np.allclose(row["embedding"], expected["embedding"], atol=1e-5, equal_nan=True)
        assert close


# --- other runs of the same folder ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 6}, "batch_size was 4 and would be 6"),
        ({"normalize": True}, "normalize was False and would be True"),
        ({"form": "packed"}, "form was 'eager' and would be 'packed'"),
        ({"backend": "torchvision"}, "preprocess was "),
        ({"store": "float16"}, "store was 'float32' and would be 'float16'"),
        ({"dtype": torch.bfloat16}, "dtype was 'float32' and would be 'bfloat16'"),
    ],
)
def test_other_settings_are_refused(
    changes: dict[str, Any], message: str, photos: Path, model: SigLipVisionModel, run: Path
) -> None:
    before = contents(run)
    with pytest.raises(EmbedError, match=f"holds rows of another run: .*{message}"):
        embed([photos], run, model, **{**OPTIONS, **changes})
    assert contents(run) == before


def test_other_weights_or_images_are_refused(
    photos: Path, model: SigLipVisionModel, run: Path
) -> None:
    before = contents(run)
    with pytest.raises(EmbedError, match=r"holds rows of another run: .*weights was "):
        embed([photos], run, random_model(seed=1), **OPTIONS)
    with pytest.raises(EmbedError, match=r"another run: .*images was 50 and would be "):
        embed([str(photos / "000" / "*.jpg")], run, model, **OPTIONS)
    assert contents(run) == before


@pytest.mark.parametrize("form", [None, "fastest"])
def test_engine_of_earlier_run(
    form: str | None, photos: Path, model: SigLipVisionModel, run: Path
) -> None:
    assert embed([photos], run, model, **{**OPTIONS, "form": form}).fresh == 0


def test_two_runs_at_once(
    photos: Path, model: SigLipVisionModel, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("siglip_port.embed.shards.LOCK_SECONDS", 0.1)
    with exclusive_lock(run), pytest.raises(EmbedError, match="another run is writing to"):
        embed([photos], run, model, **OPTIONS)


def test_settings_without_rows_bind_nobody(
    photos: Path, model: SigLipVisionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("siglip_port.embed.run.run_batch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            embed([photos], tmp_path, model, **OPTIONS)
    assert (tmp_path / "_run.json").exists()
    options = {**OPTIONS, "form": "packed", "normalize": True}
    assert embed([photos], tmp_path, model, **options).fresh == 50
    assert read_settings_file(tmp_path)["form"] == "packed"


def test_file_in_place_of_folder(photos: Path, model: SigLipVisionModel, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EmbedError, match="file is a file; name a folder"):
        embed([photos], tmp_path / "file", model, **OPTIONS)


# --- damage ---------------------------------------------------------------------------------------


def test_damaged_shard(photos: Path, model: SigLipVisionModel, run: Path) -> None:
    part = run / "part-000001.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[:100])
    message = f"{part} is no file of this program, or damaged: .*; delete it"
    with pytest.raises(EmbedError, match=message):
        embed([photos], run, model, **OPTIONS)
    part.write_bytes((run / "part-000004.parquet").read_bytes())
    with pytest.raises(EmbedError, match=f"{part} holds 2 rows, expected 12; delete it"):
        embed([photos], run, model, **OPTIONS)
    part.unlink()
    summary = embed([photos], run, model, **OPTIONS)
    assert (summary.fresh, summary.done) == (12, 50)
    assert part.read_bytes() == whole


def test_damaged_settings(photos: Path, model: SigLipVisionModel, run: Path) -> None:
    (run / "_run.json").write_text("{")
    with pytest.raises(EmbedError, match=r"_run\.json cannot be read"):
        embed([photos], run, model, **OPTIONS)
    (run / "_run.json").unlink()
    with pytest.raises(EmbedError, match=r"holds parquet files, but no _run\.json"):
        embed([photos], run, model, **OPTIONS)
