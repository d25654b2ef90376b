"""Checkpoints of other transformers and open_clip releases: `uv run pytest -m versions`.

Needs uv and a package index; each release is installed in its own environment.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from siglip_port import SigLipVisionModel
from siglip_port.parity.metrics import relative_error
from siglip_port.parity.stress_weights import randomize
from tests.helpers.checkpoints import ODD

ROOT = Path(__file__).parent.parent

# 4.40 has no sdpa for SigLIP, and its eager attention has a float32 softmax.
FLOAT64_TOLERANCE = {
    "4.40.2": 1e-6,
    "4.57.6": 1e-12,
    "5.5.4": 1e-12,
    "5.8.0": 1e-12,
    "5.23.0": 1e-12,
}

pytestmark = pytest.mark.versions


@pytest.fixture(scope="module", params=FLOAT64_TOLERANCE)
def release_checkpoints(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    for name, naflex in (("port", False), ("port-naflex", True)):
        model = SigLipVisionModel(replace(ODD, naflex=naflex, image_size=42 if naflex else 45))
        randomize(model)
        model.save_hf(folder / name)
    torch_version = version("torch").split("+")[0]
    packages = [
        f"transformers=={request.param}",
        f"torch=={torch_version}",
        "safetensors",
        "numpy",
        "pillow",
    ]
    script = ROOT / "tests" / "helpers" / "other_transformers.py"
    subprocess.run(
        [
            "uv",
            "run",
            "--no-project",
            "--isolated",
            *(f"--with={p}" for p in packages),
            "python",
            script,
            folder,
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    return request.param, folder


@pytest.mark.parametrize(
    "kind", ["full", "vision", "headless", "classifier", "llava", "paligemma", "port"]
)
@torch.no_grad()
def test_checkpoint_of_release(release_checkpoints: tuple[str, Path], kind: str) -> None:
    release, folder = release_checkpoints
    if not (folder / kind).exists():
        pytest.skip(f"transformers {release} has no such model")
    expected = load_file(folder / kind / "expected.safetensors")
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, FLOAT64_TOLERANCE[release])):
        model = SigLipVisionModel.from_hf(folder / kind, dtype=dtype)
        tokens = model(expected["pixel_values"])
        assert relative_error(tokens, expected[f"tokens.{dtype}"]) <= tolerance
        assert (model.pooling_head is not None) == (f"pooled.{dtype}" in expected)
        if model.pooling_head is not None:
            assert relative_error(model.pool(tokens), expected[f"pooled.{dtype}"]) <= tolerance


@torch.no_grad()
def test_saved_naflex_in_release(release_checkpoints: tuple[str, Path]) -> None:
    release, folder = release_checkpoints
    if not (folder / "port-naflex" / "expected.safetensors").exists():
        pytest.skip(f"transformers {release} has no Siglip2VisionModel")
    expected = load_file(folder / "port-naflex" / "expected.safetensors")
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        model = SigLipVisionModel.from_hf(folder / "port-naflex", dtype=dtype)
        names = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
        pooled = model.embed(**{name: expected[name] for name in names})  # type: ignore[arg-type]
        assert relative_error(pooled, expected[f"pooled.{dtype}"]) <= tolerance


@torch.no_grad()
def test_open_clip(tmp_path: Path) -> None:
    """One of the two models has the exact GELU and one the tanh approximation, as in timm."""
    torch_version = version("torch").split("+")[0]
    packages = [
        "open_clip_torch==3.3.0",
        f"torch=={torch_version}",
        "torchvision",
        "safetensors",
        "numpy",
    ]
    script = ROOT / "tests" / "helpers" / "other_open_clip.py"
    subprocess.run(
        [
            "uv",
            "run",
            "--no-project",
            "--isolated",
            *(f"--with={p}" for p in packages),
            "python",
            script,
            tmp_path,
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    acts = []
    for folder in sorted(path for path in tmp_path.iterdir()):
        expected = load_file(folder / "expected.safetensors")
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
            model = SigLipVisionModel.from_hf(folder, dtype=dtype)
            assert (
                relative_error(model.embed(expected["pixel_values"]), expected[f"pooled.{dtype}"])
                <= tolerance
            )
        acts.append(model.config.hidden_act)
    assert acts == ["gelu", "gelu_pytorch_tanh"]
