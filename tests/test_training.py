"""Training: gradients against the reference, dtypes, gradient checkpointing, copies."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from siglip_port import SigLipVisionConfig, SigLipVisionModel, optimize
from siglip_port.embed import Embedder
from siglip_port.parity.metrics import relative_error
from siglip_port.patches import interpolate_positions
from tests.helpers.checkpoints import SHALLOW, MakeCheckpoint
from tests.helpers.models import random_float64_model
from tests.helpers.training import (
    GRADIENT_TOLERANCE,
    NAFLEX,
    RESIZED,
    TOLERANCE,
    backward,
    gradients,
    images,
    load_pair,
    loss_of,
    packed_images,
    to_reference_names,
    worst_error,
)

POSITIONS = "transformer.embeddings.position_embedding.weight"

Run = Callable[[Tensor], Tensor]


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [None, 31], ids=["own size", "other size"])
def test_gradients(checkpoint: MakeCheckpoint, side: int | None) -> None:
    port, reference = load_pair(SHALLOW if side is None else RESIZED, checkpoint)
    x, y = (images(SHALLOW, side).requires_grad_() for _ in range(2))
    tokens = port(x)
    backward(loss_of(tokens, port.pool(tokens)))
    output = reference(y, interpolate_pos_encoding=side is not None)
    backward(loss_of(output.last_hidden_state, output.pooler_output))
    assert x.grad is not None
    assert y.grad is not None
    assert relative_error(x.grad, y.grad) <= GRADIENT_TOLERANCE
    port_grads = to_reference_names(port, gradients(port))
    expected = gradients(reference)
    assert worst_error(port_grads, expected)[0] <= GRADIENT_TOLERANCE, worst_error(
        port_grads, expected
    )
    port_grads["encoder.layers.1.mlp.fc1.weight"] *= 1 + 1e-9
    assert worst_error(port_grads, expected)[1] == "encoder.layers.1.mlp.fc1.weight"
    assert worst_error(port_grads, expected)[0] > GRADIENT_TOLERANCE


def test_gradients_of_packed_patches(checkpoint: MakeCheckpoint) -> None:
    port, reference = load_pair(NAFLEX, checkpoint)
    batch = packed_images()
    reference_batch = packed_images()
    mask = batch["pixel_attention_mask"]
    x = batch["pixel_values"].requires_grad_()
    y = reference_batch["pixel_values"].requires_grad_()
    tokens = port(**batch)
    backward(loss_of(tokens, port.pool(tokens, mask), mask))
    output = reference(**reference_batch)
    backward(loss_of(output.last_hidden_state, output.pooler_output, mask))
    assert x.grad is not None
    assert y.grad is not None
    assert not x.grad[mask == 0].any()
    assert relative_error(x.grad, y.grad) <= GRADIENT_TOLERANCE
    grads = to_reference_names(port, gradients(port))
    expected = gradients(reference)
    assert grads["embeddings.patch_embedding.weight"].shape == (72, 3 * 7 * 7)  # linear weight
    # On a CPU, both interpolate positions in float32 and accumulate gradients in different dtypes.
    name = "embeddings.position_embedding.weight"
    assert relative_error(grads.pop(name), expected.pop(name)) <= 1e-6
    assert worst_error(grads, expected)[0] <= GRADIENT_TOLERANCE, worst_error(grads, expected)

    tokens = port(**{**batch, "pixel_attention_mask": torch.ones_like(mask)})  # ignore the mask
    backward(loss_of(tokens, port.pool(tokens, mask), mask))
    wrong = to_reference_names(port, gradients(port))
    assert worst_error({n: wrong[n] for n in expected}, expected)[0] > 1e-2


@pytest.mark.parametrize("config", [SHALLOW, NAFLEX], ids=["images", "packed patches"])
def test_gradients_of_mean_pooling(checkpoint: MakeCheckpoint, config: SigLipVisionConfig) -> None:
    loaded, reference = load_pair(replace(config, pooling_head=False), checkpoint)
    port = SigLipVisionModel(replace(loaded.config, mean_pooling=True)).double().eval()
    port.load_state_dict(loaded.state_dict())
    batch: dict[str, Any] = packed_images() if config.naflex else {"pixel_values": images(config)}
    backward(port.embed(**batch).sin().mean())
    tokens = reference(**batch).last_hidden_state
    mask = batch.get("pixel_attention_mask", torch.ones(tokens.shape[:2]))[:, :, None]
    backward(((tokens * mask).sum(1) / mask.sum(1)).sin().mean())
    port_grads = to_reference_names(port, gradients(port))
    expected = gradients(reference)
    if config.naflex:  # as in test_gradients_of_packed_patches
        name = "embeddings.position_embedding.weight"
        assert relative_error(port_grads.pop(name), expected.pop(name)) <= 1e-6
    assert worst_error(port_grads, expected)[0] <= GRADIENT_TOLERANCE, worst_error(
        port_grads, expected
    )


def test_dropout(
    checkpoint: MakeCheckpoint,
) -> None:
    port, reference = load_pair(replace(SHALLOW, attention_dropout=0.3), checkpoint)
    x = images(SHALLOW)

    def run_both() -> tuple[Tensor, Tensor]:
        """Return tokens of both; gradients stay in the parameters."""
        torch.manual_seed(0)
        tokens = port(x)
        backward(loss_of(tokens, port.pool(tokens)))
        torch.manual_seed(0)
        output = reference(x)
        backward(loss_of(output.last_hidden_state, output.pooler_output))
        return tokens.detach(), output.last_hidden_state.detach()

    without_dropout, expected = run_both()
    assert relative_error(without_dropout, expected) <= TOLERANCE
    assert torch.equal(without_dropout, port(x))
    grads_without_dropout = gradients(port)
    gradients(reference)
    port.train()
    reference.train()
    dropped, expected = run_both()
    assert relative_error(dropped, without_dropout) > 1e-2
    assert relative_error(dropped, expected) <= TOLERANCE
    assert not torch.equal(dropped, port(x))  # the next draw
    grads = gradients(port)
    assert worst_error(grads, grads_without_dropout)[0] > 1e-2
    assert (
        worst_error(to_reference_names(port, grads), gradients(reference))[0] <= GRADIENT_TOLERANCE
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_autocast(checkpoint: MakeCheckpoint, dtype: torch.dtype) -> None:
    port, reference = load_pair(SHALLOW, checkpoint)
    x = images(SHALLOW)

    def embeddings_and_gradients() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        vectors = [
            port.embed(x.to(port.pooling_head.probe.dtype)),  # type: ignore[union-attr]
            reference(x.to(reference.dtype)).pooler_output,
        ]
        for vector in vectors:
            backward(vector.square().sum())
        return [v.detach().double() for v in vectors], [
            to_reference_names(port, gradients(port)),
            gradients(reference),
        ]

    (exact, _), (exact_gradients, _) = embeddings_and_gradients()

    def check() -> None:
        (port_vector, reference_vector), grads = embeddings_and_gradients()
        assert (
            0 < relative_error(port_vector, exact) <= 1.5 * relative_error(reference_vector, exact)
        )
        for name in (
            "embeddings.patch_embedding.weight",
            "encoder.layers.1.mlp.fc1.weight",
            "head.probe",
        ):
            port_error, other = (relative_error(g[name], exact_gradients[name]) for g in grads)
            assert 0 < port_error <= 1.5 * other, name

    port.half() if dtype == torch.float16 else port.to(dtype)
    reference.to(dtype)
    assert {p.dtype for p in port.parameters()} == {dtype}
    check()
    if dtype != torch.float32:
        port.float()
        reference.float()
        with torch.autocast("cpu", dtype):
            check()


def test_training_step_does_not_change_file(
    checkpoint: MakeCheckpoint,
) -> None:
    folder = checkpoint(SHALLOW)
    before = (folder / "model.safetensors").read_bytes()
    model = SigLipVisionModel.from_hf(folder).train()
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    backward(model.embed(images(SHALLOW)).square().mean())
    optimizer.step()
    assert not [name for name, p in model.named_parameters() if torch.equal(p, old[name])]
    assert (folder / "model.safetensors").read_bytes() == before


# --- gradient checkpointing -----------------------------------------------------------------------


def runs_of_blocks(model: SigLipVisionModel, run: Callable[[], object]) -> int:
    """Count forward passes of blocks while `run` runs."""
    count = [0]

    def add(*_: object) -> None:
        count[0] += 1

    hooks = [
        block.register_forward_pre_hook(add) for block in model.transformer.encoder.encoder_blocks
    ]
    run()
    for hook in hooks:
        hook.remove()
    return count[0]


@pytest.mark.parametrize(
    "config", [replace(SHALLOW, attention_dropout=0.3), NAFLEX], ids=["dropout", "packed patches"]
)
def test_gradient_checkpointing(
    config: SigLipVisionConfig,
) -> None:
    model = random_float64_model(config).train()
    batch: dict[str, Any] = packed_images() if config.naflex else {"pixel_values": images(config)}

    def step() -> None:
        torch.manual_seed(0)  # for dropout
        backward(model.embed(**batch).square().mean())

    assert runs_of_blocks(model, step) == 3
    plain = gradients(model)
    model.gradient_checkpointing_enable()
    assert runs_of_blocks(model, step) == 6
    recomputed = gradients(model)
    assert all(torch.equal(recomputed[name], grad) for name, grad in plain.items())
    assert (
        runs_of_blocks(model, lambda: model.hidden_states(**batch, layers=[-1])) == 3
    )  # no backward pass
    assert runs_of_blocks(model.eval(), step) == 3
    model.train().gradient_checkpointing_disable()
    assert runs_of_blocks(model, step) == 3


@pytest.mark.parametrize("trained", ["blocks", "last block", "pooling head", "everything"])
def test_reentrant_checkpointing_of_parts(trained: str) -> None:
    """Torch's reentrant checkpointing alone gives no gradients if no input requires one."""
    model = random_float64_model(SHALLOW).train()
    parts = {
        "blocks": model.transformer.encoder,
        "last block": model.transformer.encoder.encoder_blocks[-1],
        "pooling head": model.pooling_head,
        "everything": model,
    }
    part = parts[trained]
    assert part is not None
    model.requires_grad_(False)
    part.requires_grad_(True)

    def step() -> None:
        backward(model.embed(images(SHALLOW)).square().mean())

    step()
    plain = gradients(part)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    assert model.is_gradient_checkpointing
    assert runs_of_blocks(model, step) == 6
    recomputed = gradients(part)
    errors = [relative_error(recomputed[name], grad) for name, grad in plain.items()]
    assert max(errors) <= GRADIENT_TOLERANCE  # sums may be in another order
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_names_of_gradient_checkpointing() -> None:
    """As transformers' Trainer calls them, before and since 5.23."""
    model = SigLipVisionModel(SHALLOW)
    model.activation_checkpointing_enable(
        activation_checkpointing_kwargs={"use_reentrant": True}, every_n_layers=1, offload=False
    )
    assert model.transformer.encoder.checkpointing_kwargs == {"use_reentrant": True}
    assert model.is_gradient_checkpointing
    model.activation_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=None, every_n_layers=1)
    assert model.transformer.encoder.checkpointing_kwargs == {"use_reentrant": False}
    assert model.is_gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    for wrong in ({"every_n_layers": 2}, {"offload": True}):
        with pytest.raises(ValueError, match="every_n_layers must be 1 and offload must be False"):
            model.gradient_checkpointing_enable(None, **wrong)


