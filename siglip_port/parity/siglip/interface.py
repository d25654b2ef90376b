"""The gate `interface`: `embed` and packed patches agree with `forward` and `pool`."""

from __future__ import annotations

import torch
from torch import Tensor

from siglip_port.model import SigLipVisionModel
from siglip_port.parity import bounds
from siglip_port.parity.gates import MEANING
from siglip_port.parity.metrics import relative_error, tensors_equal
from siglip_port.parity.results import Finding, GateResult
from siglip_port.parity.sides import cast
from siglip_port.patches import pack


def check_interface(port: SigLipVisionModel, pixel_values: Tensor) -> GateResult:
    """Compare `embed` with `forward` and `pool`, and packed patches with whole images.

    Args:
        port: Port in `eval()` mode.
        pixel_values: Images, [B, C, H, W], in the port's dtype.
    """
    checked = 1
    with torch.inference_mode():
        tokens = port(pixel_values)
        findings = check_token_shape(port, pixel_values, tokens)
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


def check_embed(port: SigLipVisionModel, pixel_values: Tensor, tokens: Tensor) -> list[Finding]:
    """Check that `embed` equals `pool(tokens)`, and has unit length with `normalize=True`."""
    findings = []
    pooled = port.pool(tokens)
    embedded = port.embed(pixel_values)
    if embedded.shape != pooled.shape or not tensors_equal(embedded, pooled):
        findings.append(Finding("embed() differs from pool(tokens)", "pooled", "embed"))
    normalized = port.embed(pixel_values, normalize=True)
    expected = pooled.double() / pooled.double().norm(dim=-1, keepdim=True)
    allowed = 4 * torch.finfo(normalized.dtype).eps
    same_shape = normalized.shape == pooled.shape
    if not same_shape or not relative_error(normalized, expected) <= allowed:
        message = "embed(normalize=True) differs from pooled / ||pooled||"
        findings.append(Finding(message, "pooled", "embed"))
    return findings


def check_packed_patches(port: SigLipVisionModel, pixel_values: Tensor) -> list[Finding]:
    """Check in float64 that packed patches give the same tokens as their image.

    The batch also contains a smaller image, so there is padding.
    """
    patch = port.config.patch_size
    height, width = pixel_values.shape[2:]
    smaller = pixel_values[0, :, : height - patch, : width - patch]
    with cast(port, pixel_values.dtype, torch.float64):
        images = [image.double() for image in (*pixel_values, smaller)]
        packed = port(**pack(images, patch))
        for tokens, image in zip(packed, images, strict=True):
            expected = port(image[None])[0]
            error = relative_error(tokens[: len(expected)], expected)
            if not bounds.within_float64_bound(error):
                message = (
                    f"packed patches of an image of {list(image.shape[1:])} pixels give other "
                    "tokens than the image itself"
                )
                return [Finding(message, "tokens", "forward")]
    return []
