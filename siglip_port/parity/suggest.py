"""Propose taps for two modules: `suggest_taps`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from siglip_port.parity.arguments import check_not_shared
from siglip_port.parity.metrics import relative_error
from siglip_port.parity.nested import Inputs, check_inputs
from siglip_port.parity.sides import Call, Side, call_module, clone_inputs
from siglip_port.parity.taps import tap_hooks

SAME_TENSOR = 1e-4
"""Largest relative error of a tensor that both sides compute with their own rounding."""

SYNONYMS = {"query": "q", "key": "k", "value": "v", "dense": "out", "o": "out"}
"""Words in names of modules -> what other libraries call them."""

Pairs = dict[str, str]
"""Points of the reference -> points of the port."""


def suggest_taps(
    reference: nn.Module,
    port: nn.Module,
    inputs: Inputs | None = None,
    *,
    call_reference: Call = call_module,
    call_port: Call = call_module,
) -> dict[str, str]:
    """Propose taps for `compare`: pairs of points that hold the same tensor.

    Modules are paired by equal parameters or, where a bug has changed these, by names and shapes.
    With inputs, both sides run, and all points that hold the same tensor are paired, such as a
    functional activation of the port with the module of the reference. Points that are not paired
    with certainty are left out: the next tap covers them.

    Example:
        >>> from torch import nn
        >>> reference = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 3), nn.Linear(3, 2)])})
        >>> port = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 3), nn.Linear(3, 2)])})
        >>> suggest_taps(reference, port)
        {'layers.{}': 'blocks.{}'}

    Args:
        reference: Reference.
        port: Port with the reference's weights.
        inputs: Inputs of both modules, as for `compare`; without, modules do not run.
        call_reference: Function (module, inputs) -> outputs by name.
        call_port: Function like `call_reference`, for the port.

    Returns:
        Points of the reference -> points of the port, block numbers as `{}`.

    Raises:
        ValueError: The inputs cannot be used, or both sides are one module.
        TypeError: A side is no module.
    """
    for side, module in (("reference", reference), ("port", port)):
        if not isinstance(module, nn.Module):
            raise TypeError(f"{side} must be a torch.nn.Module, got {type(module).__name__}")
    check_not_shared(reference, port)
    pairs = pair_parameters(reference, port)
    if inputs is None:
        pairs |= pair_containers(reference, port, pairs)
    else:
        inputs = check_inputs(inputs)
        sides = (Side(reference, call_reference), Side(port, call_port))
        pairs = pair_tensors(*sides, inputs, pairs)
    return fold(pairs, reference, port)


def pair_parameters(reference: nn.Module, port: nn.Module) -> Pairs:
    """Pair modules with parameters of their own: by equal parameters, then by names."""
    modules = modules_with_parameters(reference)
    port_modules = modules_with_parameters(port)
    twins = paths_by_values(modules)
    partners = paths_by_values(port_modules)
    pairs = {}
    for values, paths in twins.items():
        if len(paths) == len(partners.get(values, [])) == 1:
            pairs[paths[0]] = partners[values][0]
    left = {path: module for path, module in modules.items() if path not in pairs}
    used = set(pairs.values())
    port_left = {path: module for path, module in port_modules.items() if path not in used}
    return pairs | pair_names(left, port_left)


def modules_with_parameters(module: nn.Module) -> dict[str, nn.Module]:
    """Return the modules without children that have parameters, by path."""
    return {
        path: part
        for path, part in module.named_modules()
        if path and not list(part.children()) and list(part.parameters(recurse=False))
    }


def paths_by_values(modules: Mapping[str, nn.Module]) -> dict[tuple[object, ...], list[str]]:
    """Group modules by their parameters: shapes, sums, and sums of absolute values."""
    paths: dict[tuple[object, ...], list[str]] = {}
    for path, module in modules.items():
        values = []
        for parameter in module.parameters():
            exact = parameter.detach().double()
            values.append((exact.shape, float(exact.sum()), float(exact.abs().sum())))
        paths.setdefault(tuple(values), []).append(path)
    return paths


def shapes_of(module: nn.Module) -> list[torch.Size]:
    """Return the shapes of a module's parameters."""
    return [parameter.shape for parameter in module.parameters()]


def pair_names(reference: Mapping[str, nn.Module], port: Mapping[str, nn.Module]) -> Pairs:
    """Pair modules of the same shapes and block whose names have most words in common.

    A module without a single best partner, in both directions, is left out.
    """
    partners = {path: best_partner(path, part, port) for path, part in reference.items()}
    backward = {path: best_partner(path, part, reference) for path, part in port.items()}
    return {
        path: partner
        for path, partner in partners.items()
        if partner is not None and backward[partner] == path
    }


