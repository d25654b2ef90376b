"""Random weights on which the bugs of a port are loud: the recipes N1, S1, L7 and L8.

A freshly initialized model hides bugs: its biases are 0, its LayerNorms the identity and its
attention almost uniform, so that whatever forgets, swaps or repeats one of them goes unseen. The
recipes were found by the survey that this project started with; docs/parity.md says what each of
them shows and what it hides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from siglip_port.parity.stress_weights import randomise


@dataclass(frozen=True)
class Recipe:
    """What is done to a tower after `randomise`.

    Attributes:
        purpose: what the weights are for.
        attention: factor on the weights of q and k: attention that is far from uniform.
        probe: factor on the pooling probe.
        shrink: whether all that is written into the residual stream is scaled by sqrt(eps), so that
            the LayerNorms' variances are of the size of their eps.
        tail: share of the MLPs' hidden units parked where the forms of GELU differ most, at
            `tail_at`.
        tail_at: where that is.
        amplify: size of the constants that cancel exactly and amplify rounding on the way; 0 for
            none.
        constant: size of the constant vector before the last LayerNorm that its bias takes out
            again; 0 for none.
    """

    purpose: str
    attention: float = 1.0
    probe: float = 1.0
    shrink: bool = False
    tail: float = 0.0
    tail_at: float = 0.0
    amplify: float = 0.0
    constant: float = 0.0


_L7 = Recipe(
    "tripwires: constants that cancel exactly amplify whatever rounds too much",
    attention=2.2,
    probe=2.0,
    shrink=True,
    tail=0.7,
    tail_at=-3.4,
    amplify=100.0,
)

RECIPES: dict[str, Recipe | None] = {
    "default": None,
    "N1": Recipe("nothing is zero, nothing is one: every part of the computation matters"),
    "S1": Recipe(
        "loud structure, quiet rounding: variances near eps, GELU's tail, sharp attention",
        attention=1.7,
        probe=2.0,
        shrink=True,
        tail=0.5,
        tail_at=-3.2,
    ),
    "L7": _L7,
    "L8": replace(
        _L7,
        purpose="L7, and a large constant before the last LayerNorm: makes its variance count",
        constant=30.0,
    ),
}
"""The recipes by name. `default` is none: a fresh initialisation, for comparison."""


@torch.no_grad()
def fill(tower: nn.Module, recipe: str, seed: int = 1234) -> None:
    """Fills a SigLIP tower whose tensors are named as in the flat HuggingFace layout, in place.

    Args:
        tower: transformers' `SiglipVisionModel`, of any release that names its tensors so, or the
            NaFlex one.
        recipe: one of `RECIPES`; `default` leaves the tower as its constructor left it.
        seed: of generators of their own; the global one is not touched.

    Raises:
        ValueError: there is no such recipe.
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")
    chosen = RECIPES[recipe]
    if chosen is None:
        return
    randomise(tower, seed)
    weights: dict[str, Tensor] = dict(tower.named_parameters())
    eps = next(part.eps for part in tower.modules() if isinstance(part, nn.LayerNorm))
    generator = torch.Generator().manual_seed(seed + 1)
    _sharpen_attention(weights, chosen)
    if chosen.tail:
        _park_in_the_tail(weights, chosen, generator)
    if chosen.shrink:
        for name, weight in weights.items():
            block_or_head = name.startswith(("encoder.layers", "head."))
            if "embedding" in name or (block_or_head and ("out_proj" in name or "fc2" in name)):
                weight.mul_(math.sqrt(eps))
    if chosen.amplify:
        _amplify_rounding(weights, chosen.amplify, math.sqrt(eps), generator)
    if chosen.constant:
        _lift_the_last_layernorm(weights, chosen.constant * math.sqrt(eps), generator)


def _sharpen_attention(weights: dict[str, Tensor], recipe: Recipe) -> None:
    for name, weight in weights.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight.mul_(recipe.attention)
        elif name.endswith("in_proj_weight"):
            weight[: 2 * weight.shape[1]] *= recipe.attention
        elif name.endswith("probe"):
            weight.mul_(recipe.probe)


