"""Deviations of a port in one of many situations, folded into findings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from siglip_port.parity.calls import BASE
from siglip_port.parity.metrics import relative_error
from siglip_port.parity.results import Finding
from siglip_port.parity.taps import Recording, Tap


@dataclass(frozen=True)
class Deviation:
    """Difference between port and reference in one situation.

    Attributes:
        kind: Deviations of one kind at one place become one finding.
        message: Observed result, continued by the name of the situation.
        situation: Name of the situation; empty if it does not matter.
        remedy: What to do, or what was expected; empty for nothing.
        reference: Place by the reference's name.
        port: Place by the port's name.
        error: Relative error; NaN if there is none.
    """

    kind: str
    message: str
    situation: str = ""
    remedy: str = ""
    reference: str = ""
    port: str = ""
    error: float = math.nan


def to_findings(deviations: Iterable[Deviation]) -> list[Finding]:
    """Fold deviations of the same kind and place into findings; the first one is described."""
    groups: dict[tuple[str, str, str], list[Deviation]] = {}
    for deviation in deviations:
        key = (deviation.kind, deviation.reference, deviation.port)
        groups.setdefault(key, []).append(deviation)
    findings = []
    for group in groups.values():
        first = group[0]
        message = f"{first.message} {join_situations(group)}".strip()
        if first.remedy:
            message += f"; {first.remedy}"
        findings.append(Finding(message, first.reference, first.port, first.error))
    return findings


def join_situations(deviations: list[Deviation]) -> str:
    """Name the first two situations of some deviations, and count the others.

    Returns:
        Empty if the deviation does not depend on the situation.
    """
    names = list(dict.fromkeys(deviation.situation for deviation in deviations))
    if names[0] in ("", BASE):
        return ""
    text = names[0]
    if len(names) > 1:
        text += f", also {names[1]}"
    if len(names) > 2:
        text += f" and in {len(names) - 2} more situations"
    return text


def first_difference(
    output: str,
    port: Mapping[str, Tensor],
    reference: Recording,
    taps: list[Tap],
    is_within_bound: Callable[[float], bool],
) -> Tap:
    """Return the first tap in order of the reference's computation at which both sides differ.

    Taps that only one side has are skipped, and so are those of another shape: a port may call a
    module in parts.

    Args:
        output: Output that differs.
        port: The port's values by its points.
        reference: Outputs and taps of the reference.
        taps: Taps that pair them.
        is_within_bound: Whether a relative error passes.

    Returns:
        The output itself if every tap agrees, up to the one that is the output.
    """
    itself = Tap(output, output)
    port_points = {tap.reference: tap.port for tap in taps}
    for point, expected in reference.taps.items():
        value = port.get(port_points.get(point, ""))
        if value is None or value.shape != expected.shape or not expected.any():
            continue
        if not is_within_bound(relative_error(value, expected)):
            return Tap(point, port_points[point])
        if torch.equal(expected, reference.outputs[output]):
            return itself
    return itself
