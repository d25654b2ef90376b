"""What a porter reads first: findings folded into causes, and causes before their consequences.

A bug has many symptoms: the step that computes it, every output, gradients, other checkpoints. Each
cause is listed once, with all its places; what follows from it comes last.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from siglip_port.text import format_ranges

if TYPE_CHECKING:
    from siglip_port.parity.results import Finding, GateFinding, GateResult, Section

GATE_PRECEDENCE = (
    "environment",
    "config",
    "weights",
    "numerics",
    "gradients",
    "calls",
    "interface",
    "pixels",
    "rounding",
    "sensitivity",
    "second-ref",
)
"""Order of findings: what differs before anything is computed, then the steps, then symptoms."""

KIND_PRECEDENCE = ("missing output", "error", "difference")
"""Order of findings within `numerics`; the first two may come from any gate."""

ROOT_GATES = ("environment", "config", "weights")
VALUE_GATES = ("calls", "interface")
"""Gates whose findings prove nothing more if `numerics` fails, as far as they compare values.
Others, such as another dtype, are causes."""

MAX_PLACES = 3


@dataclass(frozen=True)
class Place:
    """Location of findings, by the names of both sides; block numbers may be folded.

    Attributes:
        reference: Name of the reference; empty if it has none.
        port: Name of the port; empty if it has none.
    """

    reference: str
    port: str

    def __str__(self) -> str:
        """Format as `reference (port: port)`."""
        if not self.port or self.port == self.reference:
            return self.reference
        if not self.reference:
            return f"port: {self.port}"
        return f"{self.reference} (port: {self.port})"


@dataclass(frozen=True)
class Cause:
    """Findings with one explanation.

    Attributes:
        members: The findings; the first one is shown.
        num_checked: Number of sections that ran the gate.
        is_consequence: Whether it follows from an earlier cause.
    """

    members: tuple[GateFinding, ...]
    num_checked: int = 1
    is_consequence: bool = False

    @property
    def gate(self) -> str:
        """Name of the gate of the shown finding, with its dtype."""
        return self.members[0].gate.name

    @property
    def gate_kind(self) -> str:
        """Name of the gate without its dtype."""
        return gate_kind(self.members[0].gate)

    @property
    def finding(self) -> Finding:
        """The shown finding, with the largest error of all."""
        errors = [member.finding.error for member in self.members]
        largest = max(errors, key=nan_first)
        return replace(self.members[0].finding, error=largest)

    @property
    def is_root(self) -> bool:
        """Whether it precedes the computation, or prevents it."""
        return self.gate_kind in ROOT_GATES or self.finding.kind != "difference"

    @property
    def sections(self) -> list[Section]:
        """Sections in which it was found."""
        sections: list[Section] = []
        for member in self.members:
            if member.section not in sections:
                sections.append(member.section)
        return sections

    @property
    def places(self) -> list[Place]:
        """Places in the section of the shown finding, with folded block numbers."""
        section = self.members[0].section
        return fold_places(place_of(member) for member in self.members if member.section is section)

    @property
    def where(self) -> str:
        """Checkpoints in which it was found; empty if only one was checked."""
        sections = self.sections
        if self.num_checked <= 1:
            return ""
        if len(sections) == self.num_checked:
            return "in both checkpoints" if self.num_checked == 2 else "in all checkpoints"
        if len(sections) == 1:
            return f"only in the {sections[0].name}, {sections[0].weights}"
        return f"in {len(sections)} of {self.num_checked} checkpoints"

    @property
    def text(self) -> str:
        """Gate, places, message, error, hint and checkpoints in one line."""
        description = str(replace(self.finding, reference="", port=""))
        parts = [self.gate, join_names(map(str, self.places), MAX_PLACES), description]
        text = ": ".join(part for part in parts if part)
        return f"{text}; {self.where}" if self.where else text

    @property
    def short(self) -> str:
        """Gate, first place, and hint or message, without the port's names."""
        finding = self.finding
        parts = [self.gate]
        names = [place.reference or place.port for place in self.places]
        if names:
            parts.append(join_names(names, 1))
        parts.append(finding.hint or finding.message)
        return ": ".join(parts)


# --- folding --------------------------------------------------------------------------------------


def gate_kind(gate: GateResult) -> str:
    """Return the name of a gate without dtype and engine, such as `rounding`."""
    return gate.name.split()[0].rstrip(",")


