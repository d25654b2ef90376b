"""Embedding runs: their rows, interruptions and errors."""

from __future__ import annotations

import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from siglip_port import OptimizedModel, SigLipVisionModel, atomic, optimize
from siglip_port.checkpoint import default_preprocessor_config
from siglip_port.embed import EmbedError, Progress, embed
from siglip_port.extras import MissingExtraError
from siglip_port.image_processing import ImageProcessor
from tests.helpers.checkpoints import SMALL
from tests.helpers.embedding import (
    OPTIONS,
    broken_images,
    image_names,
    read_column,
    read_metadata,
    read_rows,
    read_settings_file,
    readable_rows,
    row_texts,
)
from tests.helpers.models import random_model
from tests.helpers.processes import embed_until


class StopError(Exception):
    """Ends a run."""


def stop_after_16(progress: Progress) -> None:
    if progress.processed >= 16:
        raise StopError


# --- the rows -------------------------------------------------------------------------------------


def test_row_per_image(photos: Path, model: SigLipVisionModel, tmp_path: Path) -> None:
    summary = embed([photos], tmp_path, model, **OPTIONS)
    rows = read_rows(tmp_path)
    broken = broken_images(photos)
    assert read_column(tmp_path, "id") == image_names(photos)
    assert {row["id"] for row in rows if row["error"]} == set(broken)
    assert (summary.done, summary.total, summary.processed, summary.failed) == (
        50,
        50,
        50,
        len(broken),
    )
    files = [f"part-{number:06}.parquet" for number in range(5)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "_run.json", *files]


def test_row_of_image(photos: Path, finished_run: Path, model: SigLipVisionModel) -> None:
    processor = ImageProcessor.from_config(model.preprocessor_config)
    for row in read_rows(finished_run):
        path = photos / row["id"]
        assert row["path"] == str(path)
        if row["error"]:
            assert row["width"] is row["height"] is None
            assert np.isnan(row["embedding"]).all()
            assert row["error"].startswith("the image cannot be read: ")
            continue
        with torch.inference_mode():
            expected = model.embed(**processor(path))[0]
        assert torch.allclose(torch.tensor(row["embedding"]), expected, rtol=1e-4, atol=1e-4)
        with Image.open(path) as image:
            assert {row["width"], row["height"]} == set(image.size)


def test_file_metadata(
    photos: Path, encoder_folder: Path, model: SigLipVisionModel, tmp_path: Path
) -> None:
    embed([photos], tmp_path, model, output_dtype="float16", normalize=True, **OPTIONS)
    file = parquet.ParquetFile(tmp_path / "part-000001.parquet")
    column = file.schema_arrow.field("embedding")
    assert str(column.type) == f"fixed_size_list<element: halffloat>[{SMALL.embed_dim}]"
    metadata = read_metadata(tmp_path / "part-000001.parquet")
    assert (metadata["source"], metadata["commit"], metadata["dtype"]) == (
        str(encoder_folder),
        None,
        "float32",
    )
    assert (metadata["normalize"], metadata["output_dtype"], metadata["tokens"]) == (
        True,
        "float16",
        False,
    )
    processor = ImageProcessor.from_config(model.preprocessor_config)
    assert metadata["preprocessing"] == processor.fingerprint
    assert metadata["failed"] == 12 - file.read().column("error").null_count
    assert torch.__version__.startswith(metadata["versions"]["torch"])
    vectors = [row["embedding"] for row in readable_rows(tmp_path)]
    assert np.allclose(np.linalg.norm(np.array(vectors, dtype=float), axis=1), 1, atol=1e-2)


@pytest.mark.parametrize("library", ["pandas", "polars", "duckdb"])
def test_other_library_reads_rows(library: str, finished_run: Path) -> None:
    other = pytest.importorskip(library)
    if library == "duckdb":
        query = (
            f"select id, embedding from read_parquet('{finished_run}/part-*.parquet') "
            "where error is null order by id"
        )
        rows = other.sql(query).fetchall()
    elif library == "polars":
        table = other.read_parquet(finished_run / "part-*.parquet").filter(
            other.col("error").is_null()
        )
        rows = list(zip(table["id"].to_list(), table["embedding"].to_list(), strict=True))
    else:
        table = other.read_parquet(finished_run)  # the folder, by pyarrow
        table = table[table["error"].isna()]
        rows = list(zip(table["id"], table["embedding"], strict=True))
    for (name, vector), row in zip(rows, readable_rows(finished_run), strict=True):
        assert name == row["id"]
        assert list(vector) == row["embedding"]


