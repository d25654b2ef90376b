"""The gate `environment`: no mode, dtype, shared module or switch of torch changes the results.

Switches that trade precision for speed, such as TF32, are set to full precision for both sides by
`exact_switches`. A finding names what a run of the port changes, and what was set before the
comparison against torch's defaults.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor, nn

from siglip_port.parity import switches
from siglip_port.parity.gates.meaning import MEANING
from siglip_port.parity.results import Finding, GateResult
from siglip_port.parity.sides import Inputs, ReferenceHost, Side, clone_inputs
from siglip_port.parity.taps import Point, Tap

ACTIVATIONS = (nn.GELU, nn.Identity, nn.Mish, nn.ReLU, nn.SiLU, nn.Sigmoid, nn.Softmax, nn.Tanh)

NOTHING_SET: Mapping[str, str] = MappingProxyType({})

set_before: ContextVar[Mapping[str, str]] = ContextVar("set_before", default=NOTHING_SET)
"""Switches that differed from torch's defaults when `exact_switches` was entered -> how."""


@contextlib.contextmanager
def exact_switches() -> Iterator[None]:
    """Run both sides in full precision, whatever torch's switches say; restore them on exit.

    torch's own defaults use TF32 in convolutions on CUDA. `check_environment` reports switches that
    differed from the defaults.
    """
    token = set_before.set({**set_before.get(), **deviations()})
    try:
        with switches.full_precision():
            yield
    finally:
        set_before.reset(token)


def isolated(port: Side) -> Side:
    """Return a port whose changes to torch's switches end with each call.

    Otherwise, they would reach the reference. `check_switches` reports them.
    """

    def call(module: nn.Module, inputs: Inputs) -> Mapping[str, Tensor]:
        with switches.restored_switches():
            return port.call(module, inputs)

    return replace(port, call=call)


def check_environment(sides: Mapping[str, nn.Module]) -> GateResult:
    """Check modes, dtypes, and torch's switches that trade precision for speed.

    Args:
        sides: Modules by name, `port` and `reference`.
    """
    findings = []
    for side, module in sides.items():
        findings += check_mode(side, module)
        findings += check_dtypes(side, module)
    for message in {**set_before.get(), **deviations()}.values():
        findings.append(Finding(message))
    checked = 2 * len(sides) + len(switches.read_switches())
    return GateResult("environment", checked, MEANING["environment"].bound, tuple(findings))


def check_mode(side: str, module: nn.Module) -> list[Finding]:
    """Find modules in training mode."""
    names = training_modules(module)
    if not names:
        return []
    message = (
        f"the {side} is in training mode (modules: {len(names)}, first {names[0]}); call eval()"
    )
    return [Finding(message, port=names[0])]


def training_modules(module: object) -> list[str]:
    """List the modules in training mode; the outermost one is `model`.

    Activations of torch are left out: they have no modes, and are often made by the forward pass.
    """
    if not isinstance(module, nn.Module):
        return []
    names = []
    for name, part in module.named_modules():
        if part.training and not isinstance(part, ACTIVATIONS):
            names.append(name or "model")
    return names


def check_dtypes(side: str, module: nn.Module) -> list[Finding]:
    """Find parameters of more than one floating point dtype."""
    first_names: dict[str, str] = {}
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point():
            first_names.setdefault(str(parameter.dtype), name)
    if len(first_names) <= 1:
        return []
    dtypes = ", ".join(f"{dtype}: {name}" for dtype, name in first_names.items())
    message = (
        f"the {side}'s parameters have {len(first_names)} dtypes (first of each: {dtypes}), "
        "expected one; call to(dtype)"
    )
    return [Finding(message)]


def deviations() -> dict[str, str]:
    """Describe the switches that differ from torch's defaults."""
    values = switches.read_switches()
    messages = {}
    for name, default in switches.not_default(values).items():
        messages[name] = f"{name} is {values[name]} before the port runs, expected {default}"
    return messages


def check_switches(port: Side, inputs: Inputs) -> GateResult:
    """Run the port once, and find switches and modes that the run changes.

    Args:
        port: Port, not `isolated`.
        inputs: Inputs of the port.
    """
    module = port.module
    training = set(training_modules(module))
    with without_gradients(module), switches.restored_switches(), torch.enable_grad():
        before = switches.read_switches()
        port.call(module, clone_inputs(inputs))
        after = switches.read_switches()
    findings = []
    for name in switches.changed(before, after):
        message = f"a run of the port changes {name} from {before[name]} to {after[name]}"
        findings.append(Finding(f"{message}, and does not restore it"))
    for name in training_modules(module):
        if name not in training:
            message = "a run of the port switches this module to training mode"
            findings.append(Finding(message, port=name))
    bound = MEANING["environment"].bound
    return GateResult("environment", len(before), bound, tuple(findings))


@contextlib.contextmanager
def without_gradients(module: object) -> Iterator[None]:
    """Run a module without building a graph, in a mode that allows one."""
    if not isinstance(module, nn.Module):
        yield
        return
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@dataclass(frozen=True)
class Structure:
    """Modules of a side.

    Attributes:
        paths: Paths of all modules.
        shared: Groups of paths that are one module with parameters.
    """

    paths: frozenset[str]
    shared: list[list[str]]


def structure_of(side: Side) -> Structure:
    """Describe the modules of a side. Modules without parameters may be shared.

    A callable that is no module has none.
    """
    groups: dict[nn.Module, list[str]] = {}
    paths: list[str] = []
    if not isinstance(side.module, nn.Module):
        return Structure(frozenset(paths), [])
    for path, part in side.module.named_modules(remove_duplicate=False):
        paths.append(path)
        if next(part.parameters(), None) is not None:
            groups.setdefault(part, []).append(path)
    shared = [group for group in groups.values() if len(group) > 1]
    return Structure(frozenset(paths), shared)


def check_shared_modules(port: Side, reference: ReferenceHost, taps: Iterable[Tap]) -> GateResult:
    """Find modules of the port that are one where the reference has several.

    Args:
        port: Port.
        reference: Reference.
        taps: Taps, which pair the modules of both sides; without one, names do.
    """
    own = structure_of(port)
    other = reference.compute(structure_of)
    names = {path: path for path in own.paths & other.paths}
    names |= {Point.parse(tap.port).path: Point.parse(tap.reference).path for tap in taps}
    findings = []
    for group in own.shared:
        first, *others = [path for path in group if path in names] or [""]
        for path in others:
            pair = {names[first], names[path]}
            if len(pair) == 2 and not any(pair <= set(shared) for shared in other.shared):
                message = f"the port has one module for this and {names[first]}, the reference two"
                findings.append(Finding(message, names[path], path))
    bound = MEANING["environment"].bound
    return GateResult("environment", len(own.paths), bound, tuple(outermost(findings)))


def outermost(findings: list[Finding]) -> list[Finding]:
    """Leave out the findings for parts of a module that has one itself."""
    paths = [f"{finding.port}." for finding in findings]
    return [finding for finding in findings if not finding.port.startswith(tuple(paths))]
