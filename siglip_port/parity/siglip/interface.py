"""The gate `interface` on any checkpoint: methods of the port agree with `forward` and `pool`.

`siglip_port.parity.siglip.entrances` compares every entrance with the reference, on small models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from siglip_port.model import SigLipVisionModel
from siglip_port.parity.gates import MEANING
from siglip_port.parity.metrics import relative_error
from siglip_port.parity.results import Finding, GateResult
from siglip_port.parity.sides import cast
from siglip_port.parity.siglip.entrances.subject import compare
from siglip_port.patches import pack


def check_interface(port: SigLipVisionModel, pixel_values: Tensor) -> GateResult:
    """Compare `embed` and `hidden_states` with `forward`, and packed patches with whole images.

    Args:
        port: Port in `eval()` mode.
        pixel_values: Images, [B, C, H, W], in the port's dtype.
    """
    checked = 2
    with torch.inference_mode():
        tokens = port(pixel_values)
        findings = check_token_shape(port, pixel_values, tokens)
        if not findings:
            findings += check_last_state(port, pixel_values, tokens)
        if port.pooling_head is not None:
            checked += 2
            findings += check_embed(port, pixel_values, tokens)
        if port.config.naflex:
            checked += 1
            findings += check_packed_patches(port, pixel_values)
    return GateResult("interface", checked, MEANING["interface"].bound, tuple(findings))


def check_token_shape(
    port: SigLipVisionModel, pixel_values: Tensor, tokens: Tensor
) -> list[Finding]:
    """Check the shape of the tokens: one per whole patch."""
    patch = port.config.patch_size
    batch, _, height, width = pixel_values.shape
    expected = (batch, (height // patch) * (width // patch), port.config.embed_dim)
    if tokens.shape == expected:
        return []
    message = f"shape {list(tokens.shape)}, expected {list(expected)}"
    return [Finding(message, "tokens", "forward")]


def agree(value: Tensor, expected: Tensor) -> bool:
    """Return whether two results of one computation agree to half the digits of their dtype.

    They need not be equal bit for bit: sums may be computed in another order.
    """
    if value.shape != expected.shape:
        return False
    return relative_error(value, expected) <= math.sqrt(torch.finfo(value.dtype).eps)


def check_last_state(
    port: SigLipVisionModel, pixel_values: Tensor, tokens: Tensor
) -> list[Finding]:
    """Check that the last hidden state, after the final LayerNorm, is the tokens."""
    states = port.hidden_states(pixel_values, layers=[1, -1], post_layernorm=True)
    if len(states) == 2 and agree(states[1], tokens):
        return []
    message = "hidden_states(layers=[1, -1], post_layernorm=True)[1] differs from the tokens"
    return [Finding(message, "hidden_states", "hidden_states")]


def check_embed(port: SigLipVisionModel, pixel_values: Tensor, tokens: Tensor) -> list[Finding]:
    """Check that `embed` equals `pool(tokens)`, and has unit length with `normalize=True`."""
    findings = []
    pooled = port.pool(tokens)
    if not agree(port.embed(pixel_values), pooled):
        findings.append(Finding("embed() differs from pool(tokens)", "pooled", "embed"))
    unit = pooled.double() / pooled.double().norm(dim=-1, keepdim=True)
    if not agree(port.embed(pixel_values, normalize=True), unit):
        message = "embed(normalize=True) differs from pooled / ||pooled||"
        findings.append(Finding(message, "pooled", "embed"))
    return findings


def check_packed_patches(port: SigLipVisionModel, pixel_values: Tensor) -> Iterator[Finding]:
    """Check in float64 that packed patches give the same tokens as their image.

    The batch also contains a smaller image, so there is padding.
    """
    patch = port.config.patch_size
    height, width = pixel_values.shape[2:]
    smaller = pixel_values[0, :, : height - patch, : width - patch]
    with cast(port, pixel_values.dtype, torch.float64):
        images = [image.double() for image in (*pixel_values, smaller)]
        inputs: dict[str, Any] = {**pack(images, patch)}
        for number, image in enumerate(images):
            expected = port(image[None])[0]

            def tokens(
                packed: Mapping[str, Any], number: int = number, count: int = len(expected)
            ) -> Tensor:
                values: Tensor = port(**packed)
                return values[number, :count]

            label = f"packed patches of an image of {list(image.shape[1:])} pixels"
            for finding in compare(label, tokens, inputs, expected):
                yield Finding(finding.message, "tokens", "forward", finding.error)
                return