def best_partner(path: str, module: nn.Module, others: Mapping[str, nn.Module]) -> str | None:
    """Return the module whose name has most words in common; None if it is not the only one."""
    scores: dict[str, int] = {}
    for other, candidate in others.items():
        same_block = re.findall(r"\d+", path)[:1] == re.findall(r"\d+", other)[:1]
        if same_block and shapes_of(candidate) == shapes_of(module):
            scores[other] = len(words(path) & words(other))
    best = max(scores.values(), default=0)
    candidates = [other for other, score in scores.items() if score == best]
    if len(candidates) == 1 and (best or len(scores) == 1):
        return candidates[0]
    return None


def words(path: str) -> set[str]:
    """Return the words of a path, and the numbers at their ends, without block numbers."""
    parts = [part for part in path.split(".") if not part.isdigit()]
    parts = re.findall(r"[a-z]+|\d+", "_".join(parts).lower())
    return {SYNONYMS.get(word, word) for word in parts}


def pair_containers(reference: nn.Module, port: nn.Module, pairs: Pairs) -> Pairs:
    """Pair modules whose parts are paired with each other, and with nothing else."""
    containers = parts_by_container(reference, pairs)
    port_pairs = {port_path: path for path, port_path in pairs.items()}
    port_containers = parts_by_container(port, port_pairs)
    containers_in_both = {}
    for path, parts in containers.items():
        expected = {pairs[part] for part in parts if part in pairs}
        if len(expected) < len(parts):
            continue
        equal = [name for name, others in port_containers.items() if others == expected]
        twins = [name for name, others in containers.items() if others == parts]
        if len(equal) == 1 and len(twins) == 1:
            containers_in_both[path] = equal[0]
    return containers_in_both


def parts_by_container(module: nn.Module, pairs: Pairs) -> dict[str, set[str]]:
    """Return the parts with parameters of every module that has its own computation and children.

    Args:
        module: Reference or port.
        pairs: Parts that are paired; containers without any are left out.
    """
    parts = modules_with_parameters(module)
    containers = {}
    for path, part in module.named_modules():
        if (
            not path
            or not list(part.children())
            or isinstance(part, (nn.ModuleList, nn.ModuleDict))
        ):
            continue
        if list(part.parameters(recurse=False)):
            continue
        inside = {name for name in parts if name.startswith(f"{path}.")}
        if inside & pairs.keys():
            containers[path] = inside
    return containers


@dataclass
class Trace:
    """Tensors at all points of a side, in order of computation.

    Attributes:
        tensors: Outputs and inputs of modules that are called once.
        repeated: Points that are reached several times.
        identities: Outputs of modules that do nothing, which are the last choice.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    repeated: set[str] = field(default_factory=set)
    identities: set[str] = field(default_factory=set)

    def add(self, point: str, tensor: Tensor) -> None:
        """Save the tensor at a point."""
        if point in self.tensors:
            self.repeated.add(point)
        self.tensors[point] = tensor.clone()

    def distinct(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the points, of those with the same tensor only one: an output, if there is one."""
        seen: list[Tensor] = []
        points = [point for point in self.tensors if point not in self.repeated]
        for point in sorted(points, key=self._rank):
            tensor = self.tensors[point]
            if tensor.is_floating_point() and not any(is_same(tensor, other) for other in seen):
                seen.append(tensor)
                yield point, tensor

    def _rank(self, point: str) -> int:
        if point in self.identities:
            return 2
        return int(point.endswith(":input"))


def pair_tensors(reference: Side, port: Side, inputs: Inputs, pairs: Pairs) -> Pairs:
    """Pair the points that hold the same tensor in a run.

    The port is teacher-forced at the modules that are paired already, so that a bug changes only
    the points up to the next of them.
    """
    trace = trace_side(reference, inputs, {})
    forced = {}
    for path, port_path in pairs.items():
        if path in trace.tensors and path not in trace.repeated:
            forced[port_path] = trace.tensors[path]
    port_trace = trace_side(port, inputs, forced)
    tensors = dict(port_trace.distinct())
    verified = {}
    for point, tensor in trace.distinct():
        partners = [pairs[point]] if point in pairs else find_same(tensor, tensors)
        if not partners:
            partners = inputs_of_pairs(tensor, trace, pairs)
        partners = [other for other in partners if has_shape(port_trace, other, tensor.shape)]
        if partners:
            verified[point] = partners[0]
    verified |= complete_blocks(verified, trace, port_trace)
    in_order = [point for point in trace.tensors if point in verified]
    return {point: verified[point] for point in in_order}


def find_same(tensor: Tensor, others: Mapping[str, Tensor]) -> list[str]:
    """Return the points that hold the same tensor."""
    return [point for point, other in others.items() if is_same(tensor, other)]


def inputs_of_pairs(tensor: Tensor, trace: Trace, pairs: Pairs) -> list[str]:
    """Return the inputs of the port's modules whose partners get a tensor as their input.

    A bug in a step without a module of its own, such as an activation, shows there.
    """
    inputs = {f"{path}:input": f"{partner}:input" for path, partner in pairs.items()}
    return [inputs[point] for point in find_same(tensor, trace.tensors) if point in inputs]


