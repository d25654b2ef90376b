"""Guesses by what stands at a tap: which bugs its module can have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from siglip_port.parity.hints.attention import attention_guesses, projection_guesses
from siglip_port.parity.hints.guess import Guess
from siglip_port.parity.hints.layers import (
    activation_guesses,
    convolution_guesses,
    layer_norm_guesses,
    linear_guesses,
)
from siglip_port.parity.hints.sums import embedding_guesses, residual_guesses


@dataclass(frozen=True)
class TapContext:
    """What is known of a tap.

    Attributes:
        modules: of the reference, by path.
        point: of the reference.
        module_input: what the module there was given, if anything.
        taps: the truth at all taps, in the order of the computation.
    """

    modules: Mapping[str, nn.Module]
    point: str
    module_input: Tensor | None
    taps: Mapping[str, Tensor]

    @property
    def path(self) -> str:
        """The path of the module."""
        return self.point.partition(":")[0]

    @property
    def part(self) -> str:
        """What of the module: `input`, `q`, `k`, `v`, `context`; empty for what it returns."""
        return self.point.partition(":")[2]

    @property
    def module(self) -> nn.Module:
        """The module."""
        return self.modules[self.path]

    @property
    def truth(self) -> Tensor:
        """What is right there."""
        return self.taps[self.point]

    @property
    def before(self) -> dict[str, Tensor]:
        """The truth at all earlier taps."""
        before = {}
        for name, tensor in self.taps.items():
            if name == self.point:
                break
            before[name] = tensor
        return before


def guesses_at(tap: TapContext) -> Iterator[Guess]:
    """The guesses for a tap, one after the other."""
    if isinstance(tap.module, nn.MultiheadAttention) and tap.part in ("q", "k", "v"):
        return guesses_inside_attention(tap.module, tap)
    if tap.part == "context":
        return context_guesses(tap, attention=tap.module)
    if tap.part == "input" and tap.path.endswith("proj"):
        return context_guesses(tap, attention=tap.modules[tap.path.rpartition(".")[0]])
    if tap.part == "input":
        return input_guesses(tap)
    return output_guesses(tap)


def guesses_inside_attention(attention: nn.MultiheadAttention, tap: TapContext) -> Iterator[Guess]:
    """For q, k or v of an `nn.MultiheadAttention`: a Linear made of a third of its rows."""
    projected = tap.module_input
    if tap.part != "q":  # keys and values are made of the tokens, the last thing before the head
        outside = [t for name, t in tap.before.items() if not name.startswith(tap.path)]
        projected = outside[-1] if outside else None
    if projected is not None:
        yield from projection_guesses(attention, tap.part, projected)


def context_guesses(tap: TapContext, attention: nn.Module) -> Iterator[Guess]:
    """For what attention makes of q, k and v, the last three taps."""
    heads = number_of_heads(attention)
    before = list(tap.before.values())
    if heads and len(before) >= 3:
        q, k, v = before[-3:]
        yield from attention_guesses(q, k, v, heads)


def number_of_heads(attention: nn.Module) -> int:
    """The number of heads of an attention module; 0 if it does not say."""
    for name in ("num_heads", "num_attention_heads"):
        heads = getattr(attention, name, 0)
        if heads:
            return int(heads)
    return 0


def input_guesses(tap: TapContext) -> Iterator[Guess]:
    """For what a module is given: an activation before a Linear, a sum before anything else."""
    if not isinstance(tap.module, nn.Linear):
        yield from residual_guesses(tap.before, tap.truth)
        return
    same_shape = [tensor for tensor in tap.before.values() if tensor.shape == tap.truth.shape]
    if same_shape:
        yield from activation_guesses(same_shape[-1])


def output_guesses(tap: TapContext) -> Iterator[Guess]:
    """For what a module returns."""
    module = tap.module
    x = tap.module_input
    if x is None:
        yield from sum_guesses(tap)
    elif isinstance(module, nn.LayerNorm):
        yield from layer_norm_guesses(module, x, tap.truth)
        yield from other_weights_guesses(tap, lambda other: layer_norm(other, x))
    elif isinstance(module, nn.Linear):
        yield from linear_guesses(module.weight, module.bias, x)
        yield from other_weights_guesses(
            tap, lambda other: nn.functional.linear(x, other.weight, other.bias)
        )
    elif isinstance(module, nn.Conv2d):
        yield from convolution_guesses(module, x)
    elif not list(module.children()):
        yield from activation_guesses(x)
    else:
        yield from sum_guesses(tap)


def sum_guesses(tap: TapContext) -> Iterator[Guess]:
    """For a module made of others, whose last step is a sum."""
    yield from embedding_guesses(tap.before, tap.truth)
    yield from residual_guesses(tap.before, tap.truth)


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """What a LayerNorm computes, without its hooks."""
    return nn.functional.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def other_weights_guesses(tap: TapContext, run: Callable[[Any], Tensor]) -> Iterator[Guess]:
    """The same module with the parameters of another one of its kind."""
    shapes = [parameter.shape for parameter in tap.module.parameters()]
    for name, module in tap.modules.items():
        if name == tap.path or type(module) is not type(tap.module):
            continue
        if [parameter.shape for parameter in module.parameters()] == shapes:
            yield f"it has the weights of {name}", run(module)


def guesses_from_other_taps(tap: TapContext) -> Iterator[Guess]:
    """The reference's numbers at another tap."""
    for name, tensor in tap.taps.items():
        if name != tap.point and tensor.shape == tap.truth.shape:
            yield f"it is what the reference has at {name}", tensor
