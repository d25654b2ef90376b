"""Stress weights for SigLIP models: the recipes N1, S1, L7, L8 and O1.

A freshly initialized model hides bugs: biases are 0, LayerNorms are the identity and attention is
almost uniform, so omitting, swapping or repeating one of them changes no output. docs/parity.md
describes the recipes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from siglip_port.parity.siglip.outliers import add_outliers
from siglip_port.parity.stress_weights import randomize

Weights = dict[str, Tensor]
"""Parameters by name, modified in place."""


@dataclass(frozen=True)
class Recipe:
    """Changes to a model after `randomize`.

    Attributes:
        purpose: Purpose of the weights.
        attention: Factor on the weights of q and k, for attention far from uniform.
        probe: Factor on the pooling probe.
        shrink: Whether to scale all outputs to the residual stream by sqrt(eps), so that the
            variances in the LayerNorms are of the size of eps.
        tail: Share of the MLPs' hidden units with inputs near `tail_at`.
        tail_at: Input in the tail of GELU, where its variants differ most.
        amplify: Size of constants that cancel exactly and amplify rounding errors; 0 for none.
        constant: Size of a constant vector before the last LayerNorm, canceled by its bias; 0 for
            none.
        outliers: Size of outliers at every step; 0 for none.
        attention_outliers: Whether queries, keys, values and scores have outliers too.
    """

    purpose: str
    attention: float = 1.0
    probe: float = 1.0
    shrink: bool = False
    tail: float = 0.0
    tail_at: float = 0.0
    amplify: float = 0.0
    constant: float = 0.0
    outliers: float = 0.0
    attention_outliers: bool = True


L7 = Recipe(
    "constants that cancel exactly amplify rounding errors",
    attention=2.2,
    probe=2.0,
    shrink=True,
    tail=0.7,
    tail_at=-3.4,
    amplify=100.0,
)

RECIPES: dict[str, Recipe | None] = {
    "default": None,
    "N1": Recipe("no parameter is 0 or 1: every part of the computation affects the outputs"),
    "S1": Recipe(
        "variances near eps, units in the tail of GELU, sharp attention",
        attention=1.7,
        probe=2.0,
        shrink=True,
        tail=0.5,
        tail_at=-3.2,
    ),
    "L7": L7,
    "L8": replace(
        L7,
        purpose="L7 with a large constant before the last LayerNorm, which stresses its variance",
        constant=30.0,
    ),
    "O1": Recipe(
        "outliers of hundreds and thousands at every step, as in large models: clamps show",
        outliers=2500.0,
    ),
    "O2": Recipe(
        "outliers within float16's range, but for their squares: clamps of float16 show",
        outliers=1000.0,
        attention_outliers=False,
    ),
}
"""Recipes by name. `default` is None: a fresh initialization."""

TAIL_SPREAD = 0.25
"""Standard deviation of the inputs of hidden units in GELU's tail."""


@torch.no_grad()
def fill(model: nn.Module, recipe: str, seed: int = 1234) -> None:
    """Fill a SigLIP model with tensor names of the flat HuggingFace layout, in place.

    Args:
        model: transformers' `SiglipVisionModel` or `Siglip2VisionModel`.
        recipe: Name in `RECIPES`; `default` leaves the model unchanged.
        seed: Seed of local generators; the global one is not used.

    Raises:
        ValueError: The recipe does not exist.
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")
    steps = RECIPES[recipe]
    if steps is None:
        return
    randomize(model, seed)
    weights: Weights = dict(model.named_parameters())
    scale = math.sqrt(layer_norm_eps(model))
    generator = torch.Generator().manual_seed(seed + 1)
    sharpen_attention(weights, steps)
    if steps.tail:
        park_in_tail(weights, steps, generator)
    if steps.shrink:
        shrink_residual_stream(weights, scale)
    if steps.amplify:
        amplify_rounding(weights, steps.amplify, scale, generator)
    if steps.constant:
        lift_last_layer_norm(weights, steps.constant * scale, generator)
    if steps.outliers:
        add_outliers(
            weights,
            steps.outliers,
            num_attention_heads(model),
            generator,
            inside_attention=steps.attention_outliers,
        )


def layer_norm_eps(model: nn.Module) -> float:
    """Return the eps of the first LayerNorm."""
    return next(part.eps for part in model.modules() if isinstance(part, nn.LayerNorm))


def num_attention_heads(model: nn.Module) -> int:
    """Return the number of attention heads."""
    for part in model.modules():
        num_heads = getattr(part, "num_heads", None)
        if isinstance(num_heads, int):
            return num_heads
    raise ValueError("model must have an attention module with num_heads, got none")


def sharpen_attention(weights: Weights, recipe: Recipe) -> None:
    """Scale queries, keys and the probe."""
    for name, weight in weights.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight.mul_(recipe.attention)
        elif name.endswith("in_proj_weight"):
            weight[: 2 * weight.shape[1]] *= recipe.attention
        elif name.endswith("probe"):
            weight.mul_(recipe.probe)


def park_in_tail(weights: Weights, recipe: Recipe, generator: torch.Generator) -> None:
    """Move the inputs of a share of fc1's units to N(tail_at, 0.25^2), and rescale fc2."""
    sample = recipe.tail_at + TAIL_SPREAD * torch.randn(4096, generator=generator)
    activations = nn.functional.gelu(sample, approximate="tanh")
    size = float(activations.square().mean().sqrt())
    for name, weight in weights.items():
        if not name.endswith("fc1.weight"):
            continue
        mlp = name.removesuffix("fc1.weight")
        num_units = int(len(weight) * recipe.tail)
        units = torch.randperm(len(weight), generator=generator)[:num_units]
        # The LayerNorm before fc1 outputs vectors of mean square 1.65 + 0.25, or less if eps
        # matters.
        rows = weight[units]
        weight[units] = rows / rows.norm(dim=1, keepdim=True) * TAIL_SPREAD / 1.26
        noise = torch.randn(len(units), generator=generator)
        weights[f"{mlp}fc1.bias"][units] = recipe.tail_at + 0.05 * noise
        weights[f"{mlp}fc2.weight"][:, units] *= 0.65 / size


