"""The gate `environment`: no mode, dtype or global switch of torch changes the results."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from siglip_port.parity.gates.meaning import MEANING
from siglip_port.parity.results import Finding, GateResult


def check_environment(sides: Mapping[str, nn.Module]) -> GateResult:
    """Check modes, dtypes, and torch's switches that trade precision for speed.

    Args:
        sides: Modules by name, `port` and `reference`.
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
        f"the {side} is in training mode (modules: {len(names)}, first {names[0]}); call eval()"
    )
    return [Finding(message, port=names[0])]


def training_modules(module: nn.Module) -> list[str]:
    """List the modules in training mode; the outermost one is `model`."""
    return [name or "model" for name, part in module.named_modules() if part.training]


def check_dtypes(side: str, module: nn.Module) -> list[Finding]:
    """Find parameters of more than one floating point dtype."""
    dtypes = sorted({str(p.dtype) for p in module.parameters() if p.is_floating_point()})
    if len(dtypes) <= 1:
        return []
    message = (
        f"the {side}'s parameters have {len(dtypes)} dtypes ({', '.join(dtypes)}), expected one; "
        "call to(dtype)"
    )
    return [Finding(message)]


def read_switches() -> dict[str, tuple[object, object]]:
    """Read torch's global switches that change results: name -> (value, expected value)."""
    autocast = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    tf32 = torch.backends.cudnn.allow_tf32 and torch.cuda.is_available()
    return {
        "autocast": (autocast, False),
        "torch.get_float32_matmul_precision()": (torch.get_float32_matmul_precision(), "highest"),
        "torch.backends.cudnn.allow_tf32": (tf32, False),
        "torch.get_default_dtype()": (torch.get_default_dtype(), torch.float32),
    }