def test_arrays_beside_parquet_files(
    photos: Path, finished_run: Path, model: SigLipVisionModel, tmp_path: Path
) -> None:
    embed([photos], tmp_path, model, format="npy", **OPTIONS)
    parts = sorted(tmp_path.glob("part-*"))
    names = [f"part-{number:06}.{kind}" for number in range(5) for kind in ("npy", "parquet")]
    assert [path.name for path in parts] == names
    vectors = np.concatenate([np.load(path) for path in parts[::2]])
    expected = read_rows(finished_run)
    expected_vectors = np.array([row.pop("embedding") for row in expected], np.float32)
    assert vectors.dtype == np.float32
    assert np.array_equal(vectors, expected_vectors, equal_nan=True)
    assert read_rows(tmp_path) == expected
    (tmp_path / "part-000001.npy").unlink()
    assert embed([photos], tmp_path, model, format="npy", **OPTIONS).processed == 12


def test_shards_hold_whole_batches(photos: Path, model: SigLipVisionModel, tmp_path: Path) -> None:
    embed([photos], tmp_path, model, **{**OPTIONS, "shard_size": 18})
    shards = sorted(tmp_path.glob("part-*"))
    assert [parquet.read_metadata(path).num_rows for path in shards] == [20, 20, 10]


def test_tokens(photos: Path, model: SigLipVisionModel, tmp_path: Path) -> None:
    embed([photos], tmp_path, model, tokens=True, **OPTIONS)
    row = readable_rows(tmp_path)[0]
    processor = ImageProcessor.from_config(model.preprocessor_config)
    with torch.inference_mode():
        tokens = model(**processor(row["path"]))[0]
    stored = torch.tensor(row["embedding"]).reshape(tokens.shape)
    assert torch.allclose(stored, tokens, rtol=1e-4, atol=1e-4)


def test_nan_embedding_is_error(photos: Path, tmp_path: Path) -> None:
    model = SigLipVisionModel(SMALL).eval()
    with torch.no_grad():
        model.transformer.post_layernorm.bias[0] = torch.nan
    summary = embed([photos], tmp_path, model, **OPTIONS)
    assert summary.failed == 50
    assert "the model returned NaN or Inf" in read_column(tmp_path, "error")


@pytest.mark.parametrize("naflex", [False, True])
def test_image_of_wrong_size_without_resizing(naflex: bool, tmp_path: Path) -> None:
    model = random_model(replace(SMALL, naflex=naflex))
    model.preprocessor_config = {**default_preprocessor_config(model.config), "do_resize": False}
    folder = tmp_path / "in"
    folder.mkdir()
    for number, size in enumerate([(16, 16), (40, 61), (16, 16), (2, 3)]):
        Image.new("RGB", size, (number, 90, 9)).save(folder / f"{number}.png")
    embed([folder], tmp_path / "out", model, **OPTIONS)
    errors = read_column(tmp_path / "out", "error")
    assert list(map(bool, errors)) == [False, True, False, True]
    if not naflex:
        assert (
            errors[1] == "image must have shape [3, 16, 16] if do_resize is false, got [3, 61, 40]"
        )


# --- engines --------------------------------------------------------------------------------------


