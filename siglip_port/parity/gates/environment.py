"""The gate `environment`: nothing outside the two modules bends the result."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from siglip_port.parity.gates.meaning import MEANING
from siglip_port.parity.results import Finding, GateResult


def check_environment(sides: Mapping[str, nn.Module]) -> GateResult:
    """Check modes, dtypes, and torch's switches that trade precision for speed.

    Args:
        sides: the modules by the name of their side.
    """
    findings = []
    for side, module in sides.items():
        findings += check_mode(side, module)
        findings += check_dtypes(side, module)
    switches = read_switches()
    for name, (value, expected) in switches.items():
        if value != expected:
            findings.append(Finding(f"{name} is {value}, expected {expected}"))
    checked = 2 * len(sides) + len(switches)
    return GateResult("environment", checked, MEANING["environment"].bound, tuple(findings))


def check_mode(side: str, module: nn.Module) -> list[Finding]:
    """Find modules in training mode."""
    names = training_modules(module)
    if not names:
        return []
    message = (
        f"{len(names)} modules of the {side} are in training mode, first {names[0]}; call eval()"
    )
    return [Finding(message, port=names[0])]


def training_modules(module: nn.Module) -> list[str]:
    """The names of all modules in training mode; that of the whole is `model`."""
    return [name or "model" for name, part in module.named_modules() if part.training]


def check_dtypes(side: str, module: nn.Module) -> list[Finding]:
    """Find parameters of more than one floating point dtype."""
    dtypes = sorted({str(p.dtype) for p in module.parameters() if p.is_floating_point()})
    if len(dtypes) <= 1:
        return []
    return [Finding(f"the {side}'s parameters are of {len(dtypes)} dtypes: {dtypes}")]


def read_switches() -> dict[str, tuple[object, object]]:
    """Torch's global switches that change numbers: each one's value, and the expected one."""
    autocast = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    tf32 = torch.backends.cudnn.allow_tf32 and torch.cuda.is_available()
    return {
        "autocast": (autocast, False),
        "the float32 matmul precision": (torch.get_float32_matmul_precision(), "highest"),
        "TF32 in cuDNN": (tf32, False),
        "the default dtype": (torch.get_default_dtype(), torch.float32),
    }
