"""Taps: the points at which port and reference are compared inside, by forward hooks alone.

A *point* is a text: the path of a module for what it returns, `path:input` for what it is given,
and, for an `nn.MultiheadAttention`, which has no modules inside, `path:q`, `path:k`, `path:v` and
`path:context`. A tap pairs a point of the reference with one of the port.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Visit = Callable[[str, Tensor], Tensor | None]
"""Called with a point and the tensor seen there.

A tensor that it returns takes the place of the one seen.
"""

INSIDE_ATTENTION = ("q", "k", "v", "context")


@dataclass(frozen=True)
class Tap:
    """One place of the computation, by its points in the reference and in the port."""

    reference: str
    port: str


def port_to_reference(taps: list[Tap]) -> dict[str, str]:
    """The points of the port -> those of the reference."""
    return {tap.port: tap.reference for tap in taps}


def reference_to_port(taps: list[Tap]) -> dict[str, str]:
    """The points of the reference -> those of the port."""
    return {tap.reference: tap.port for tap in taps}


class Point(NamedTuple):
    """A point, taken apart.

    Attributes:
        path: of the module.
        part: `output`, `input`, or one of `INSIDE_ATTENTION`.
    """

    path: str
    part: str

    @classmethod
    def parse(cls, text: str) -> Point:
        """Read `path` or `path:part`."""
        path, _, part = text.partition(":")
        return cls(path, part or "output")


def expand(taps: Mapping[str, str], reference: nn.Module, port: nn.Module) -> list[Tap]:
    """Spell taps out: `{}` stands for the number of a block, every one that the reference has.

    Raises:
        ValueError: a point is malformed, or names no module of its side at all. (A port that lacks
            some of the blocks is another matter: that is a finding.)
    """
    reference_modules = dict(reference.named_modules())
    port_modules = dict(port.named_modules())
    expanded = []
    for reference_point, port_point in taps.items():
        numbers = block_numbers(reference_point, reference_modules)
        port_numbers = block_numbers(port_point, port_modules)
        tap = f"{reference_point!r}: {port_point!r}"
        if not numbers:
            raise unknown_module("reference", reference_point, reference_modules, tap)
        if not port_numbers:
            raise unknown_module("port", port_point, port_modules, tap)
        for number in numbers:
            expanded.append(
                Tap(reference_point.replace("{}", number), port_point.replace("{}", number))
            )
    return expanded


def block_numbers(point: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """What `{}` in a point can stand for; a single empty text for a point without it."""
    path, part = Point.parse(point)
    if part not in ("output", "input", *INSIDE_ATTENTION):
        raise ValueError(f"{point!r}: after the colon comes input, q, k, v or context")
    pattern = re.compile(re.escape(path).replace(r"\{\}", r"(\d+)"))
    numbers = []
    for name, module in modules.items():
        match = pattern.fullmatch(name)
        if match is None:
            continue
        if part in INSIDE_ATTENTION and not isinstance(module, nn.MultiheadAttention):
            raise ValueError(
                f"{point!r}: only an nn.MultiheadAttention has :{part}; tap the projection itself"
            )
        numbers.append(match[1] if match.lastindex else "")
    return numbers


def unknown_module(side: str, point: str, modules: Mapping[str, nn.Module], tap: str) -> ValueError:
    """The error for a point whose module a side does not have."""
    path = Point.parse(point).path
    similar = [name for name in modules if name.endswith(path.rsplit(".")[-1])]
    hint = f"; modules that end like it: {', '.join(similar[:5])}" if similar else ""
    return ValueError(f"the {side} has no module {path!r}, which the tap {tap} names{hint}")


@contextlib.contextmanager
def listening(module: nn.Module, points: list[str], visit: Visit) -> Iterator[None]:
    """Call `visit` whenever the computation of `module` passes one of `points`.

    Points that it does not have are passed by.

    An input is replaced in place, where its memory allows, so that a residual connection, which
    reads the same tensor behind the hook's back, goes on with the replacement too.
    """
    modules = dict(module.named_modules())
    handles = []
    for point in points:
        path, part = Point.parse(point)
        if path not in modules:
            continue
        target = modules[path]
        if part == "input":
            hook = input_hook(point, visit)
            handles.append(target.register_forward_pre_hook(hook, with_kwargs=True))
        elif part == "output":
            handles.append(target.register_forward_hook(output_hook(point, visit)))
        else:
            hook = attention_hook(point, part, visit)
            handles.append(target.register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def output_hook(point: str, visit: Visit) -> Callable[..., object]:
    """A forward hook that visits what a module returns: the first tensor of a tuple or list.

    Of transformers' attention, the second is its weights.
    """

    def hook(_: nn.Module, inputs: object, output: object) -> object:
        if isinstance(output, Tensor):
            return visit(point, output)
        if not isinstance(output, (tuple, list)) or not isinstance(output[0], Tensor):
            return None
        replacement = visit(point, output[0])
        if replacement is None:
            return None
        return type(output)((replacement, *output[1:]))

    return hook


def input_hook(point: str, visit: Visit) -> Callable[..., object]:
    """A forward pre-hook that visits what a module is given: its first tensor."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        name, tensor = first_tensor(args, kwargs)
        if tensor is None:
            return None
        replacement = visit(point, tensor)
        if replacement is None:
            return None
        if is_writable(tensor):
            tensor.copy_(replacement)
            return None
        if args:
            return (replacement, *args[1:]), kwargs
        return args, {**kwargs, name: replacement}

    return hook


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str, Tensor | None]:
    """What a module is given: its first argument or, without any, its first named tensor.

    Returns:
        Its name, which is empty for an argument without; and the tensor, if it is one.
    """
    if args:
        return "", args[0] if isinstance(args[0], Tensor) else None
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            return name, value
    return "", None