def test_fastest_engine(
    photos: Path, model: SigLipVisionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def choose(*_: object, batch_size: int, dtype: object) -> OptimizedModel:
        assert (batch_size, dtype) == (4, None)
        fast = optimize(model, engines=[])
        fast.choice = replace(fast.choice, engine="prepacked")
        return fast

    monkeypatch.setattr("siglip_port.embed.run.optimize", choose)
    embed([photos], tmp_path / "fastest", model, **{**OPTIONS, "engine": "fastest"})
    assert read_settings_file(tmp_path / "fastest")["engine"] == "prepacked"
    embed([photos], tmp_path / "default", model, **{**OPTIONS, "engine": None})
    assert read_settings_file(tmp_path / "default")["engine"] == "eager"


def test_int8(photos: Path, finished_run: Path, model: SigLipVisionModel, tmp_path: Path) -> None:
    embed([photos], tmp_path, model, **{**OPTIONS, "engine": "int8"})
    assert read_settings_file(tmp_path)["dtype"] == "int8"
    largest = 0.0
    for row, expected in zip(read_rows(tmp_path), read_rows(finished_run), strict=True):
        if not expected["error"]:
            difference = np.abs(np.subtract(row["embedding"], expected["embedding"])).max()
            largest = max(largest, difference)
    assert 0 < largest < 1


def test_unavailable_engine(photos: Path, model: SigLipVisionModel, tmp_path: Path) -> None:
    """The run fails before anything is written."""
    options = {**OPTIONS, "engine": "onnxruntime", "dtype": torch.bfloat16}
    message = "engine onnxruntime is not available: .*float32.*; choose another, or eager"
    with pytest.raises(EmbedError, match=message):
        embed([photos], tmp_path / "out", model, **options)
    assert not (tmp_path / "out").exists()


# --- interruptions --------------------------------------------------------------------------------


@pytest.mark.parametrize("naflex", [False, True])
def test_embeddings_do_not_depend_on_workers_or_interruptions(
    naflex: bool, photos: Path, tmp_path: Path
) -> None:
    """A run that is stopped repeatedly gives the same bits as an uninterrupted one."""
    model = random_model(replace(SMALL, naflex=naflex))
    embed([photos], tmp_path / "whole", model, **OPTIONS)
    embed([photos], tmp_path / "workers", model, **{**OPTIONS, "num_workers": 2})
    assert row_texts(tmp_path / "workers") == row_texts(tmp_path / "whole")
    attempts = 0
    summary = None
    while summary is None:
        attempts += 1
        assert attempts <= 50
        try:
            summary = embed(
                [photos], tmp_path / "parts", model, on_progress=stop_after_16, **OPTIONS
            )
        except StopError:
            continue
    assert attempts >= 3
    assert summary.done == 50
    assert row_texts(tmp_path / "parts") == row_texts(tmp_path / "whole")


def check_resumes(
    photos: Path, model: SigLipVisionModel, folder: Path, expected: Path, unfinished: bool = True
) -> None:
    """Check that files are complete, and that the same call finishes the run and cleans up."""
    parts = list(folder.glob("part-*.parquet"))
    assert not unfinished or len(parts) < 5
    for path in parts:
        assert parquet.read_metadata(path).num_rows == 12
    embed([photos], folder, model, **OPTIONS)
    assert row_texts(folder) == row_texts(expected)
    assert not list(folder.glob(f"{atomic.STAGING_PREFIX}*"))


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_resume_after_signal(
    kind: signal.Signals,
    photos: Path,
    encoder_folder: Path,
    finished_run: Path,
    model: SigLipVisionModel,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    assert embed_until(24, kind, [photos, out, encoder_folder]) == -kind
    check_resumes(photos, model, out, finished_run)


@pytest.mark.slow
def test_resume_after_many_kills(
    photos: Path, encoder_folder: Path, finished_run: Path, model: SigLipVisionModel, tmp_path: Path
) -> None:
    """One run, killed at many points, some of them during a write."""
    out = tmp_path / "out"
    for number, rows in enumerate(range(4, 48, 4)):
        delay = None if number % 3 == 0 else 0.002 * number
        assert (
            embed_until(rows, signal.SIGKILL, [photos, out, encoder_folder], delay)
            == -signal.SIGKILL
        )
        copy = tmp_path / f"copy{number}"
        shutil.copytree(out, copy)
        check_resumes(photos, model, copy, finished_run, unfinished=False)


def test_full_disk(
    photos: Path, model: SigLipVisionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_table = parquet.write_table
    written: list[Path] = []

    def write_two(table: pa.Table, path: Path) -> None:
        write_table(table, path)
        written.append(path)
        if len(written) > 2:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(parquet, "write_table", write_two)
        message = r"cannot be written to \(No space left on device\); complete files are kept"
        with pytest.raises(EmbedError, match=message):
            embed([photos], tmp_path, model, **OPTIONS)
    assert len(list(tmp_path.glob("part-*.parquet"))) == 2
    assert not list(tmp_path.glob(f"{atomic.STAGING_PREFIX}*"))
    assert embed([photos], tmp_path, model, **OPTIONS).processed == 26


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a positive integer, got 0"),
        ({"num_workers": -1}, "num_workers must be a non-negative integer, got -1"),
        ({"threads": 0}, "threads must be a positive integer, got 0"),
        ({"shard_size": True}, "shard_size must be"),
        ({"tokens": "both"}, "tokens must be True or False, got 'both'"),
        ({"tokens": True, "normalize": True}, "normalize cannot be combined with tokens"),
        ({"engine": "fast"}, "engine must be one of eager, prepacked,"),
        ({"address": "auto"}, "address requires the executor ray, got 'local'"),
        ({"executor": "spark"}, "executor must be one of local, ray, got 'spark'"),
        ({"format": "csv"}, "format must be one of parquet, npy, got 'csv'"),
    ],
)
def test_wrong_option(
    options: dict[str, Any], message: str, photos: Path, model: SigLipVisionModel, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        embed([photos], tmp_path / "out", model, **{**OPTIONS, **options})
    assert not (tmp_path / "out").exists()


def test_unsupported_model(photos: Path, tmp_path: Path) -> None:
    headless = SigLipVisionModel(replace(SMALL, pooling_head=False)).eval()
    with pytest.raises(ValueError, match=r"no pooled embedding; pass tokens=True$"):
        embed([photos], tmp_path / "out", headless, **OPTIONS)
    wrong: Any = "model"
    with pytest.raises(ValueError, match="model must be a SigLipVisionModel, got str"):
        embed([photos], tmp_path / "out", wrong, **OPTIONS)


def test_torchvision_missing(
    photos: Path, model: SigLipVisionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(MissingExtraError, match="torchvision is not installed"):
        embed([photos], tmp_path / "out", model, **OPTIONS, backend="torchvision")
    assert not (tmp_path / "out").exists()