def complete_blocks(pairs: Pairs, trace: Trace, port_trace: Trace) -> Pairs:
    """Pair points like those of the other blocks, if most of these are paired, at least two."""
    added: Pairs = {}
    points = list(trace.tensors)
    for point, port_point in pairs.items():
        for template, port_template in templates(point, port_point):
            numbers = matching_numbers(template, points)
            expected = expand_template(template, port_template, numbers)
            known = [name for name, other in expected.items() if pairs.get(name) == other]
            left = {name: other for name, other in expected.items() if name not in pairs}
            has_shapes = all(
                has_shape(port_trace, other, trace.tensors[name].shape)
                for name, other in left.items()
            )
            is_majority = len(known) >= max(2, len(left))
            if has_shapes and is_majority and len(known) + len(left) == len(expected):
                added |= left
    return added


def has_shape(trace: Trace, point: str, shape: torch.Size) -> bool:
    """Return whether a point is reached once, with a tensor of a shape."""
    if point not in trace.tensors or point in trace.repeated:
        return False
    return trace.tensors[point].shape == shape


def trace_side(side: Side, inputs: Inputs, forced: Mapping[str, Tensor]) -> Trace:
    """Run a side and save the tensors at all points, before they are replaced.

    Args:
        side: Reference or port.
        inputs: Inputs of both sides.
        forced: Replacements for outputs, by point.
    """
    trace = Trace()

    def visit(point: str, tensor: Tensor) -> Tensor | None:
        trace.add(point, tensor)
        replacement = forced.get(point)
        if replacement is None or replacement.shape != tensor.shape:
            return None
        return replacement.to(tensor.dtype, copy=True)

    points = []
    for path, part in side.module.named_modules():
        if isinstance(part, (nn.Dropout, nn.Identity)):
            trace.identities.add(path)
        if path:
            points += [path, f"{path}:input"]
    with torch.inference_mode(), tap_hooks(side.module, points, visit):
        side.run(clone_inputs(inputs))
    return trace


def is_same(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors are equal except for rounding."""
    if first is second:
        return True
    if first.shape != second.shape or not second.is_floating_point():
        return False
    sample = relative_error(first.flatten()[:64], second.flatten()[:64])
    return sample < 10 * SAME_TENSOR and relative_error(first, second) < SAME_TENSOR


def fold(pairs: Pairs, reference: nn.Module, port: nn.Module) -> Pairs:
    """Replace block numbers by `{}` where all blocks of both sides are paired."""
    folded: Pairs = {}
    modules = [path for path, _ in reference.named_modules()]
    port_modules = [path for path, _ in port.named_modules()]
    left = dict(pairs)
    for point, port_point in pairs.items():
        if point not in left:
            continue
        template, port_template = find_template(point, port_point, left, modules, port_modules)
        folded[template] = port_template
        if template == point:
            continue
        for number in matching_numbers(path_of(template), modules):
            left.pop(template.replace("{}", number))
    return folded


def find_template(
    point: str, port_point: str, pairs: Pairs, modules: list[str], port_modules: list[str]
) -> tuple[str, str]:
    """Return both points with `{}` for a number that they share, if all such points are paired."""
    for template, port_template in templates(point, port_point):
        numbers = matching_numbers(path_of(template), modules)
        if len(numbers) < 2 or numbers != matching_numbers(path_of(port_template), port_modules):
            continue
        if expand_template(template, port_template, numbers).items() <= pairs.items():
            return template, port_template
    return point, port_point


def templates(point: str, port_point: str) -> Iterator[tuple[str, str]]:
    """Yield both points with `{}` for a number that they share."""
    for number, template in numbered(point):
        for port_number, port_template in numbered(port_point):
            if number == port_number:
                yield template, port_template


def expand_template(template: str, port_template: str, numbers: list[str]) -> Pairs:
    """Return the pairs of all blocks."""
    return {
        template.replace("{}", number): port_template.replace("{}", number) for number in numbers
    }


def numbered(point: str) -> Iterator[tuple[str, str]]:
    """Yield every number in a path, and the point with `{}` in its place."""
    for match in re.finditer(r"(?<=\.)\d+(?=[.:]|$)", point):
        yield match[0], f"{point[: match.start()]}{{}}{point[match.end() :]}"


def path_of(point: str) -> str:
    """Return the path of the module of a point."""
    return point.partition(":")[0]


def matching_numbers(template: str, points: list[str]) -> list[str]:
    """Return the numbers for which a side has the point of a template."""
    pattern = re.compile(re.escape(template).replace(r"\{\}", r"(\d+)"))
    matches = [pattern.fullmatch(point) for point in points]
    return [match[1] for match in matches if match is not None]
