"""Guesses for a tap: the bugs that its module can have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from siglip_port.parity.hints.attention import attention_guesses, projection_guesses
from siglip_port.parity.hints.channel_norms import (
    batch_norm_guesses,
    factor_guesses,
    group_norm_guesses,
)
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
    """The reference around a tap.

    Attributes:
        modules: Modules of the reference, by path.
        point: Point of the reference.
        module_input: Input of the module at the tap, if any.
        taps: Exact values at all taps, in order of computation.
    """

    modules: Mapping[str, nn.Module]
    point: str
    module_input: Tensor | None
    taps: Mapping[str, Tensor]

    @property
    def path(self) -> str:
        """Path of the module."""
        return self.point.partition(":")[0]

    @property
    def part(self) -> str:
        """`input`, `q`, `k`, `v` or `context`; empty for the output of the module."""
        return self.point.partition(":")[2]

    @property
    def module(self) -> nn.Module:
        """Module at the tap."""
        return self.modules[self.path]

    @property
    def exact(self) -> Tensor:
        """Exact value at the tap."""
        return self.taps[self.point]

    @property
    def before(self) -> dict[str, Tensor]:
        """Exact values at all earlier taps."""
        before = {}
        for name, tensor in self.taps.items():
            if name == self.point:
                break
            before[name] = tensor
        return before


def guesses_at(tap: TapContext) -> Iterator[Guess]:
    """Yield the guesses for a tap."""
    if isinstance(tap.module, nn.MultiheadAttention) and tap.part in ("q", "k", "v"):
        return guesses_inside_attention(tap.module, tap)
    if tap.part == "context":
        return context_guesses(tap, attention=tap.module)
    if tap.part == "input":
        attention = surrounding_attention(tap)
        if attention is not None:
            return context_guesses(tap, attention)
        return input_guesses(tap)
    return output_guesses(tap)


def guesses_inside_attention(attention: nn.MultiheadAttention, tap: TapContext) -> Iterator[Guess]:
    """Yield guesses for q, k or v of an `nn.MultiheadAttention`."""
    projected = tap.module_input
    if tap.part != "q":  # keys and values are projections of the tokens, the last tap before
        outside = [tensor for name, tensor in tap.before.items() if not name.startswith(tap.path)]
        projected = outside[-1] if outside else None
    if projected is not None:
        yield from projection_guesses(attention, tap.part, projected)


def context_guesses(tap: TapContext, attention: nn.Module) -> Iterator[Guess]:
    """Yield guesses for the context: attention of q, k and v, the last three taps."""
    heads = number_of_heads(attention)
    before = list(tap.before.values())
    if heads and len(before) >= 3:
        q, k, v = before[-3:]
        yield from attention_guesses(q, k, v, heads)


def surrounding_attention(tap: TapContext) -> nn.Module | None:
    """Return the attention whose context is the input of a Linear; None if it is another one.

    The last three taps are q, k and v, and a module around or beside the Linear knows the heads.
    """
    before = dict(list(tap.before.items())[-3:])
    if not isinstance(tap.module, nn.Linear) or len(before) < 3:
        return None
    if any(tensor.shape[-1] != tap.exact.shape[-1] for tensor in before.values()):
        return None
    around = tap.path.rpartition(".")[0]
    for path in (around, around.rpartition(".")[0]):
        if not path or not all(name.startswith(f"{path}.") for name in before):
            continue
        for name, module in tap.modules.items():
            if f"{name}.".startswith(f"{path}.") and number_of_heads(module):
                return module
    return None


def number_of_heads(attention: nn.Module) -> int:
    """Return the number of heads of an attention module; 0 if it has no such attribute."""
    for name in ("num_heads", "num_attention_heads"):
        heads = getattr(attention, name, 0)
        if heads:
            return int(heads)
    return 0


def input_guesses(tap: TapContext) -> Iterator[Guess]:
    """Yield guesses for the input of a module: an activation for one with weights, or a sum."""
    if not isinstance(tap.module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        yield from residual_guesses(tap.before, tap.exact)
        return
    same_shape = [tensor for tensor in tap.before.values() if tensor.shape == tap.exact.shape]
    if same_shape:
        yield from activation_guesses(same_shape[-1], tap.exact)


def output_guesses(tap: TapContext) -> Iterator[Guess]:
    """Yield guesses for the output of a module."""
    module = tap.module
    x = tap.module_input
    if x is None:
        yield from sum_guesses(tap)
    elif isinstance(module, nn.LayerNorm):
        yield from layer_norm_guesses(module, x, tap.exact)
        yield from other_weights_guesses(tap, lambda other: layer_norm(other, x))
    elif isinstance(module, nn.Linear):
        yield from linear_guesses(module.weight, module.bias, x)
        yield from other_weights_guesses(
            tap, lambda other: nn.functional.linear(x, other.weight, other.bias)
        )
    elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        yield from convolution_guesses(module, x)
    elif isinstance(module, _BatchNorm):
        yield from batch_norm_guesses(module, x)
    elif isinstance(module, nn.GroupNorm):
        yield from group_norm_guesses(module, x)
    elif not list(module.children()):
        yield from factor_guesses(module, x, tap.exact)
        yield from activation_guesses(x, tap.exact)
    else:
        yield from sum_guesses(tap)


def sum_guesses(tap: TapContext) -> Iterator[Guess]:
    """Yield guesses for a module with children, whose last step is a sum."""
    yield from embedding_guesses(tap.before, tap.exact)
    yield from residual_guesses(tap.before, tap.exact)


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Compute a LayerNorm without its hooks."""
    return nn.functional.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def other_weights_guesses(tap: TapContext, run: Callable[[Any], Tensor]) -> Iterator[Guess]:
    """Yield the module with the parameters of every other module of its type and shapes."""
    shapes = [parameter.shape for parameter in tap.module.parameters()]
    for name, module in tap.modules.items():
        if name == tap.path or type(module) is not type(tap.module):
            continue
        if [parameter.shape for parameter in module.parameters()] == shapes:
            yield f"weights of {name}", run(module)


def guesses_from_other_taps(tap: TapContext) -> Iterator[Guess]:
    """Yield the exact values at all other taps."""
    for name, tensor in tap.taps.items():
        if name != tap.point and tensor.shape == tap.exact.shape:
            yield f"same as the reference at {name}", tensor
