"""DDP and FSDP2 with two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from siglip_port import SigLipVisionConfig, SigLipVisionModel
from siglip_port.parity.metrics import relative_error
from siglip_port.parity.siglip import reference as references
from tests.helpers import two_processes
from tests.helpers.checkpoints import Tensors
from tests.helpers.models import random_float64_model
from tests.helpers.training import (
    GRADIENT_TOLERANCE,
    TOLERANCE,
    backward,
    worst_error,
)
from tests.helpers.two_processes import (
    CONFIG,
    LEARNING_RATE,
    NAFLEX,
    WORLD_SIZE,
    Batch,
    Results,
    images,
    packed_images,
)


class Run(NamedTuple):
    """Results of the two processes by rank, and their output folder."""

    folder: Path
    results: list[Results]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("processes")
    process = subprocess.run(
        [sys.executable, "-m", "tests.helpers.two_processes", str(folder)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stdout
    return Run(folder, [torch.load(folder / f"{rank}.pt") for rank in range(WORLD_SIZE)])


def train_one_process(
    config: SigLipVisionConfig, batch: Batch
) -> tuple[SigLipVisionModel, Tensors]:
    """Return a model and its gradients for the whole batch."""
    model = random_float64_model(config)
    backward(two_processes.loss(model.embed(**batch)))
    return model, two_processes.full_gradients(model)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
@pytest.mark.parametrize("naflex", [False, True], ids=["fixed", "naflex"])
def test_ddp_and_fsdp_gradients(run: Run, wrapper: str, naflex: bool) -> None:
    key = wrapper
    config = CONFIG
    batch = images()
    if naflex:
        key = f"{wrapper}, naflex"
        config = NAFLEX
        batch = packed_images()
    _, expected = train_one_process(config, batch)
    for results in run.results:
        assert worst_error(results[key], expected)[0] <= GRADIENT_TOLERANCE


def test_bypassing_ddp(run: Run) -> None:
    """Calls that bypass DDP do not average gradients."""
    _, expected = train_one_process(CONFIG, images())
    first, second = (results["past ddp"] for results in run.results)
    assert worst_error(first, expected)[0] > 1e-2
    averaged = {name: (grad + second[name]) / 2 for name, grad in first.items()}
    assert worst_error(averaged, expected)[0] <= GRADIENT_TOLERANCE


@torch.no_grad()
def test_fsdp_step_and_save(run: Run) -> None:
    with torch.enable_grad():
        model, _ = train_one_process(CONFIG, images())
    before = model.embed(**images(side=32))
    torch.optim.SGD(model.parameters(), lr=LEARNING_RATE).step()
    after = model.embed(**images(side=32))
    assert relative_error(after, before) > 1e-3
    expected = {
        "before": before,
        "after": after,
        "tokens": model(**images()),
        "pooled": model.embed(**images()),
    }
    for results in run.results:
        for name, tensor in expected.items():
            assert relative_error(results[name], tensor) <= GRADIENT_TOLERANCE, name
    saved = SigLipVisionModel.from_hf(run.folder / "saved").state_dict()
    assert saved.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == saved[name].dtype
        assert relative_error(saved[name], tensor) <= GRADIENT_TOLERANCE, name
    reference = references.load(run.folder / "saved", pooling_head=True, dtype=torch.float64).model
    pooled = reference(**images()).pooler_output
    assert relative_error(pooled, expected["pooled"]) <= GRADIENT_TOLERANCE


@torch.no_grad()
def test_fsdp_unregistered_methods(run: Run) -> None:
    model = random_float64_model(CONFIG)
    maps = model.attention_maps(**images(), layers=[0, 2])[1]
    for rank, results in enumerate(run.results):
        # `embed` calls the model, which gathers the parameters; `pool` alone does not.
        vectors = model.embed(**images(slice(2 * rank, 2 * rank + 2)))
        assert relative_error(results["vectors, embed not registered"], vectors) <= TOLERANCE
        assert results["pool, not registered"].startswith("RuntimeError: ")
        # `attention_maps` reads modules of blocks without calling them, so nothing gathers them.
        assert "mixed torch.Tensor and DTensor" in results["maps, blocks sharded"]
        assert relative_error(results["maps"], maps) <= TOLERANCE


def test_sharded_model_not_saved(run: Run) -> None:
    for rank, results in enumerate(run.results):
        message = results["saved while sharded"]
        assert message.startswith(
            "CheckpointError: the model to be saved does not match its configuration"
        )
        assert "sharded or quantized tensors; gather or dequantize them first (" in message
        assert not (run.folder / f"sharded-{rank}").exists()