def shrink_residual_stream(weights: Weights, scale: float) -> None:
    """Scale all outputs to the residual stream."""
    for name, weight in weights.items():
        is_output = "out_proj" in name or "fc2" in name
        is_inside = name.startswith(("encoder.layers", "head."))
        if "embedding" in name or (is_inside and is_output):
            weight.mul_(scale)


def amplify_rounding(
    weights: Weights, size: float, stream: float, generator: torch.Generator
) -> None:
    """Add constants that cancel in exact arithmetic and lose digits in floating point.

    Args:
        weights: Parameters, modified in place.
        size: Size of the constants.
        stream: Scale of the residual stream.
        generator: Random generator.
    """
    for name in list(weights):
        if name.endswith("layer_norm1.bias"):
            block = name.removesuffix("layer_norm1.bias")
            add_constants_to_block(weights, block, size, generator)
    if "head.attention.in_proj_bias" in weights:
        add_constants_to_head(weights, size, generator)
    # The same for all features: every LayerNorm removes it.
    weights["embeddings.position_embedding.weight"] += 10 * size * stream
    patches = weights["embeddings.patch_embedding.weight"]
    if patches.ndim == 4:
        to_high_pass_filters(patches, generator)


def add_constants_to_block(
    weights: Weights, block: str, size: float, generator: torch.Generator
) -> None:
    """Add constants to the inputs of a block's Linears, and to the keys."""
    projections = [f"{block}self_attn.{part}_proj." for part in "qkv"]
    add_constant(weights, f"{block}layer_norm1.bias", projections, size, generator)
    add_constant(weights, f"{block}layer_norm2.bias", [f"{block}mlp.fc1."], size, generator)
    values = f"{block}self_attn.v_proj.bias"
    add_constant(weights, values, [f"{block}self_attn.out_proj."], 3 * size, generator)
    key_bias = weights[f"{block}self_attn.k_proj.bias"]  # no output depends on it
    key_bias += 0.6 * size * torch.randn(key_bias.shape, generator=generator)


def add_constants_to_head(weights: Weights, size: float, generator: torch.Generator) -> None:
    """Add constants to the values and keys of the pooling head, whose bias holds q, k and v."""
    bias = weights["head.attention.in_proj_bias"]
    width = len(bias) // 3
    values = slice(2 * width, None)
    readers = ["head.attention.out_proj."]
    add_constant(weights, "head.attention.in_proj_bias", readers, 3 * size, generator, rows=values)
    bias[width : 2 * width] += 0.6 * size * torch.randn(width, generator=generator)


def add_constant(
    weights: Weights,
    bias: str,
    readers: list[str],
    size: float,
    generator: torch.Generator,
    *,
    rows: slice = slice(None),
) -> None:
    """Add `size * N(0, 1)` to a bias, and subtract its effect from the biases of its readers."""
    constant = size * torch.randn(weights[bias][rows].shape, generator=generator)
    for reader in readers:
        effect = weights[f"{reader}weight"].double() @ constant.double()
        weights[f"{reader}bias"] -= effect.to(constant.dtype)
    weights[bias][rows] += constant


def to_high_pass_filters(patches: Tensor, generator: torch.Generator) -> None:
    """Fill the patch convolution with filters sensitive to rounding and order of pixels."""
    ramp = torch.arange(patches.shape[-1])
    checkers = 1.0 - 2.0 * ((ramp[:, None] + ramp) % 2)
    noise = torch.randn(patches.shape, generator=generator) * patches.std()
    patches.copy_(4 * (0.03 * patches + 0.97 * checkers * noise))


def lift_last_layer_norm(weights: Weights, size: float, generator: torch.Generator) -> None:
    """Add a constant vector to all tokens after the last block, canceled by post_layernorm."""
    constant = size * torch.randn(weights["post_layernorm.bias"].shape, generator=generator)
    constant -= constant.mean()
    weights[last_block_bias(weights)] += constant
    deviation = constant.std(correction=0)
    weights["post_layernorm.bias"] -= weights["post_layernorm.weight"] * constant / deviation


def last_block_bias(weights: Weights) -> str:
    """Return the name of the last bias that is added to the tokens."""
    names = [name for name in weights if name.endswith("mlp.fc2.bias") and "layers" in name]
    return max(names, key=lambda name: int(name.split(".")[2]))
