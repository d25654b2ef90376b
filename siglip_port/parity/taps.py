"""Taps: points inside port and reference at which they are compared, by forward hooks.

A *point* is a string: the path of a module for its output, `path:input` for its input, and, for the
inside of an `nn.MultiheadAttention`, `path:q`, `path:k`, `path:v` and `path:context`. A *tap* pairs
a point of the reference with one of the port.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from siglip_port.parity.inside_attention import (
    INSIDE_ATTENTION,
    bind_arguments,
    inside_attention,
    unsupported_attention,
)

Visit = Callable[[str, Tensor], Tensor | None]
"""Function (point, tensor) -> replacement for the tensor, or None to leave it as it is."""


@dataclass(frozen=True)
class Tap:
    """Point of the reference and the corresponding point of the port."""

    reference: str
    port: str


def port_to_reference(taps: list[Tap]) -> dict[str, str]:
    """Map the points of the port to those of the reference."""
    return {tap.port: tap.reference for tap in taps}


def reference_to_port(taps: list[Tap]) -> dict[str, str]:
    """Map the points of the reference to those of the port."""
    return {tap.reference: tap.port for tap in taps}


class Point(NamedTuple):
    """Parsed point.

    Attributes:
        path: Path of the module.
        part: `output`, `input`, or one of `INSIDE_ATTENTION`.
    """

    path: str
    part: str

    @classmethod
    def parse(cls, text: str) -> Point:
        """Parse `path` or `path:part`."""
        path, _, part = text.partition(":")
        return cls(path, part or "output")


Modules = nn.Module | Mapping[str, type[nn.Module]]
"""A module, or the types of all its modules by path, if it is in another process."""

ModuleTable = Mapping[str, nn.Module] | Mapping[str, type[nn.Module]]


def module_table(modules: Modules) -> ModuleTable:
    """Return every module, or its type, by path."""
    if isinstance(modules, nn.Module):
        return dict(modules.named_modules(remove_duplicate=False))
    return modules


def expand(
    taps: Mapping[str, str], reference: Modules, port: Modules, *, is_strict: bool = True
) -> list[Tap]:
    """Expand `{}` in taps to the number of every block of the reference.

    Args:
        taps: Points of the reference -> points of the port.
        reference: Reference.
        port: Port.
        is_strict: Whether to refuse taps of modules that the port lacks, such as fused ones. They
            cannot be compared.

    Raises:
        ValueError: A point is malformed, or matches no module. (A port without some of the blocks
            is a finding, not an error.)
    """
    reference_modules = module_table(reference)
    port_modules = module_table(port)
    expanded = []
    for reference_point, port_point in taps.items():
        numbers = block_numbers(reference_point, reference_modules)
        is_in_port = bool(block_numbers(port_point, port_modules))
        tap = f"{reference_point!r}: {port_point!r}"
        if not numbers:
            raise unknown_module("reference", reference_point, reference_modules, tap)
        if is_strict and not is_in_port:
            raise unknown_module("port", port_point, port_modules, tap)
        for number in numbers:
            expanded.append(
                Tap(reference_point.replace("{}", number), port_point.replace("{}", number))
            )
    return expanded


def block_numbers(point: str, modules: ModuleTable) -> list[str]:
    """Return the block numbers that `{}` in a point matches; [""] for a point without `{}`."""
    path, part = Point.parse(point)
    if part not in ("output", "input", *INSIDE_ATTENTION):
        raise ValueError(
            f"{point!r}: the part after the colon must be one of input, q, k, v, context, "
            f"got {part!r}"
        )
    pattern = re.compile(re.escape(path).replace(r"\{\}", r"(\d+)"))
    numbers = []
    for name, module in modules.items():
        match = pattern.fullmatch(name)
        if match is None:
            continue
        if part in INSIDE_ATTENTION:
            reason = unsupported_attention(module)
            if reason:
                raise ValueError(f"{point!r}: :{part} {reason}; tap the projection instead")
        numbers.append(match[1] if match.lastindex else "")
    return numbers


def unknown_module(side: str, point: str, modules: Iterable[str], tap: str) -> ValueError:
    """Return the error for a point that matches no module of a side."""
    path = Point.parse(point).path
    similar = [name for name in modules if name.endswith(path.rsplit(".")[-1])]
    hint = f"; similar modules: {', '.join(similar[:5])}" if similar else ""
    return ValueError(f"tap {tap}: the {side} has no module {path!r}{hint}")


@contextlib.contextmanager
def tap_hooks(module: object, points: list[str], visit: Visit) -> Iterator[None]:
    """Call `visit` whenever the computation of `module` reaches one of `points`.

    Points that match no module are ignored; a callable that is no module has none. An input is
    replaced in place if its memory allows, so that a residual connection from the same tensor gets
    the replacement, too.
    """
    modules: dict[str, nn.Module] = {}
    if isinstance(module, nn.Module):
        modules = dict(module.named_modules(remove_duplicate=False))
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
    """Return a forward hook that visits the output of a module, or its first element.

    The attention modules of transformers return (output, attention weights).
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
    """Return a forward pre-hook that visits the first tensor among the inputs of a module."""

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
    """Return the first positional argument or, without any, the first tensor among keywords.

    Returns:
        Keyword (empty for a positional argument), and the tensor; None if it is not one.
    """
    if args:
        return "", args[0] if isinstance(args[0], Tensor) else None
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            return name, value
    return "", None


def is_writable(tensor: Tensor) -> bool:
    """Return whether no two elements share memory, and the tensor is not a parameter."""
    if isinstance(tensor, nn.Parameter):
        return False
    layout = zip(tensor.shape, tensor.stride(), strict=True)
    return not any(size > 1 and stride == 0 for size, stride in layout)


def attention_hook(point: str, part: str, visit: Visit) -> Callable[..., None]:
    """Return a forward hook that visits a tensor inside an `nn.MultiheadAttention`."""

    def hook(
        attention: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any], _: object
    ) -> None:
        arguments = bind_arguments(attention, args, kwargs)
        visit(point, inside_attention(attention, arguments)[part])

    return hook


@dataclass(frozen=True)
class Recording:
    """Outputs and taps of one run of one side.

    Attributes:
        outputs: Outputs by name.
        taps: Tensors by point, in order of computation. Tensors of several calls of a module, such
            as one per image, are concatenated along the first axis.
        defined: Positions [B, N] at which values [B, N, D] are defined; those of padding are not,
            and are not compared. None if all are.
    """

    outputs: dict[str, Tensor]
    taps: dict[str, Tensor]
    defined: Tensor | None = None


def record(module: nn.Module, points: list[str], run: Callable[[], dict[str, Tensor]]) -> Recording:
    """Run a side and record the tensors at its points."""
    parts: dict[str, list[Tensor]] = {}

    def save(point: str, tensor: Tensor) -> None:
        parts.setdefault(point, []).append(tensor.clone())

    with torch.inference_mode(), tap_hooks(module, points, save):
        outputs = run()
    return Recording(outputs, {point: join(tensors) for point, tensors in parts.items()})


def join(parts: list[Tensor]) -> Tensor:
    """Concatenate parts of a tensor along the first axis."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