# --- inference mode -------------------------------------------------------------------------------


@torch.inference_mode()
def made_in_inference_mode(folder: Path) -> dict[str, SigLipVisionModel]:
    """Return models made in inference mode: new, loaded, cast, and from an `Embedder`."""
    embedder = Embedder(folder)
    embedder({"image": [np.zeros((9, 9, 3), np.uint8)]})
    return {
        "new": SigLipVisionModel(SHALLOW),
        "loaded": SigLipVisionModel.from_hf(folder),
        "cast": SigLipVisionModel.from_hf(folder, dtype=torch.float64),
        "Embedder": embedder.base_model,
    }


def test_models_made_in_inference_mode_can_be_trained(checkpoint: MakeCheckpoint) -> None:
    for name, model in made_in_inference_mode(checkpoint(SHALLOW)).items():
        backward(model.train().embed(images(SHALLOW)).square().mean())
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        assert all(grad.any() for grad in gradients(model).values()), name


@torch.no_grad()
def test_loaded_without_gradients(checkpoint: MakeCheckpoint) -> None:
    model = SigLipVisionModel.from_hf(checkpoint(SHALLOW))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not torch.is_grad_enabled()


def test_gradient_of_pixels_in_optimized_model(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    model = SigLipVisionModel.from_hf(checkpoint(SHALLOW))
    with torch.inference_mode():
        optimized = optimize(model, dtype=torch.bfloat16, engines=[], cache_dir=tmp_path)
    x = images(SHALLOW).requires_grad_()
    backward(optimized.embed(x).square().mean())
    assert x.grad is not None
    assert x.grad.any()


# --- copies and dtypes ----------------------------------------------------------------------------


def through_torch_save(model: SigLipVisionModel) -> SigLipVisionModel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded, SigLipVisionModel)
    return loaded


