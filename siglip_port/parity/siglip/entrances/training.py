"""Entrances for training: recomputation of blocks, and the input embeddings."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from siglip_port.model import SigLipVisionModel
from siglip_port.parity.results import Finding
from siglip_port.parity.siglip import reference_features
from siglip_port.parity.siglip.entrances.subject import (
    Batch,
    Subject,
    compare,
    compare_bits,
    compare_model,
)


def check_checkpointing(subject: Subject) -> Iterator[Finding]:
    """Recompute blocks in the backward pass: the same outputs and gradients."""
    batch = subject.expected.batches[0]
    model = copy.deepcopy(subject.port).double().train()
    try:
        plain = gradients(model, batch)
    except RuntimeError:  # a port that works in place: the gate `gradients` reports it
        return
    for kwargs in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model.gradient_checkpointing_enable(kwargs)
        label = f"gradient_checkpointing_kwargs={kwargs}"
        if not model.is_gradient_checkpointing:
            yield Finding(f"{label}: is_gradient_checkpointing is False, expected True")
        recomputed = gradients(model, batch)
        if recomputed.keys() != plain.keys():
            yield Finding(f"{label}: {len(recomputed)} gradients, expected {len(plain)}")
            continue
        for name, gradient in recomputed.items():
            findings = [*compare(f"{label}: gradient of {name}", unchanged, gradient, plain[name])]
            yield from findings
            if findings:
                break
        yield from compare_model(label, model, batch)
    model.gradient_checkpointing_disable()
    if model.is_gradient_checkpointing:
        yield Finding("is_gradient_checkpointing is True after gradient_checkpointing_disable()")


def unchanged(tensor: Tensor) -> Tensor:
    """Return the tensor."""
    return tensor


def gradients(model: SigLipVisionModel, batch: Batch) -> dict[str, Tensor]:
    """Return the gradients of a sum of the embeddings, by parameter."""
    with torch.inference_mode(False), torch.enable_grad():
        inputs = {name: value.clone() for name, value in batch.inputs.items()}
        total = model.embed(**inputs).square().sum()
        parameters = dict(model.named_parameters())
        total.backward()
    values = {name: parameter.grad for name, parameter in parameters.items()}
    model.zero_grad(set_to_none=True)
    return {name: value for name, value in values.items() if value is not None}


def check_input_embeddings(subject: Subject) -> Iterator[Finding]:
    """Compare the weight of `get_input_embeddings()` with the reference's."""
    weight = subject.port.get_input_embeddings().weight.detach()
    expected = subject.expected.host.compute(reference_features.input_embeddings)
    if expected.ndim == 2:  # a linear layer over patches, channels last
        weight = weight.permute(0, 2, 3, 1).flatten(1)
    yield from compare_bits("its parameters", {"weight": weight}, {"weight": expected})
