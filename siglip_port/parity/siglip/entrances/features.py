"""Entrances that compute: `forward`, `embed`, `pool`, hidden states and attention."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from siglip_port.model import SigLipVisionModel
from siglip_port.parity.metrics import relative_error
from siglip_port.parity.results import Finding
from siglip_port.parity.siglip.entrances.subject import (
    FLOAT32_ROUNDING,
    Batch,
    Subject,
    compare,
    compare_all,
    compare_model,
    tolerance,
)
from siglip_port.parity.siglip.entrances.traces import check_traces, has_gradients

MASK_DTYPES = (torch.bool, torch.int64, torch.int32, torch.float32)
"""Dtypes of masks; any nonzero value is a patch."""

SHAPE_DTYPES = (torch.int32, torch.int8)
"""Dtypes of shapes, which may be too narrow for their product."""


def check_forward(subject: Subject) -> Iterator[Finding]:
    """Compare tokens for every variant of the arguments."""
    dtype = next(subject.port.parameters()).dtype
    if subject.port.dtype != dtype:
        yield Finding(f"dtype is {subject.port.dtype}, that of the parameters is {dtype}")
        return
    batch = subject.expected.batches[0]
    first, second = (batch.valid(subject.port(**batch.inputs)) for _ in range(2))
    error = relative_error(second, first)
    if not error <= max(FLOAT32_ROUNDING, tolerance.get()):
        yield Finding("not deterministic: two calls differ; is there dropout?", error=error)
        return
    for batch in subject.expected.batches:
        expected = batch.valid(batch.expected.tokens)
        for variant, inputs in argument_forms(batch):

            def tokens(inputs: Mapping[str, Any], batch: Batch = batch) -> Tensor:
                return batch.valid(subject.port(**inputs))

            yield from compare(f"{batch.name}, {variant}", tokens, inputs, expected)


def check_embed(subject: Subject) -> Iterator[Finding]:
    """Compare embeddings for every variant of the arguments, with and without `normalize`."""
    for batch in subject.expected.batches:
        pooled = batch.expected.pooled
        norms = pooled.norm(dim=-1, keepdim=True)
        for variant, inputs in argument_forms(batch):
            for normalize, expected in ((False, pooled), (True, pooled / norms)):

                def embed(inputs: Mapping[str, Any], normalize: bool = normalize) -> Tensor:
                    return subject.port.embed(**inputs, normalize=normalize)

                label = f"{batch.name}, {variant}, normalize={normalize}"
                yield from compare(label, embed, inputs, expected)
        yield from check_gradients_of_unit_vectors(subject.port, batch)
    yield from check_short_embeddings(subject)


def check_gradients_of_unit_vectors(port: SigLipVisionModel, batch: Batch) -> Iterator[Finding]:
    """Compare the gradient through `normalize=True` with that of torch's `normalize`."""
    if not has_gradients(port, batch):
        return  # the gate `gradients` reports it
    gradients = []
    for normalize in (False, True):
        with torch.inference_mode(False), torch.enable_grad():
            pixels = batch.inputs["pixel_values"].clone().requires_grad_()
            embeddings = port.embed(**{**batch.inputs, "pixel_values": pixels}, normalize=normalize)
            unit = embeddings if normalize else F.normalize(embeddings, dim=-1)
            weights = torch.linspace(-1, 1, unit.shape[-1], dtype=unit.dtype)
            gradients.append(torch.autograd.grad((unit * weights).sum(), pixels)[0])
    error = relative_error(gradients[1], gradients[0])
    if not error <= max(FLOAT32_ROUNDING, tolerance.get()):
        yield Finding(f"{batch.name}, normalize=True: gradients differ", error=error)


def check_short_embeddings(subject: Subject) -> Iterator[Finding]:
    """Check that embeddings shorter than 1 are normalized to 1."""
    state = dict(subject.port.state_dict())
    for name, tensor in state.items():
        if name.startswith(("pooling_head.attention.out_proj", "pooling_head.mlp.fc2")):
            state[name] = 1e-3 * tensor
    model = SigLipVisionModel(subject.port.config).to(subject.port.dtype).eval()
    model.load_state_dict(state)
    batch = subject.expected.batches[0]
    embeddings = model.embed(**batch.inputs)
    expected = embeddings / embeddings.norm(dim=-1, keepdim=True)
    error = relative_error(model.embed(**batch.inputs, normalize=True), expected)
    if not error <= FLOAT32_ROUNDING:
        yield Finding("short embeddings, normalize=True: not of length 1", error=error)


