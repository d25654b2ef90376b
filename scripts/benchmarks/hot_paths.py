"""The hot paths, timed by pytest-benchmark, so that a later change can be compared.

Nothing here fails on time.

uv run --group bench pytest -n0 scripts/benchmarks/hot_paths.py --benchmark-save=before
uv run --group bench pytest -n0 scripts/benchmarks/hot_paths.py --benchmark-compare    # after the
change
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from siglip_port import SigLipVisionConfig, SigLipVisionModel, pack
from siglip_port.optimize import selection as inference
from siglip_port.optimize.selection import ENGINES

CONFIG = SigLipVisionConfig(num_encoder_blocks=2, pooling_head=True, interpolation="hf")
Benchmark = Callable[[Callable[[], Any]], Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tower")
    SigLipVisionModel(CONFIG).save_hf(made)
    return made


def test_load(benchmark: Benchmark, folder: Path) -> None:
    assert benchmark(lambda: SigLipVisionModel.from_hf(folder)).config.num_encoder_blocks == 2


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "compiled"])
@pytest.mark.parametrize("batch", [1, 8])
def test_embed(benchmark: Benchmark, folder: Path, tmp_path: Path, engine: str, batch: int) -> None:
    fast = inference.frozen(SigLipVisionModel.from_hf(folder), None)
    ENGINES[engine](fast, tmp_path)
    x = torch.rand(batch, 3, 224, 224)
    with torch.inference_mode():
        assert benchmark(lambda: fast.embed(x)).shape == (batch, 768)


def test_packed_patches_of_several_shapes(benchmark: Benchmark) -> None:
    model = SigLipVisionModel(replace(CONFIG, num_encoder_blocks=1)).eval()
    packed = pack([torch.rand(3, 224, 160), torch.rand(3, 96, 320)], CONFIG.patch_size)
    with torch.inference_mode():
        assert benchmark(lambda: model.embed(**packed)).shape == (2, 768)