def is_writable(tensor: Tensor) -> bool:
    """Whether every element has memory of its own, which is no parameter's."""
    if isinstance(tensor, nn.Parameter):
        return False
    layout = zip(tensor.shape, tensor.stride(), strict=True)
    return not any(size > 1 and stride == 0 for size, stride in layout)


def attention_hook(point: str, part: str, visit: Visit) -> Callable[..., None]:
    """A forward hook that visits what an `nn.MultiheadAttention` computes inside."""

    def hook(
        attention: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any], _: object
    ) -> None:
        inputs = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        visit(point, inside_attention(attention, inputs)[part])

    return hook


def inside_attention(
    attention: nn.MultiheadAttention, inputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Work out again what an `nn.MultiheadAttention` computes inside.

    Only for `batch_first`, one width for all, and without masks: what SigLIP has.

    Args:
        attention: the module.
        inputs: `query`, `key` and `value`, [B, N, D].

    Returns:
        `q`, `k`, `v` and `context`, [B, N, D].
    """
    assert attention.in_proj_weight is not None
    assert attention.in_proj_bias is not None
    weights = attention.in_proj_weight.chunk(3)
    biases = attention.in_proj_bias.chunk(3)
    projected = {}
    for i, (part, name) in enumerate((("q", "query"), ("k", "key"), ("v", "value"))):
        projected[part] = nn.functional.linear(inputs[name], weights[i], biases[i])
    heads = [x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for x in projected.values()]
    context = nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    return {**projected, "context": context}


@dataclass(frozen=True)
class Recording:
    """One run of one side.

    Attributes:
        outputs: what it returned, by name.
        taps: what passed the points, in the order in which it came by. A module that was called
            several times, for one image after the other, counts as called once for all.
    """

    outputs: dict[str, Tensor]
    taps: dict[str, Tensor]


def record(module: nn.Module, points: list[str], run: Callable[[], dict[str, Tensor]]) -> Recording:
    """Run a side and keep what passes its points."""
    parts: dict[str, list[Tensor]] = {}

    def keep(point: str, tensor: Tensor) -> None:
        parts.setdefault(point, []).append(tensor.clone())

    with torch.inference_mode(), listening(module, points, keep):
        outputs = run()
    return Recording(outputs, {point: join(tensors) for point, tensors in parts.items()})


def join(parts: list[Tensor]) -> Tensor:
    """The parts of a tensor, one after the other along the first axis."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
