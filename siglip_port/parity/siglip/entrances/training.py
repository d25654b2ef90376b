"""Entrances for training: recomputation of blocks, and the input embeddings."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from siglip_port.model import SigLipVisionModel
from siglip_port.parity.metrics import relative_error
from siglip_port.parity.results import Finding
from siglip_port.parity.siglip import reference_features
from siglip_port.parity.siglip.entrances.subject import (
    FLOAT32_BOUND,
    Batch,
    Subject,
    compare_bits,
)

CHECKPOINTING_ARGUMENTS: tuple[dict[str, bool] | None, ...] = (
    None,
    {},
    {"use_reentrant": False},
    {"use_reentrant": True},
    {"preserve_rng_state": True},
)
"""Arguments of `gradient_checkpointing_enable`."""


def check_checkpointing(subject: Subject) -> Iterator[Finding]:
    """Recompute blocks in the backward pass: the same outputs and gradients, also with dropout."""
    batch = subject.expected.batches[0]
    model = copy.deepcopy(subject.port).train()
    try:
        plain = train_step(model, batch)
    except RuntimeError:  # a port that works in place: the gate `gradients` reports it
        return
    if model.config.attention_dropout == 0:
        plain["embeddings"] = batch.expected.pooled
    yield from check_head_in_training(model, batch)
    for kwargs in CHECKPOINTING_ARGUMENTS:
        model.gradient_checkpointing_enable(kwargs)
        label = f"gradient_checkpointing_kwargs={kwargs}"
        if not model.is_gradient_checkpointing:
            yield Finding(f"{label}: is_gradient_checkpointing is False, expected True")
        yield from compare_steps(label, train_step(model, batch), plain)
    yield from check_fixed_embeddings(model, batch)
    model.gradient_checkpointing_disable()
    if model.is_gradient_checkpointing:
        yield Finding("is_gradient_checkpointing is True after gradient_checkpointing_disable()")


def check_head_in_training(model: SigLipVisionModel, batch: Batch) -> Iterator[Finding]:
    """Check that the pooling head has no dropout: it computes the same in training mode."""
    error = relative_error(model.pool(batch.expected.tokens), batch.expected.pooled)
    if not error <= FLOAT32_BOUND:
        yield Finding("in training mode: the pooling head differs", error=error)


def check_fixed_embeddings(model: SigLipVisionModel, batch: Batch) -> Iterator[Finding]:
    """Check that blocks get gradients although their inputs need none."""
    model.transformer.embeddings.requires_grad_(False)
    model.gradient_checkpointing_disable()
    plain = train_step(model, batch)
    for use_reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        label = f"embeddings without gradients, use_reentrant={use_reentrant}"
        yield from compare_steps(label, train_step(model, batch), plain)


def compare_steps(
    label: str, step: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> Iterator[Finding]:
    """Compare embeddings and gradients in float32, to half its digits; yield the first difference.

    Gradients amplify rounding, and those of the keys' biases are 0 but for rounding.
    """
    if step.keys() != expected.keys():
        yield Finding(f"{label}: {len(step) - 1} gradients, expected {len(expected) - 1}")
        return
    bound = math.sqrt(torch.finfo(torch.float32).eps)
    largest = max(float(tensor.norm()) for tensor in expected.values())
    for name, tensor in step.items():
        difference = float((tensor.double() - expected[name].double()).norm())
        norm = float(expected[name].norm())
        if not difference <= bound * (norm + bound * largest):
            yield Finding(f"{label}: {name} differ in float32", error=difference / norm)
            return


def train_step(model: SigLipVisionModel, batch: Batch) -> dict[str, Tensor]:
    """Return the embeddings, and the gradients of the sum of their squares by parameter.

    Random numbers are the same in every step.
    """
    is_seeded = torch.random.fork_rng(devices=[])
    with is_seeded, torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(0)
        inputs = {name: value.clone() for name, value in batch.inputs.items()}
        embeddings = model.embed(**inputs)
        embeddings.square().sum().backward()
    result = {"embeddings": embeddings.detach()}
    if inputs["pixel_values"].requires_grad:  # set by the port, and computed for nothing
        result["gradients of pixel_values"] = inputs["pixel_values"]
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            result[f"gradients of {name}"] = parameter.grad
    model.zero_grad(set_to_none=True)
    return result


def check_input_embeddings(subject: Subject) -> Iterator[Finding]:
    """Compare the weight of `get_input_embeddings()` with the reference's."""
    weight = subject.port.get_input_embeddings().weight.detach()
    expected = subject.expected.host.compute(reference_features.input_embeddings)
    if expected.ndim == 2:  # a linear layer over patches, channels last
        weight = weight.permute(0, 2, 3, 1).flatten(1)
    yield from compare_bits("its parameters", {"weight": weight}, {"weight": expected})
