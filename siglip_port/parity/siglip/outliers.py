"""Weights with outliers: values of hundreds and thousands at every step, as in large models.

Trained models have massive activations: a few channels of the residual stream reach thousands. A
port that clamps anywhere (to float16's range, or at 100 for stability) computes them wrongly. Here,
constants are added to every step, and its readers subtract their effect, so that everything else
stays of size 1 and softmax and GELU stay sensitive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Weights = dict[str, Tensor]
"""Parameters by name, modified in place."""

STEADY = 1e-3
"""Factor on the weights of a feature that is to be nearly the same for all tokens."""


class Linear(NamedTuple):
    """Weight [O, I] and bias [O] of a linear layer, or views of a part of a fused one."""

    weight: Tensor
    bias: Tensor

    def absorb(self, constant: Tensor) -> None:
        """Subtract the effect of a constant input [I] from the bias."""
        effect = self.weight.double() @ constant.double()
        self.bias.sub_(effect.to(self.bias.dtype))


class Attention(NamedTuple):
    """Linear layers of one attention module."""

    q: Linear
    k: Linear
    v: Linear
    out: Linear


def add_outliers(
    weights: Weights,
    size: float,
    num_heads: int,
    generator: torch.Generator,
    *,
    inside_attention: bool = True,
) -> None:
    """Add outliers to every step of a SigLIP model.

    Args:
        weights: Parameters, modified in place.
        size: Size of the largest outliers.
        num_heads: Number of attention heads.
        generator: Random generator, which chooses the channels.
        inside_attention: Whether the probe, queries, keys, values and scores have outliers too;
            their products leave the range of float16.
    """
    adder = OutlierAdder(weights, size, num_heads, generator, inside_attention=inside_attention)
    stream = adder.draw("post_layernorm.bias")
    adder.add_to_embeddings(stream)
    for name in list(weights):
        if name.endswith("layer_norm1.bias"):
            adder.add_to_block(name.removesuffix("layer_norm1.bias"), stream)
    readers = []
    if "head.probe" in weights:
        attention = adder.head_attention()
        readers = [attention.k, attention.v]
        adder.add_to_head(attention)
    adder.lift_layer_norm("post_layernorm", stream, readers)


class OutlierAdder:
    """Adds outliers to the steps of a model, and subtracts their effect from the readers.

    Args:
        weights: Parameters, modified in place.
        size: Size of the largest outliers.
        num_heads: Number of attention heads.
        generator: Random generator.
        inside_attention: Whether the probe, queries, keys, values and scores have outliers too.
    """

    def __init__(
        self,
        weights: Weights,
        size: float,
        num_heads: int,
        generator: torch.Generator,
        *,
        inside_attention: bool,
    ) -> None:
        self.weights = weights
        self.size = size
        self.num_heads = num_heads
        self.generator = generator
        self.inside_attention = inside_attention

    def draw(self, bias: str) -> Tensor:
        """Return a vector of the width of a bias: four outliers of mean 0, everything else 0."""
        constant = torch.zeros_like(self.weights[bias])
        channels = torch.randperm(len(constant), generator=self.generator)[:4]
        constant[channels] = self.size * torch.tensor([1.0, -1.0, 0.5, -0.5])
        return constant

    def linear(self, name: str) -> Linear:
        """Return a linear layer by name."""
        return Linear(self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def head_attention(self) -> Attention:
        """Return the attention of the pooling head, whose projections are fused."""
        weights = self.weights["head.attention.in_proj_weight"].chunk(3)
        biases = self.weights["head.attention.in_proj_bias"].chunk(3)
        q, k, v = map(Linear, weights, biases)
        return Attention(q, k, v, self.linear("head.attention.out_proj"))

    def add_to_embeddings(self, stream: Tensor) -> None:
        """Give patches and positions outliers that cancel, and the residual stream its own."""
        patches = self.draw("embeddings.patch_embedding.bias")
        self.weights["embeddings.patch_embedding.bias"] += patches
        self.weights["embeddings.position_embedding.weight"] += stream - patches

    def add_to_block(self, block: str, stream: Tensor) -> None:
        """Add outliers to every step of a block; the stream leaves it as it came."""
        names = [f"{block}self_attn.{part}_proj" for part in ("q", "k", "v", "out")]
        attention = Attention(*map(self.linear, names))
        self.lift_layer_norm(f"{block}layer_norm1", stream, attention[:3])
        self.add_to_attention(attention)
        attended = self.draw(f"{block}self_attn.out_proj.bias")
        attention.out.bias.add_(attended)
        fc1 = self.linear(f"{block}mlp.fc1")
        self.lift_layer_norm(f"{block}layer_norm2", stream + attended, [fc1])
        self.add_to_mlp(f"{block}mlp")
        self.weights[f"{block}mlp.fc2.bias"] -= attended

    def add_to_head(self, attention: Attention) -> None:
        """Add outliers to every step of the pooling head, and to its output."""
        if self.inside_attention:
            probe = self.draw("head.layernorm.bias")
            self.weights["head.probe"] += probe
            attention.q.absorb(probe)
        self.add_to_attention(attention)
        attended = self.draw("head.layernorm.bias")
        attention.out.bias.add_(attended)
        self.lift_layer_norm("head.layernorm", attended, [self.linear("head.mlp.fc1")])
        self.add_to_mlp("head.mlp")
        self.weights["head.mlp.fc2.bias"] += self.draw("head.mlp.fc2.bias")

    def lift_layer_norm(self, name: str, constant: Tensor, readers: Sequence[Linear]) -> None:
        """Let a LayerNorm output the outliers of its input, which its readers subtract.

        The outliers dominate the variance. The weight, scaled by their standard deviation, restores
        the size of all other features.

        Args:
            name: Name of the LayerNorm.
            constant: Outliers of its input, of mean 0.
            readers: Linear layers that read its output.
        """
        weight = self.weights[f"{name}.weight"]
        for reader in readers:
            reader.absorb(weight * constant)
        weight.mul_(constant.std(correction=0))

    def add_to_attention(self, attention: Attention) -> None:
        """Add outliers to queries, keys, values and scores, in three features of every head.

        Scores change by the same amount for all keys, which softmax removes: a large key by
        query * key, which no key affects, and a large query by its product with a steady key.
        """
        if not self.inside_attention:
            return
        head_dim = len(attention.q.bias) // self.num_heads
        signs = torch.ones(self.num_heads)
        signs[1::2] = -1
        outliers = self.size * signs
        first = slice(0, None, head_dim)
        attention.k.weight[first] *= STEADY
        attention.q.bias[first] += outliers
        attention.k.bias[1::head_dim] += outliers
        values = torch.zeros_like(attention.v.bias)
        values[2::head_dim] = outliers
        attention.v.bias.add_(values)
        attention.out.absorb(values)

    def add_to_mlp(self, mlp: str) -> None:
        """Add outliers of both signs to hidden units; those below 0 become 0 in GELU."""
        hidden = self.draw(f"{mlp}.fc1.bias")
        self.weights[f"{mlp}.fc1.bias"] += hidden
        self.linear(f"{mlp}.fc2").absorb(hidden.clamp(min=0))
