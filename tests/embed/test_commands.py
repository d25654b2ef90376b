"""The commands `embed` and `search`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from siglip_port.cli import commands
from siglip_port.embed import Progress
from tests.helpers.commands import run
from tests.helpers.embedding import broken_images, readable_rows


def test_embed(photos: Path, tower: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["embed", photos, "-o", out, "--model", tower, "--batch-size", 8, "--workers", 0]
    report = json.loads(run(*arguments, "--form", "eager", "--json", code=3).stdout)
    assert report["done"] == report["fresh"] == 50
    assert report["failed"] == len(broken_images(photos))
    for kind in ("decoding", "preprocessing", "model", "writing"):
        assert report[kind] > 0
    assert "50 of 50 pictures in" in run(*arguments, code=3).stdout
    refused = run(*arguments, "--normalize", code=1).stderr
    assert "holds rows of another run: normalize was" in refused


def test_embed_without_broken_images(
    photos: Path, embedded: Path, tower: Path, tmp_path: Path
) -> None:
    image = readable_rows(embedded)[0]
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.png").write_bytes(Path(image["path"]).read_bytes())
    options = ["--model", tower, "--form", "eager", "--workers", 0]
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


def test_progress_line_fits_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    controller, terminal = os.openpty()
    progress = Progress(total=10_000, done=5000, failed=47, fresh=100, seconds=10.0, model=9.0)
    shares = "model 90%, waiting 0%, writing 0%, decoding 0%, preprocessing 0%"
    with os.fdopen(terminal, "w") as stderr, os.fdopen(controller, "rb", buffering=0) as screen:
        monkeypatch.setattr(sys, "stderr", stderr)
        monkeypatch.setenv("COLUMNS", "30")
        line = commands._Line()
        line.show(commands._progress(progress))
        assert screen.read(1000).decode() == "\r\033[K5000/10000, 47 failed, 10.0 p"
        monkeypatch.setenv("COLUMNS", "200")
        line.last = 0.0
        line.show(commands._progress(progress))
        text = f"5000/10000, 47 failed, 10.0 pictures/s, 8 min left: {shares}"
        assert screen.read(1000).decode() == f"\r\033[K{text}"
        line.clear()
        assert screen.read(1000).decode() == "\r\033[K"


def test_unusable_arguments(photos: Path, tower: Path, tmp_path: Path) -> None:
    missing = run("embed", tmp_path / "no", "-o", "out", "--model", tower, code=1)
    assert "does not exist" in missing.stderr
    arguments = ["embed", photos, "-o", "out", "--model", tower]
    assert "cannot be used here" in run(*arguments, "--device", "cuda:9", code=2).output
    unknown = run(*arguments, "--form", "quick", code=2).output
    assert "'quick' is none of eager, packed" in " ".join(unknown.replace("│", " ").split())
    assert "holds no vectors" in run("search", tmp_path, photos / "x.png", code=1).stderr