COPIES: dict[str, Callable[[SigLipVisionModel], SigLipVisionModel]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_torch_save,
}


@pytest.mark.parametrize("copy_model", COPIES.values(), ids=COPIES.keys())
@torch.no_grad()
def test_copies(
    checkpoint: MakeCheckpoint, copy_model: Callable[[SigLipVisionModel], SigLipVisionModel]
) -> None:
    folder = checkpoint(SHALLOW)
    processor = {"do_resize": True, "size": {"height": 45, "width": 45}, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    model = SigLipVisionModel.from_hf(folder, interpolation="hf")
    x = images(SHALLOW, 31).float()
    expected = model.embed(x)
    other = copy_model(model)
    assert other.config == model.config
    assert other.provenance == model.provenance is not None
    assert other.preprocessor_config == model.preprocessor_config
    assert other.preprocessor_config["resample"] == 3
    assert not other.training
    assert torch.equal(other.embed(x), expected)
    for parameter in other.parameters():
        parameter.mul_(2)
    assert not torch.equal(other.embed(x), expected)
    assert torch.equal(model.embed(x), expected)


@torch.no_grad()
def test_state_dict(tmp_path: Path) -> None:
    model = random_float64_model(SHALLOW)
    fresh = SigLipVisionModel(SHALLOW)
    assigned = SigLipVisionModel(SHALLOW)
    x = images(SHALLOW)
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()  # no buffers
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    fresh.load_state_dict(state, strict=True)  # into float32: rounded
    assert torch.equal(fresh.eval().embed(x), copy.deepcopy(model).float().embed(x))
    for broken in (
        {n: t for n, t in state.items() if n != POSITIONS},
        {**state, "more": torch.zeros(1)},
    ):
        with pytest.raises(RuntimeError, match=r"Missing key|Unexpected key"):
            fresh.load_state_dict(broken, strict=True)
    assigned.load_state_dict(
        state, strict=True, assign=True
    )  # last, because torch marks `state` permanently
    assert all(p.data_ptr() == state[name].data_ptr() for name, p in assigned.named_parameters())
    assert all(p.requires_grad for p in assigned.parameters())
    assert torch.equal(assigned.eval().embed(x), model.embed(x))


# --- interpolated position embeddings -------------------------------------------------------------


@torch.no_grad()
def test_interpolated_positions_follow_weights() -> None:
    """No interpolated positions are cached between forward passes."""
    model = random_float64_model(RESIZED)
    embeddings = model.transformer.embeddings
    for _ in range(2):
        weight = embeddings.position_embedding.weight
        expected = interpolate_positions(weight, (3, 5), "hf")
        assert torch.equal(embeddings.positions(3, 5), expected)
        weight.data.mul_(2)
    assert embeddings.positions(6, 6) is weight  # its own grid