def argument_forms(batch: Batch) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the forms in which a batch can be passed, each with a name."""
    yield "all images", batch.inputs
    if not batch.is_packed:
        return
    shapes = batch.inputs["spatial_shapes"]
    without_mask = {k: v for k, v in batch.inputs.items() if k != "pixel_attention_mask"}
    yield "default mask", without_mask
    yield "shapes as pairs", {**batch.inputs, "spatial_shapes": [tuple(s) for s in shapes.tolist()]}
    for dtype in SHAPE_DTYPES:
        yield f"shapes as {dtype}", {**without_mask, "spatial_shapes": shapes.to(dtype)}
    large = 255 * batch.packed_mask.to(torch.uint8)
    yield "mask of 0 and 255", {**batch.inputs, "pixel_attention_mask": large}
    for dtype in MASK_DTYPES:
        mask = batch.packed_mask.to(dtype)
        yield f"mask of {dtype}", {**batch.inputs, "pixel_attention_mask": mask}


def token_forms(batch: Batch) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the forms of the arguments of `pool` and `pooling_attention`."""
    tokens = batch.expected.tokens
    length = tokens.shape[1]
    inputs = {"tokens": tokens}
    if batch.mask is None:
        yield "no mask", inputs
        yield "transposed tokens", {"tokens": tokens.mT.contiguous().mT}
        yield (
            "tokens in a larger buffer",
            {"tokens": torch.cat([tokens + 1, tokens], 1)[:, -length:]},
        )
        yield (
            "mask of ones",
            {**inputs, "pixel_attention_mask": torch.ones(inputs["tokens"].shape[:2])},
        )
        return
    for dtype in MASK_DTYPES:
        yield f"mask of {dtype}", {**inputs, "pixel_attention_mask": batch.mask.to(dtype)}


def check_pool(subject: Subject) -> Iterator[Finding]:
    """Compare the pooling of the reference's tokens: by the head, and their mean."""
    averaging = mean_pooling_port(subject.port)
    for batch in subject.expected.batches:
        mean = mean_of(batch)
        for variant, inputs in token_forms(batch):
            label = f"{batch.name}, {variant}"
            yield from compare(
                label, lambda x: subject.port.pool(**x), inputs, batch.expected.pooled
            )
            yield from compare(
                f"mean_pooling=True, {label}", lambda x: averaging.pool(**x), inputs, mean
            )
        expected = replace(batch.expected, pooled=mean)
        yield from compare_model("mean_pooling=True", averaging, replace(batch, expected=expected))
    yield from check_dtype_of_tokens(subject)
    yield from check_mean_of_large_tokens(averaging, subject.expected.batches[0])


def check_mean_of_large_tokens(averaging: SigLipVisionModel, batch: Batch) -> Iterator[Finding]:
    """Average tokens in float16 whose sum leaves its range."""
    model = copy.deepcopy(averaging).half()
    mask = batch.inputs.get("pixel_attention_mask")
    tokens = torch.full_like(batch.expected.tokens, 30000.0, dtype=torch.float16)
    mean = model.pool(tokens, mask)
    if not torch.allclose(mean.float(), torch.tensor(30000.0), rtol=1e-2):
        yield Finding("mean_pooling=True: the mean of 30000 is another number in float16")


def check_dtype_of_tokens(subject: Subject) -> Iterator[Finding]:
    """Pool tokens of another dtype: the result has the model's."""
    batch = subject.expected.batches[0]
    result = subject.port.pool(batch.expected.tokens.bfloat16())
    if result.dtype != subject.port.dtype:
        yield Finding(
            f"tokens in bfloat16: the dtype of the result is {result.dtype}, expected "
            f"{subject.port.dtype}"
        )


def mean_of(batch: Batch) -> Tensor:
    """Average the tokens of the reference at patches: [B, D]."""
    means = []
    for i, tokens in enumerate(batch.expected.tokens):
        patches = tokens if batch.mask is None else tokens[batch.mask[i].bool()]
        means.append(patches.mean(dim=0))
    return torch.stack(means)


def mean_pooling_port(port: SigLipVisionModel) -> SigLipVisionModel:
    """Return the port with mean pooling instead of its head, and the same weights."""
    config = replace(port.config, pooling_head=False, mean_pooling=True)
    model = SigLipVisionModel(config).to(port.dtype).eval()
    state = port.state_dict()
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    return model