def nan_first(error: float) -> float:
    """Return a key that orders NaN before all errors."""
    return -1.0 if math.isnan(error) else error


def place_of(item: GateFinding) -> Place:
    """Return the place of one finding."""
    return Place(item.finding.reference, item.finding.port)


def template(name: str) -> str:
    """Replace the first block number in a name: `layers.{}.fc1:input`."""
    return re.sub(r"(?<=\.)\d{1,9}(?=[.:]|$)", "{}", name, count=1)


def block_number(name: str) -> str:
    """Return the first block number in a name; empty without one."""
    match = re.search(r"(?<=\.)\d{1,9}(?=[.:]|$)", name)
    return match[0] if match else ""


def fold_places(places: Iterable[Place]) -> list[Place]:
    """Fold places that differ only in the block number: `layers.{0...11}.fc1`."""
    folded: dict[Place, list[Place]] = {}
    for place in places:
        if place.reference or place.port:
            key = Place(template(place.reference), template(place.port))
            folded.setdefault(key, []).append(place)
    result = []
    for key, members in folded.items():
        reference = fold_numbers(key.reference, [place.reference for place in members])
        port = fold_numbers(key.port, [place.port for place in members])
        result.append(Place(reference, port))
    return result


def fold_numbers(pattern: str, names: list[str]) -> str:
    """Put the block numbers of names into their common template."""
    numbers = [int(block_number(name)) for name in names if block_number(name)]
    return pattern.replace("{}", format_ranges(numbers), 1)


def join_names(names: Iterable[str], limit: int) -> str:
    """Join the first names, and count the rest."""
    names = list(names)
    text = ", ".join(names[:limit])
    more = len(names) - limit
    if more > 0:
        text += f" and {more} more place{'s' if more > 1 else ''}"
    return text


def text_kind(text: str) -> str:
    """Return a text without numbers, which vary between blocks and checkpoints."""
    return re.sub(r"\d[\d.]*(e[+-]?\d+)?", "#", text)


def message_kind(item: GateFinding) -> str:
    """Return the kind of a message: without numbers, details, and the image of `pixels`."""
    message = item.finding.message
    if gate_kind(item.gate) == "pixels":
        message = message.partition(": ")[2] or message
    return text_kind(message.partition("; ")[0]).replace("bfloat", "float")


def fold_key(item: GateFinding) -> tuple[str, ...]:
    """Return what findings of one cause have in common.

    A hint explains a difference at any place; without one, only blocks are folded.
    """
    finding = item.finding
    gate = gate_kind(item.gate)
    kind = message_kind(item)
    place = template(finding.reference), template(finding.port)
    if finding.kind != "difference":
        return (finding.kind, kind, *place)
    if finding.hint:
        return gate, kind, finding.hint
    if place == ("", ""):
        return gate, finding.message
    return (gate, kind, *place)


def fold(findings: Iterable[GateFinding]) -> list[list[GateFinding]]:
    """Group findings with one explanation, in the order of their first one."""
    groups: dict[tuple[object, ...], list[GateFinding]] = {}
    for item in findings:
        groups.setdefault((id(item.section), *fold_key(item)), []).append(item)
    merged: list[list[GateFinding]] = []
    for group in groups.values():
        same = [other for other in merged if is_same_cause(other, group)]
        if same:
            same[0].extend(group)
        else:
            merged.append(group)
    return merged


def is_same_cause(first: list[GateFinding], second: list[GateFinding]) -> bool:
    """Return whether findings of another section have the explanation of earlier ones.

    Sizes in a hint vary between checkpoints, and not every section has hints for all places.
    """
    a, b = first[0], second[0]
    if fold_key(a) == fold_key(b):
        return True
    if {id(item.section) for item in first} & {id(item.section) for item in second}:
        return False
    if a.finding.kind != b.finding.kind or gate_kind(a.gate) != gate_kind(b.gate):
        return False
    if message_kind(a) != message_kind(b) or not templates(second) & templates(first):
        return False
    hints = {text_kind(a.finding.hint), text_kind(b.finding.hint)}
    return len(hints - {""}) <= 1


def templates(items: Iterable[GateFinding]) -> set[str]:
    """Return the places of findings without block numbers."""
    return {template(item.finding.reference or item.finding.port) for item in items}


# --- order ----------------------------------------------------------------------------------------


