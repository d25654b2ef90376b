"""LoRA adapters of peft."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from siglip_port import CheckpointError, SigLipVisionModel
from siglip_port.checkpoint import layouts, save_hf
from siglip_port.parity.metrics import relative_error
from tests.helpers.checkpoints import SHALLOW, MakeCheckpoint
from tests.helpers.models import random_float64_model
from tests.helpers.training import (
    GRADIENT_TOLERANCE,
    TOLERANCE,
    backward,
    gradients,
    images,
    load_pair,
    to_reference_names,
)

ENCODER = r".*(encoder_blocks|encoder\.layers)\.\d+\..*(_proj|fc1|fc2)"


def with_lora(model: nn.Module, *, fresh: bool = True, targets: str = "all-linear") -> PeftModel:
    """Add LoRA of rank 4, with its default initialization if `fresh`, else random."""
    config = LoraConfig(r=4, lora_alpha=10, target_modules=targets, init_lora_weights=fresh)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(model, config)


def adapters(model: nn.Module) -> dict[str, Any]:
    prefix = "base_model.model."
    return {n.removeprefix(prefix): m for n, m in model.named_modules() if isinstance(m, LoraLayer)}


def test_lora_initial_output() -> None:
    model = random_float64_model(SHALLOW)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert len(linears) == 6 * (3 + 1)  # three blocks and the pooling head
    x = images(SHALLOW)
    tokens = model(x)
    vectors = model.embed(x)
    wrapped = with_lora(model)
    assert adapters(wrapped).keys() == linears
    assert {name.split(".")[-3] for name, p in wrapped.named_parameters() if p.requires_grad} == {
        "lora_A",
        "lora_B",
    }
    assert torch.equal(wrapped(x), tokens)
    assert torch.equal(wrapped.embed(x), vectors)


def test_lora_train_merge_save(tmp_path: Path) -> None:
    model = random_float64_model(SHALLOW)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = images(SHALLOW)
    wrapped = with_lora(model).train()
    old = wrapped.embed(x).detach()
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    backward(wrapped.embed(x).square().mean())
    optimizer.step()
    new = wrapped.eval().embed(x).detach()
    assert relative_error(new, old) > 1e-3
    message = r"the model to be saved has adapters; call merge_and_unload\(\) first and save its"
    with pytest.raises(CheckpointError, match=message):
        model.save_hf(tmp_path / "wrapped")
    with pytest.raises(CheckpointError, match=r"got PeftModel; .*merge_and_unload\(\)"):
        save_hf(wrapped, tmp_path / "wrapped")
    assert not (tmp_path / "wrapped").exists()
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(random_float64_model(SHALLOW), tmp_path / "adapter")
    assert relative_error(loaded.embed(x).detach(), new) <= 1e-6  # peft loads adapters in float32
    merged = wrapped.merge_and_unload()
    assert isinstance(merged, SigLipVisionModel)
    assert relative_error(merged.embed(x).detach(), new) <= TOLERANCE
    unchanged = {name for name, p in merged.named_parameters() if torch.equal(p, before[name])}
    linears = {
        f"{name}.weight" for name, module in merged.named_modules() if isinstance(module, nn.Linear)
    }
    assert unchanged == before.keys() - linears
    merged.save_hf(tmp_path / "merged")
    assert (
        relative_error(SigLipVisionModel.from_hf(tmp_path / "merged").embed(x).detach(), new)
        <= TOLERANCE
    )


@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # peft reads this attribute
def test_lora_gradients_in_blocks(
    checkpoint: MakeCheckpoint,
) -> None:
    port, reference = load_pair(SHALLOW, checkpoint)
    port_lora, reference_lora = (
        with_lora(model, fresh=False, targets=ENCODER) for model in (port, reference)
    )
    pairs = {
        name.replace("transformer.encoder.encoder_blocks", "encoder.layers"): a
        for name, a in adapters(port_lora).items()
    }
    others = adapters(reference_lora)
    assert pairs.keys() == others.keys()
    assert len(pairs) == 6 * 3
    for name, adapter in pairs.items():
        others[name].load_state_dict(adapter.state_dict())
    x = images(SHALLOW)
    backward(port_lora.embed(x).sin().mean())
    backward(reference_lora(x).pooler_output.sin().mean())
    for name, adapter in pairs.items():
        for part in ("lora_A", "lora_B"):
            port_grad, reference_grad = (
                getattr(a, part)["default"].weight.grad for a in (adapter, others[name])
            )
            assert relative_error(port_grad, reference_grad) <= GRADIENT_TOLERANCE, (name, part)


@pytest.mark.parametrize("order", ["before", "after"])
def test_lora_with_reentrant_checkpointing(order: str) -> None:
    model = random_float64_model(SHALLOW)
    x = images(SHALLOW)
    if order == "before":
        model.gradient_checkpointing_enable({"use_reentrant": True})
    wrapped = with_lora(model, fresh=False, targets=ENCODER).train()
    if order == "after":
        model.gradient_checkpointing_enable({"use_reentrant": True})
    backward(wrapped.embed(x).sin().mean())
    recomputed = trained_gradients(wrapped)
    model.gradient_checkpointing_disable()
    backward(wrapped.embed(x).sin().mean())
    plain = trained_gradients(wrapped)
    assert len(plain) == 6 * 3 * 2
    assert all(grad.any() for grad in plain.values())
    assert all(torch.equal(recomputed[name], grad) for name, grad in plain.items())


def trained_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradients of all parameters that require one, and reset them."""
    grads = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            grads[name] = parameter.grad
    model.zero_grad()
    return grads


def test_lora_gradients(
    checkpoint: MakeCheckpoint,
) -> None:
    """W + s B A has the gradient G in the reference; then A has s B^T G, and B has s G A^T."""
    port, reference = load_pair(SHALLOW, checkpoint)
    shapes = {name: p.shape for name, p in port.named_parameters()}
    wrapped = with_lora(port, fresh=False)
    x = images(SHALLOW)
    backward(wrapped.embed(x).sin().mean())
    factors = {
        name: (a.scaling["default"], a.lora_A["default"].weight, a.lora_B["default"].weight)
        for name, a in adapters(wrapped).items()
    }
    merged = copy.deepcopy(wrapped).merge_and_unload()
    reference.load_state_dict(to_reference_names(merged, dict(merged.state_dict())))
    backward(reference(x).pooler_output.sin().mean())
    grads = gradients(reference)
    mappings = layouts.HUGGINGFACE.mappings(
        SHALLOW.num_encoder_blocks, layouts.HUGGINGFACE.rules(pooling_head=True)
    )
    port_grads = {
        name: grad
        for stored, mapping in mappings.items()
        for name, grad in zip(
            mapping.port,
            mapping.from_stored(grads[stored], [shapes[n] for n in mapping.port]),
            strict=True,
        )
    }
    assert len(factors) == 6 * (3 + 1)
    for name, (scale, a, b) in factors.items():
        grad = port_grads[f"{name}.weight"]
        assert a.grad is not None
        assert b.grad is not None
        assert scale == 10 / 4
        assert relative_error(a.grad, scale * b.detach().T @ grad) <= GRADIENT_TOLERANCE, name
        assert relative_error(b.grad, scale * grad @ a.detach().T) <= GRADIENT_TOLERANCE, name