def check_hidden_states(subject: Subject) -> Iterator[Finding]:
    """Compare all layers, in any order, before and after the last LayerNorm, as maps."""
    count = subject.port.config.num_encoder_blocks + 1
    for batch in subject.expected.batches:
        for layers in ([*range(count)], [*range(-count, 0)], [2, 0, -1, 1, -1], [-1, 0], [1]):
            for normed in (False, True):
                yield from compare_states(subject, batch, layers, normed=normed)
                if batch.grid is not None:
                    yield from compare_state_maps(subject, batch, layers, normed=normed)
        yield from check_gradients_of_states(subject, batch)
    yield from check_traces(subject, "hidden_states")


def check_gradients_of_states(subject: Subject, batch: Batch) -> Iterator[Finding]:
    """Check that hidden states have gradients, as models that are trained on them need."""
    if not any(parameter.requires_grad for parameter in subject.port.parameters()):
        return  # a finding of `from_hf`
    with torch.inference_mode(False), torch.enable_grad():
        inputs = {name: value.clone() for name, value in batch.inputs.items()}
        states = subject.port.hidden_states(**inputs, layers=[0, 1, -1])
    for layer, state in zip((0, 1, -1), states, strict=True):
        if not state.requires_grad:
            yield Finding(f"{batch.name}, layers=[{layer}]: has no gradients, expected some")


def compare_states(
    subject: Subject, batch: Batch, layers: list[int], *, normed: bool
) -> Iterator[Finding]:
    """Compare hidden states [B, N, D] of some layers."""

    def compute(inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        values = subject.port.hidden_states(**inputs, layers=layers, post_layernorm=normed)
        return tuple(batch.valid(value) for value in values)

    states = batch.expected.normed_states if normed else batch.expected.hidden_states
    label = f"{batch.name}, layers={layers}, post_layernorm={normed}"
    names = [f"{label}: layer {layer}" for layer in layers]
    exact = [batch.valid(states[layer]) for layer in layers]
    yield from compare_all(names, compute, batch.inputs, exact)


def compare_state_maps(
    subject: Subject, batch: Batch, layers: list[int], *, normed: bool
) -> Iterator[Finding]:
    """Compare hidden states of whole images as maps [B, D, h, w]."""

    def compute(inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        return subject.port.hidden_states(
            **inputs, layers=layers, post_layernorm=normed, as_maps=True
        )

    states = batch.expected.normed_states if normed else batch.expected.hidden_states
    label = f"{batch.name}, layers={layers}, post_layernorm={normed}, as_maps=True"
    names = [f"{label}: layer {layer}" for layer in layers]
    exact = []
    for layer in layers:
        exact.append(states[layer].transpose(1, 2).unflatten(2, batch.grid))
    yield from compare_all(names, compute, batch.inputs, exact)


def check_attention_maps(subject: Subject) -> Iterator[Finding]:
    """Compare the attention weights of all blocks, in any order."""
    count = subject.port.config.num_encoder_blocks
    for batch in subject.expected.batches:
        for layers in ([*range(count)], [*range(-count, 0)], [1, 0, -1, 1], [1]):
            yield from compare_attention(subject, batch, layers)
    batch = subject.expected.batches[0]
    (weights,) = subject.port.attention_maps(**batch.inputs, layers=[0])
    yield from check_dtype(subject.port, weights)
    yield from check_traces(subject, "attention_maps")


def check_dtype(port: SigLipVisionModel, weights: Tensor) -> Iterator[Finding]:
    """Check that attention weights have the model's dtype."""
    if weights.dtype != port.dtype:
        yield Finding(f"the dtype is {weights.dtype}, expected {port.dtype}")


def compare_attention(subject: Subject, batch: Batch, layers: list[int]) -> Iterator[Finding]:
    """Compare attention weights [B, H, N, N] of some blocks, without the rows of padding."""

    def compute(inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        values = subject.port.attention_maps(**inputs, layers=layers)
        return tuple(batch.valid(value.transpose(1, 2)) for value in values)

    names = [f"{batch.name}, layers={layers}: block {layer}" for layer in layers]
    exact = [batch.valid(batch.expected.attentions[i].transpose(1, 2)) for i in layers]
    yield from compare_all(names, compute, batch.inputs, exact)


def check_pooling_attention(subject: Subject) -> Iterator[Finding]:
    """Compare the attention weights of the pooling head, with and without a mask."""
    for batch in subject.expected.batches:
        for variant, inputs in token_forms(batch):
            yield from compare(
                f"{batch.name}, {variant}",
                lambda x: subject.port.pooling_attention(**x),
                inputs,
                batch.expected.pooling_attention,
            )
    tokens = subject.expected.batches[0].expected.tokens
    mask = subject.expected.batches[0].mask
    yield from check_dtype(subject.port, subject.port.pooling_attention(tokens, mask))
