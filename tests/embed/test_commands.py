"""The commands `embed` and `search`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.commands import run
from tests.helpers.embedding import broken_images, readable_rows


def test_embed(photos: Path, encoder_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [
        "embed",
        photos,
        "-o",
        out,
        "--model",
        encoder_folder,
        "--batch-size",
        8,
        "--workers",
        0,
    ]
    report = json.loads(run(*arguments, "--form", "eager", "--json", code=3).stdout)
    assert report["done"] == report["fresh"] == 50
    assert report["failed"] == len(broken_images(photos))
    for kind in ("decoding", "preprocessing", "model", "writing"):
        assert report[kind] > 0
    assert "50 of 50 images in" in run(*arguments, code=3).stdout
    refused = run(*arguments, "--normalize", code=1).stderr
    assert "holds rows of another run: normalize was" in refused


def test_embed_without_broken_images(
    photos: Path, embedded: Path, encoder_folder: Path, tmp_path: Path
) -> None:
    image = readable_rows(embedded)[0]
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.png").write_bytes(Path(image["path"]).read_bytes())
    options = ["--model", encoder_folder, "--form", "eager", "--workers", 0]
    run("embed", images, "-o", tmp_path / "out", *options, code=0)


def test_search(embedded: Path) -> None:
    query = readable_rows(embedded)[0]
    nearest = json.loads(run("search", embedded, query["path"], "-k", 3, "--json").stdout)[
        "nearest"
    ]
    assert nearest[0]["id"] == query["id"]
    assert nearest[0]["cosine"] == pytest.approx(1, abs=1e-5)
    assert len(nearest) == 3
    assert run("search", embedded, query["path"]).stdout.startswith("1.0000  ")


def test_unusable_arguments(photos: Path, encoder_folder: Path, tmp_path: Path) -> None:
    missing = run("embed", tmp_path / "no", "-o", "out", "--model", encoder_folder, code=1)
    assert "does not exist" in missing.stderr
    arguments = ["embed", photos, "-o", "out", "--model", encoder_folder]
    assert "cannot be used here" in run(*arguments, "--device", "cuda:9", code=2).output
    unknown = run(*arguments, "--form", "quick", code=2).output
    assert "'quick' is none of eager, packed" in " ".join(unknown.replace("│", " ").split())
    assert "holds no vectors" in run("search", tmp_path, photos / "x.png", code=1).stderr
