"""Benchmarks of hot paths with pytest-benchmark, to compare before and after a change.

Nothing fails on time:

    uv run --group bench pytest -n0 scripts/benchmarks/hot_paths.py --benchmark-save=before
    uv run --group bench pytest -n0 scripts/benchmarks/hot_paths.py --benchmark-compare
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from siglip_port import SigLipVisionConfig, SigLipVisionModel, pack
from siglip_port.optimize import ENGINES, with_engine

CONFIG = SigLipVisionConfig(num_encoder_blocks=2, pooling_head=True, interpolation="hf")
Benchmark = Callable[[Callable[[], Any]], Any]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    SigLipVisionModel(CONFIG).save_hf(folder)
    return folder


def test_load(benchmark: Benchmark, checkpoint: Path) -> None:
    assert benchmark(lambda: SigLipVisionModel.from_hf(checkpoint)).config.num_encoder_blocks == 2


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "compiled"])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_embed(
    benchmark: Benchmark, checkpoint: Path, tmp_path: Path, engine: str, batch_size: int
) -> None:
    model = SigLipVisionModel.from_hf(checkpoint)
    dtype = torch.int8 if engine == "int8" else None
    fast = with_engine(model, engine, dtype=dtype, cache_dir=tmp_path)
    images = torch.rand(batch_size, 3, 224, 224)
    with torch.inference_mode():
        assert benchmark(lambda: fast.embed(images)).shape == (batch_size, 768)


def test_packed_patches_of_several_shapes(benchmark: Benchmark) -> None:
    model = SigLipVisionModel(replace(CONFIG, num_encoder_blocks=1)).eval()
    packed = pack([torch.rand(3, 224, 160), torch.rand(3, 96, 320)], CONFIG.patch_size)
    with torch.inference_mode():
        assert benchmark(lambda: model.embed(**packed)).shape == (2, 768)