def _park_in_the_tail(
    weights: dict[str, Tensor], recipe: Recipe, generator: torch.Generator
) -> None:
    """Gives a share of fc1's units inputs of N(tail_at, 0.25^2), and scales fc2 to what comes out of them."""
    spread = 0.25
    sample = recipe.tail_at + spread * torch.randn(4096, generator=generator)
    size = float(F.gelu(sample, approximate="tanh").square().mean().sqrt())
    for name, weight in weights.items():
        if name.endswith("fc1.weight"):
            mlp = name.removesuffix("fc1.weight")
            units = torch.randperm(len(weight), generator=generator)[
                : int(len(weight) * recipe.tail)
            ]
            # The LayerNorm before it, N1's, puts out vectors of mean square 1.65 + 0.25, or less
            # where eps counts.
            rows = weight[units]
            weight[units] = rows / rows.norm(dim=1, keepdim=True) * spread / 1.26
            weights[f"{mlp}fc1.bias"][units] = recipe.tail_at + 0.05 * torch.randn(
                len(units), generator=generator
            )
            weights[f"{mlp}fc2.weight"][:, units] *= 0.65 / size


def _amplify_rounding(
    weights: dict[str, Tensor], size: float, stream: float, generator: torch.Generator
) -> None:
    """Adds constants that change nothing in real numbers, and cost digits in floating point ones."""

    def trip(bias: str, readers: list[str], size: float, rows: slice = slice(None)) -> None:
        """Adds `size` N to a bias, and takes what its readers make of it out of theirs."""
        big = size * torch.randn(weights[bias][rows].shape, generator=generator)
        for reader in readers:
            weights[f"{reader}bias"] -= (weights[f"{reader}weight"].double() @ big.double()).to(
                big.dtype
            )
        weights[bias][rows] += big

    for name in list(weights):
        if name.endswith("layer_norm1.bias"):
            block = name.removesuffix("layer_norm1.bias")
            trip(name, [f"{block}self_attn.{part}_proj." for part in "qkv"], size)
            trip(f"{block}layer_norm2.bias", [f"{block}mlp.fc1."], size)
            trip(f"{block}self_attn.v_proj.bias", [f"{block}self_attn.out_proj."], 3 * size)
            key_bias = weights[f"{block}self_attn.k_proj.bias"]  # no output depends on it
            key_bias += 0.6 * size * torch.randn(key_bias.shape, generator=generator)
    if "head.attention.in_proj_bias" in weights:
        bias = weights["head.attention.in_proj_bias"]
        width = len(bias) // 3
        trip(
            "head.attention.in_proj_bias",
            ["head.attention.out_proj."],
            3 * size,
            slice(2 * width, None),
        )
        bias[width : 2 * width] += 0.6 * size * torch.randn(width, generator=generator)
    weights["embeddings.position_embedding.weight"] += (
        10 * size * stream
    )  # common to all: every LayerNorm removes it
    patches = weights["embeddings.patch_embedding.weight"]
    if patches.ndim == 4:  # High-pass filters: the rounding, order and resizing of pixels matter.
        ramp = torch.arange(patches.shape[-1])
        checkers = 1.0 - 2.0 * ((ramp[:, None] + ramp) % 2)
        noise = torch.randn(patches.shape, generator=generator) * patches.std()
        patches.copy_(4 * (0.03 * patches + 0.97 * checkers * noise))


def _lift_the_last_layernorm(
    weights: dict[str, Tensor], size: float, generator: torch.Generator
) -> None:
    """Adds a constant vector to all tokens after the last block, and takes it out of post_layernorm's result."""
    constant = size * torch.randn(weights["post_layernorm.bias"].shape, generator=generator)
    constant -= constant.mean()
    last = max(
        (name for name in weights if name.endswith("mlp.fc2.bias") and "layers" in name), key=_block
    )
    weights[last] += constant
    weights["post_layernorm.bias"] -= (
        weights["post_layernorm.weight"] * constant / constant.std(correction=0)
    )


def _block(name: str) -> int:
    return int(name.split(".")[2])