def find_causes(
    findings: Iterable[GateFinding], num_checked: Callable[[GateFinding], int]
) -> list[Cause]:
    """Fold findings into causes: root causes, steps in order of computation, consequences.

    Args:
        findings: Findings in the order of sections and gates.
        num_checked: Function that returns how many sections could have made a finding.
    """
    causes = []
    for group in fold(findings):
        members = sorted(group, key=shown_first)
        causes.append(Cause(tuple(members), num_checked(members[0])))
    causes.sort(key=precedence)
    for i, cause in enumerate(causes):
        causes[i] = replace(cause, is_consequence=follows(cause, causes[:i]))
    return sorted(causes, key=lambda cause: cause.is_consequence)


def shown_first(item: GateFinding) -> tuple[bool, bool, float]:
    """Return the order of findings in a cause.

    A finding with a hint is shown first, and an error of the port where it prevents `numerics`.
    For rounding, it is the one with the largest excess: where errors of many steps add up to little
    more than the bound, their place depends on the dtype and the machine.
    """
    excess = 0.0
    if gate_kind(item.gate) == "rounding":
        for measurement in item.gate.measurements:
            if measurement.reference == item.finding.reference:
                excess = max(excess, measurement.bound_ratio, measurement.worst)
    is_elsewhere = item.finding.kind == "error" and gate_kind(item.gate) != "numerics"
    return not item.finding.hint, is_elsewhere, -excess


def precedence(cause: Cause) -> tuple[int, int]:
    """Return the order of causes."""
    gate = cause.gate_kind
    kind = cause.finding.kind
    if kind != "difference" and gate not in ROOT_GATES:
        gate = "numerics"
    return GATE_PRECEDENCE.index(gate), KIND_PRECEDENCE.index(kind)


def follows(cause: Cause, earlier: list[Cause]) -> bool:
    """Return whether a cause follows from earlier ones."""
    if cause.finding.kind != "difference":
        return False
    gate = cause.gate_kind
    is_wrong_function = any(map(breaks_numerics, earlier))
    if gate == "sensitivity":
        return is_wrong_function
    if gate == "gradients":
        is_explained_otherwise = cause.finding.hint and not has_place_of(cause, earlier)
        return is_wrong_function and not is_explained_otherwise
    if gate in VALUE_GATES:
        is_value = not math.isnan(cause.finding.error)
        return any(map(prevents_runs, earlier)) or (is_wrong_function and is_value)
    if gate in ("weights", "numerics"):
        return all(is_explained(item, earlier) for item in cause.members)
    return False


def breaks_numerics(cause: Cause) -> bool:
    """Return whether all later results differ because of a cause."""
    return cause.gate_kind == "numerics" or cause.finding.kind != "difference"


def prevents_runs(cause: Cause) -> bool:
    """Return whether the port raises an error in a plain forward pass, so also in all others."""
    return cause.finding.kind == "error" and cause.gate_kind == "numerics"


def has_place_of(cause: Cause, earlier: list[Cause]) -> bool:
    """Return whether an earlier cause is at the same step, in any block."""
    steps = templates(cause.members)
    return any(steps & templates(other.members) for other in earlier)


def is_explained(item: GateFinding, earlier: list[Cause]) -> bool:
    """Return whether a finding about a tensor or a step follows from an earlier cause."""
    for cause in earlier:
        if any(reaches(root, item) for root in cause.members):
            return True
        if item.finding.hint or gate_kind(item.gate) != "numerics":
            continue
        is_switch = cause.gate_kind == "environment" and not cause.places
        if is_switch or is_same_step(cause, item):
            return True
    return False


def is_same_step(cause: Cause, item: GateFinding) -> bool:
    """Return whether a cause explains the step of a finding in other blocks.

    In this block, no hint was sought, or none was found.
    """
    is_explained_step = cause.gate_kind == "numerics" and cause.finding.hint != ""
    return is_explained_step and templates([item]) <= templates(cause.members)


def reaches(root: GateFinding, item: GateFinding) -> bool:
    """Return whether a wrong module or tensor affects the place of another finding."""
    name = root.finding.reference
    path, _, part = item.finding.reference.partition(":")
    if not name or part == "input":
        return False
    if gate_kind(root.gate) == "environment":  # a module
        return path == name or path.startswith(f"{name}.")
    if gate_kind(root.gate) != "weights" or gate_kind(item.gate) != "numerics":
        return False
    module = name.rpartition(".")[0]
    is_inside = module.startswith(f"{path}.") and not item.finding.hint
    return bool(module) and (path == module or is_inside)
