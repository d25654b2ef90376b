"""Runs on a Ray cluster, with the same embeddings."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from siglip_port import SigLipVisionModel
from siglip_port.embed import Embedder, EmbedError, Progress, embed
from siglip_port.embed.batches import Batch
from siglip_port.embed.inputs import find_items
from siglip_port.embed.ray import DecodeStage, ModelStage, model_count, run_on_ray
from siglip_port.embed.run import run_local
from siglip_port.extras import MissingExtraError
from tests.helpers.embedding import broken_images, image_paths, row_texts

OPTIONS: dict[str, Any] = {
    "engine": "eager",
    "batch_size": 4,
    "shard_size": 12,
    "threads": 2,
    "num_workers": 0,
}


# --- without a cluster ----------------------------------------------------------------------------


def test_stages_match_local_run(
    photos: Path, encoder_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Called as Ray does, with pickled inputs, outputs and model."""
    encoder = Embedder(SigLipVisionModel.from_hf(encoder_folder), batch_size=4)
    items = find_items([photos])
    batches = [Batch(number, 0, tuple(items[4 * number : 4 * number + 4])) for number in range(3)]
    monkeypatch.setattr("ray.get", pickle.loads)
    decode = pickle.loads(pickle.dumps(DecodeStage(encoder.processor)))
    model = ModelStage(pickle.dumps(encoder))  # type: ignore[arg-type]
    for batch, expected in zip(batches, run_local(encoder, batches, 0), strict=True):
        row = {"number": batch.number, "data": pickle.dumps(batch.items)}
        result = pickle.loads(model(decode(row))["data"])
        assert (result.number, result.errors) == (expected.number, expected.errors)
        assert result.sizes == expected.sizes
        assert np.array_equal(result.vectors, expected.vectors, equal_nan=True)


@pytest.mark.parametrize(
    ("cpus", "num_workers", "count"), [(7.0, None, 2), (6.0, 1, 1), (3.0, None, 1)]
)
def test_model_count(
    cpus: float,
    num_workers: int | None,
    count: int,
    encoder_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": cpus})
    assert model_count(Embedder(encoder_folder, threads=2), num_workers) == count


def test_cluster_too_small(encoder_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 5.0})
    message = (
        "Ray cluster is too small for 2 model processes: it has 5 CPUs, needs 3 per model (2 "
        "threads, 1 for decoding); reduce num_workers= or threads="
    )
    with pytest.raises(EmbedError, match=re.escape(message)):
        model_count(Embedder(encoder_folder, threads=2), 2)


def test_cluster_without_gpus(encoder_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 5.0})
    monkeypatch.setattr("siglip_port.embed.ray.runs_on_gpu", lambda encoder: True)
    message = "it has 0 GPUs, needs 1 per model; reduce num_workers= or use device='cpu'"
    with pytest.raises(EmbedError, match=message):
        model_count(Embedder(encoder_folder), None)


def test_ray_missing(photos: Path, encoder_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    batch = Batch(0, 0, tuple(find_items([photos])[:2]))
    with pytest.raises(MissingExtraError, match=r"run: pip install 'siglip-port\[ray\]'"):
        next(run_on_ray(Embedder(encoder_folder), [batch]))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1 "),
        ("ray://127.0.0.1:1", "no Ray cluster answers at "),
        ("127.0.0.1:99999", "no Ray cluster answers at "),
        ("here", "address must be HOST:PORT, auto or local, got 'here'"),
    ],
)
def test_unreachable_cluster(
    address: str, message: str, photos: Path, encoder_folder: Path, tmp_path: Path
) -> None:
    model = SigLipVisionModel.from_hf(encoder_folder)
    with pytest.raises(EmbedError, match=message):
        embed([photos], tmp_path / "out", model, executor="ray", address=address, **OPTIONS)


# --- on a cluster of two workers ------------------------------------------------------------------


class StopError(Exception):
    """Ends a run."""


def stop_after_25(progress: Progress) -> None:
    if progress.processed >= 25:
        raise StopError


@pytest.fixture(scope="module")
def cluster_run(
    photos: Path, encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Output of `tests/helpers/ray_cluster.py`, with that of a local run in `local`."""
    folder = tmp_path_factory.mktemp("ray")
    model = SigLipVisionModel.from_hf(encoder_folder)
    embed([photos], folder / "local", model, **OPTIONS)
    with pytest.raises(StopError):
        embed([photos], folder / "run", model, on_progress=stop_after_25, **OPTIONS)
    script = Path(__file__).parents[1] / "helpers" / "ray_cluster.py"
    command = [sys.executable, *map(str, (script, photos, encoder_folder, folder))]
    subprocess.run(command, cwd=script.parents[2], check=True, timeout=600)
    return folder


def read_report(cluster_run: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((cluster_run / "ray.json").read_text())
    return report


@pytest.mark.slow
def test_cluster_resumes_local_run(cluster_run: Path, photos: Path) -> None:
    """The rows are bitwise equal."""
    report = read_report(cluster_run)
    assert (report["processed"], report["failed"]) == (26, len(broken_images(photos)))
    assert row_texts(cluster_run / "run") == row_texts(cluster_run / "local")


@pytest.mark.slow
def test_image_that_crashes_every_process_of_cluster(cluster_run: Path) -> None:
    message = "Ray cluster failed: .*died.* with executor='local' if an image crashes"
    assert re.match(message, read_report(cluster_run)["deadly"])


@pytest.mark.slow
def test_ray_data(cluster_run: Path, photos: Path, encoder_folder: Path) -> None:
    """`map_batches` with an `Embedder`."""
    rows = read_report(cluster_run)["embedder"]
    files = image_paths(photos)
    expected = Embedder(encoder_folder)({"path": files})
    errors, vectors = zip(*(rows[name] for name in files), strict=True)
    assert list(errors) == expected["error"].tolist()
    close = np.allclose(vectors, expected["embedding"], rtol=1e-4, atol=1e-4, equal_nan=True)
    assert close
