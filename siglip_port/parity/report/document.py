"""What a comparison found, for people and for programs. The JSON is the source of truth.

All else is made of it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any
from xml.etree import ElementTree

from torch import Tensor

from siglip_port.parity.metrics import cosine, relative_error
from siglip_port.parity.results import MAX_FINDINGS_SHOWN as FINDINGS_SHOWN
from siglip_port.parity.results import Comparison, Finding, GateResult

SCHEMA = 2
"""Of the JSON report. It changes when a key changes its meaning or goes.

New keys leave it as it is.
"""

Json = dict[str, Any]


def figures(port: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> list[Json]:
    """Figures that people ask for, of every output; no gate rests on them.

    Args:
        port: its outputs.
        reference: its outputs, in the same dtype.
    """
    return [
        {
            "point": name,
            "shape": list(port[name].shape),
            "cosine_mean": float(cosine(port[name], theirs).mean()),
            "cosine_min": float(cosine(port[name], theirs).min()),
            "max_abs": float((port[name].double() - theirs.double()).abs().max()),
            "relative_error": relative_error(port[name], theirs),
            "norm_ratio": float(port[name].double().norm() / theirs.double().norm()),
        }
        for name, theirs in reference.items()
        if name in port and port[name].shape == theirs.shape
    ]


def to_json(comparison: Comparison, **more: object) -> Json:
    """All that was found. What is not finite becomes a text, as JSON has no such numbers.

    Args:
        comparison: what was found.
        more: further keys, such as environment and provenance.
    """
    found = {
        "schema": SCHEMA,
        "equal": comparison.equal,
        "verdict": comparison.verdict,
        "weights": comparison.label,
        **more,
        "findings": [
            {
                "section": section.name,
                "gate": gate.name,
                **_finding(finding),
                "text": str(finding),
            }
            for section, gate, finding in comparison.findings
        ],
        "sections": [
            {
                "name": section.name,
                "weights": section.weights,
                "gates": [
                    {
                        **_gate(gate),
                        "passed": gate.passed,
                        "measurements": [
                            {
                                **dataclasses.asdict(m),
                                "passed": m.passed,
                                "share": _share(m.error, m.bound),
                            }
                            for m in gate.measurements
                        ],
                    }
                    for gate in section.gates
                ],
            }
            for section in comparison.sections
        ],
    }
    clean: Json = _finite(found)
    return clean


def _finding(finding: Finding) -> Json:
    fields = dataclasses.asdict(finding)
    return {"what": fields.pop("message"), **fields}


def _gate(gate: GateResult) -> Json:
    fields = dataclasses.asdict(gate)
    upcasts = fields.pop("float32_upcasts")
    findings = [_finding(finding) for finding in gate.findings]
    return {**fields, "findings": findings, "islands": upcasts}


def _share(error: float, bound: float) -> float:
    return error / bound if bound else (0.0 if error == 0 else math.inf)


def _finite(value: object) -> Any:  # noqa: ANN401
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


# --- console --------------------------------------------------------------------------------------


def table(comparison: Comparison) -> list[list[str]]:
    """One row a gate: what it is, how much it checked, how much of its bound was used at most, and where."""
    rows = [["gate", "checked", "of its bound", "at", "result"]]
    gates: dict[str, list[tuple[str, GateResult]]] = {}
    for section in comparison.sections:
        for gate in section.gates:
            gates.setdefault(gate.name, []).append((f"{section.name}, {section.weights}", gate))
    for name, found in gates.items():
        checked = sum(gate.checked for _, gate in found)
        measured = [
            (_share(m.error, m.bound), m.reference, where)
            for where, gate in found
            for m in gate.measurements
        ]
        share, at = "", f"{len(found)} checkpoints" if len(found) > 1 else found[0][0]
        if measured:
            most = max(measured, key=lambda item: item[0] if item[0] == item[0] else math.inf)
            share, at = (f"{most[0]:.2g}" if most[0] else "0"), f"{most[1]} ({most[2]})"
        rows.append(
            [
                name,
                f"{checked:,}",
                share,
                at,
                "passed" if all(g.passed for _, g in found) else "FAILED",
            ]
        )
    return rows


def coloured(text: str, equal: bool, terminal: bool) -> str:
    """Paints a verdict green or red, on a terminal only."""
    return f"\033[{32 if equal else 31};1m{text}\033[0m" if terminal else text


# --- files ----------------------------------------------------------------------------------------


def markdown(report: Json) -> str:
    """The report for a pull request or an issue."""
    text = [f"# Parity: {'equal' if report['equal'] else 'DIFFERENT'}", "", report["verdict"], ""]
    if report["findings"]:
        text += [
            "## What differs",
            "",
            "| gate | where (reference) | where (port) | relative error | what |",
        ]
        text.append("|---|---|---|---|---|")
        for f in report["findings"][:FINDINGS_SHOWN]:
            what = f"{f['what']}{'; looks like: ' + f['hint'] if f['hint'] else ''}".replace(
                "|", "\\|"
            )
            text.append(
                f"| {f['gate']} | `{f['reference']}` | `{f['port']}` | {_short(f['error'])} | "
                f"{what} |"
            )
        if len(report["findings"]) > FINDINGS_SHOWN:
            text.append(f"\n... and {len(report['findings']) - FINDINGS_SHOWN} more.")
        text.append("")
    text += [
        "## Gates",
        "",
        "| checkpoint | gate | checked | largest share of its bound | bound | result |",
    ]
    text.append("|---|---|---|---|---|---|")
    for section, gate in _gates(report):
        shares = [m["share"] for m in gate["measurements"]]
        text.append(
            f"| {section['name']}, {section['weights']} | {gate['name']} | {gate['checked']} | "
            f"{_short(max(map(float, shares))) if shares else ''} | {gate['bound']} | "
            f"{'passed' if gate['passed'] else '**failed**'} |"
        )
    for key in ("outputs", "environment"):
        if report.get(key):
            text += ["", f"## {key.capitalize()}", ""]
            items = report[key] if isinstance(report[key], list) else [report[key]]
            text += [
                f"- {', '.join(f'{name} {_short(value)}' for name, value in item.items())}"
                for item in items
            ]
    return "\n".join(text) + "\n"


def junit(report: Json) -> str:
    """The report for CI: one test case a gate and checkpoint."""
    gates = list(_gates(report))
    failed = [gate for _, gate in gates if not gate["passed"]]
    suite = ElementTree.Element(
        "testsuite",
        name="siglip_port.parity",
        tests=str(len(gates)),
        failures=str(len(failed)),
        errors="0",
    )
    for section, gate in gates:
        where = f"{section['name']}, {section['weights']}"
        case = ElementTree.SubElement(
            suite, "testcase", classname=f"parity.{where}", name=gate["name"]
        )
        if not gate["passed"]:
            mine = [
                f
                for f in report["findings"]
                if f["gate"] == gate["name"] and f["section"] == section["name"]
            ]
            message = mine[0]["text"] if mine else "checked nothing"
            failure = ElementTree.SubElement(case, "failure", message=message)
            failure.text = "\n".join(f["text"] for f in mine)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def against_baseline(report: Json, baseline: Json) -> list[str]:
    """What became of an earlier report's figures: lines to print.

    A pass that has grown is worth a look.
    """
    if baseline.get("schema") != SCHEMA:
        raise ValueError(
            f"the baseline has schema {baseline.get('schema')!r}, expected {SCHEMA}; write it anew"
        )
    now, then = _by_place(report), _by_place(baseline)
    both = [place for place in now if place in then]
    text = [
        f"against the baseline: {len(both)} figures in both, {len(now) - len(both)} new, "
        f"{len(then) - len(both)} gone"
    ]
    if report["equal"] != baseline["equal"]:
        text.append(f"  the verdict was: {baseline['verdict']}")
    grown = sorted(((now[p] - then[p], p) for p in both if now[p] > then[p]), reverse=True)
    for _, place in grown[:3]:
        text.append(
            f"  {', '.join(place)}: {then[place]:.2g} of its bound before, {now[place]:.2g} now"
        )
    return text


def _by_place(report: Json) -> dict[tuple[str, ...], float]:
    return {
        (section["name"], section["weights"], m["run"], m["reference"]): float(m["share"])
        for section, gate in _gates(report)
        for m in gate["measurements"]
    }


def _gates(report: Json) -> Iterable[tuple[Json, Json]]:
    return ((section, gate) for section in report["sections"] for gate in section["gates"])


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def dumps(report: Json) -> str:
    """The JSON as text."""
    return json.dumps(report, indent=1, allow_nan=False) + "\n"
