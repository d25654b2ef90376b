"""The commands `embed` and `search`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.commands import run
from tests.helpers.embedding import broken_images, readable_rows


def test_embed(photos: Path, encoder_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    arguments = [
        "embed",
        photos,
        "-o",
        output,
        "--model",
        encoder_folder,
        "--batch-size",
        8,
        "--num-workers",
        0,
    ]
    report = json.loads(run(*arguments, "--engine", "eager", "--json", code=3).stdout)
    failed = len(broken_images(photos))
    assert report["output"] == str(output)
    assert report["done"] == report["processed"] == 50
    assert report["failed"] == failed
    for phase in ("decode", "preprocess", "model", "write"):
        assert report[f"{phase}_seconds"] > 0
    (output / "part-000000.parquet").unlink()
    lines = run(*arguments, code=3).stdout.splitlines()
    assert lines[0] == f"{50 - failed} images embedded, {failed} failed (see column error)"
    assert re.fullmatch(rf"{output}: 50 new rows in [\d.]+ s \([\d.]+ images/s\)", lines[1])
    assert re.fullmatch(
        r"time: model [\d.]+ s, waiting [\d.]+ s, writing [\d.]+ s; "
        r"all workers: decoding [\d.]+ s, preprocessing [\d.]+ s",
        lines[2],
    )
    assert run(*arguments, code=3).stdout.splitlines()[1] == f"{output}: already complete"
    refused = run(*arguments, "--normalize", code=1).stderr
    assert f"{output}: existing embeddings have other settings: normalize is False" in refused


def test_embed_without_broken_images(
    photos: Path, finished_run: Path, encoder_folder: Path, tmp_path: Path
) -> None:
    image = readable_rows(finished_run)[0]
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.png").write_bytes(Path(image["path"]).read_bytes())
    options = ["--model", encoder_folder, "--engine", "eager", "--num-workers", 0]
    result = run("embed", images, "--output", tmp_path / "output", *options, code=0)
    assert result.stdout.startswith("1 image embedded\n")


def test_search(finished_run: Path) -> None:
    query = readable_rows(finished_run)[0]
    nearest = json.loads(run("search", finished_run, query["path"], "--top-k", 3, "--json").stdout)[
        "nearest"
    ]
    assert nearest[0]["id"] == query["id"]
    assert nearest[0]["cosine"] == pytest.approx(1, abs=1e-5)
    assert len(nearest) == 3
    assert run("search", finished_run, query["path"]).stdout.startswith("1.0000  ")


def test_unusable_arguments(photos: Path, encoder_folder: Path, tmp_path: Path) -> None:
    missing = run("embed", tmp_path / "no", "-o", "output", "--model", encoder_folder, code=1)
    assert "no: does not exist; pass a folder, a file or a quoted pattern" in missing.stderr
    arguments = ["embed", photos, "-o", "output", "--model", encoder_folder]
    assert (
        "--device cuda:9 is not available: " in run(*arguments, "--device", "cuda:9", code=2).output
    )
    unknown = run(*arguments, "--engine", "quick", code=2).output
    assert "eager, prepacked" in " ".join(unknown.replace("│", " ").split())
    conflicts = {
        "normalize cannot be combined with tokens": ["--tokens", "--normalize"],
        "address requires the executor ray, got 'local'": ["--address", "host:1"],
        "the engine int8 computes in int8": ["--engine", "int8", "--dtype", "bfloat16"],
    }
    for message, options in conflicts.items():
        output = run("embed", photos, "-o", tmp_path / "x", *options, code=2).output
        assert message in " ".join(output.replace("│", " ").split())
    empty = run("search", tmp_path, photos / "x.png", code=1)
    assert (
        empty.stderr == f"{tmp_path}: contains no embeddings; write them with siglip-port embed\n"
    )


def test_unknown_preprocessing(encoder_copy: Path, tmp_path: Path) -> None:
    (encoder_copy / "preprocessor_config.json").write_text(
        '{"image_processor_type": "SmolVLMImageProcessor"}'
    )
    image = tmp_path / "a.png"
    Image.new("RGB", (20, 30), "red").save(image)
    options = [image, "-o", tmp_path / "output", "--model", encoder_copy]
    for command in (["embed", "--num-workers", 0], ["plot"]):
        error = run(*command, *options, code=1).stderr
        assert "unknown (preprocessor_config.json is of SmolVLMImageProcessor)" in error
        assert "--preprocessing to the command" in error
        run(*command, *options, "--preprocessing", "siglip2", code=0)
    assert readable_rows(tmp_path / "output")
