"""Acceptance rules of other projects, and this port's gates, on the self-test's mutants.

    uv run --group plot scripts/benchmarks/acceptance_rules.py

All rules judge the same mutants on the same weights: a fresh initialization, and the stress weights
N1 and L7. The script prints a Markdown table for docs/parity.md, and writes
docs/acceptance_rules.json and the chart docs/images/league.svg.
"""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

from scripts.selftest import catalog
from scripts.selftest.mutant import Mutant
from scripts.selftest.parallel import count_processes, each
from siglip_port import SigLipVisionModel
from siglip_port.atomic import write_text
from siglip_port.parity.metrics import cosine, relative_error
from siglip_port.parity.siglip import cases, reference
from siglip_port.parity.siglip.cases import Case
from siglip_port.threads import torch_threads

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "docs" / "images" / "league.svg"
RESULTS = ROOT / "docs" / "acceptance_rules.json"
COMMAND = "uv run --group plot scripts/benchmarks/acceptance_rules.py"

WEIGHTS = {
    "default": "fresh initialization",
    "N1": "stress weights N1",
    "L7": "stress weights L7",
}
"""Recipe of the weights -> column of the table."""

GATES = "siglip_port gates"

TEXT_STYLE: dict[str, Any] = {"va": "center", "fontsize": 9}

Rejections = dict[str, dict[str, list[str]]]
"""Weights -> mutant -> the rules that reject it."""

Rule = Callable[[Tensor, Tensor, Tensor], bool]
"""Port's output, reference's output, reference's output in float64 -> whether it is accepted."""


def dynamo_same(port: Tensor, expected: Tensor, exact: Tensor) -> bool:
    """The rule of `torch._dynamo.utils.same`.

    Accepts twice the reference's own RMSE, plus 1e-5.
    """

    def rmse(value: Tensor) -> float:
        return float((value.double() - exact).square().mean().sqrt())

    if torch.allclose(port, expected, 1e-4, 1e-4):
        return True
    return rmse(port) <= 2 * rmse(expected) + 1e-5


RULES: dict[str, Rule] = {
    "cosine ≥ 0.997 (Polygraphy)": lambda p, r, e: float(cosine(p, r).min()) >= 0.997,
    "cosine ≥ 0.999 (vLLM)": lambda p, r, e: float(cosine(p, r).min()) >= 0.999,
    "mean cosine ≥ 0.9999": lambda p, r, e: float(cosine(p, r).mean()) >= 0.9999,
    "cosine ≥ 0.9999 (common)": lambda p, r, e: float(cosine(p, r).min()) >= 0.9999,
    "NMSE < 1e-2 (llama.cpp)": lambda p, r, e: relative_error(p, r) ** 2 < 1e-2,
    "max abs error ≤ 1e-3 (keras-hub)": lambda p, r, e: float((p - r).abs().max()) <= 1e-3,
    "max abs error ≤ 1e-4 (optimum)": lambda p, r, e: float((p - r).abs().max()) <= 1e-4,
    "torch.testing.assert_close": lambda p, r, e: torch.allclose(p, r, 1.3e-6, 1e-5),
    "torch._dynamo.utils.same": dynamo_same,
}


@dataclass
class Counts:
    """Counts of one rule, by weights.

    Attributes:
        detected: Mutants that the rule rejects.
        false_alarms: Equivalent variants that the rule rejects.
    """

    detected: Counter[str] = field(default_factory=Counter)
    false_alarms: Counter[str] = field(default_factory=Counter)


# --- measurement ----------------------------------------------------------------------------------


def find_rejections(mutant: Mutant, case: Case) -> list[str]:
    """Return the rules that reject a mutant's outputs in float32, and `GATES` if a gate does.

    An error while loading or running the port counts as a rejection.
    """
    with mutant.applied():
        torch.manual_seed(0)  # for mutants that draw random numbers
        try:
            port = mutant.load(case.source)
            with torch.inference_mode():
                outputs = cases.port_outputs(port, case.inputs)
        except (RuntimeError, ValueError):
            return [*RULES, GATES]
        rejections = rules_that_reject(outputs, case)
        if not passes_gates(port, case):
            rejections.append(GATES)
    return rejections


def passes_gates(port: SigLipVisionModel, case: Case) -> bool:
    """Whether all gates pass, rounding in float32 only."""
    try:
        return all(gate.passed for gate in case.check(port, with_hints=False))
    except (RuntimeError, ValueError):
        return False


def rules_that_reject(outputs: dict[str, Tensor], case: Case) -> list[str]:
    """Return the rules that reject at least one output; all of them for NaN or a wrong shape."""
    run = case.reference_run(torch.float32)
    expected, exact = run.outputs["sdpa"], run.exact.outputs
    for name, tensor in expected.items():
        if outputs[name].shape != tensor.shape or not outputs[name].isfinite().all():
            return list(RULES)
    rejections = []
    for rule, accepts in RULES.items():
        if not all(accepts(outputs[name], expected[name], exact[name]) for name in expected):
            rejections.append(rule)
    return rejections


def measure(mutants: Sequence[Mutant]) -> Rejections:
    """Run all mutants on all weights."""
    rejections = {}
    for weights in WEIGHTS:
        with cases.random_case(cases.ODD, weights) as case:
            case.reference_run(torch.float32)  # once, before the processes fork

            def judge(mutant: Mutant, case: Case = case) -> list[str]:
                return find_rejections(mutant, case)

            results = each(judge, mutants, count_processes("cpu"))
            rejections[weights] = {m.name: r for m, r in zip(mutants, results, strict=True)}
    return rejections


def count(mutants: Sequence[Mutant], rejections: Rejections) -> dict[str, Counts]:
    """Count the rejections of each rule."""
    counts = {rule: Counts() for rule in (*RULES, GATES)}
    for mutant in mutants:
        for rule, rule_counts in counts.items():
            rejected_on = [w for w in rejections if rule in rejections[w][mutant.name]]
            if mutant.is_equivalent:
                rule_counts.false_alarms.update(rejected_on)
            else:
                rule_counts.detected.update(rejected_on)
    return counts


def missed_by_gates(mutants: Sequence[Mutant], rejections: Rejections) -> dict[str, list[str]]:
    """Return the names of the mutants that no gate detects, by weights."""
    bugs = [mutant.name for mutant in mutants if not mutant.is_equivalent]
    names: dict[str, list[str]] = {}
    for weights, rules in rejections.items():
        names[weights] = [name for name in bugs if GATES not in rules[name]]
    return names


# --- results --------------------------------------------------------------------------------------


def to_json(mutants: Sequence[Mutant], rejections: Rejections) -> dict[str, object]:
    """Return all counts for docs and programs."""
    rules = []
    for name, counts in count(mutants, rejections).items():
        rules.append(
            {
                "rule": name,
                "detected": {key: counts.detected[key] for key in WEIGHTS},
                "false_alarms": {key: counts.false_alarms[key] for key in WEIGHTS},
            }
        )
    return {
        "schema": 1,
        "command": COMMAND,
        "machine": f"{platform.system()} {platform.machine()}, torch {torch.__version__}, "
        f"transformers {reference.VERSION}, Python {platform.python_version()}",
        "mutants": sum(not mutant.is_equivalent for mutant in mutants),
        "equivalent_variants": sum(mutant.is_equivalent for mutant in mutants),
        "weights": WEIGHTS,
        "rules": rules,
        "missed_by_gates": missed_by_gates(mutants, rejections),
    }


def to_markdown(results: dict[str, Any]) -> str:
    """Return the table of docs/parity.md: detected mutants, and false alarms."""
    lines = [
        f"| mutants detected, of {results['mutants']} | {' | '.join(WEIGHTS.values())} |",
        f"|---|{'---|' * len(WEIGHTS)}",
    ]
    for rule in results["rules"]:
        cells = [rule["rule"]]
        for key in WEIGHTS:
            false_alarms = rule["false_alarms"][key]
            note = f" ({describe_alarms(false_alarms)})" if false_alarms else ""
            cells.append(f"{rule['detected'][key]}{note}")
        if rule["rule"] == GATES:
            cells = [f"**{cell}**" for cell in cells]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def describe_alarms(number: int) -> str:
    """Return `1 false alarm`, `2 false alarms`, ..."""
    return f"{number} false alarm{'' if number == 1 else 's'}"


def draw(results: dict[str, Any]) -> None:
    """Draw the detected mutants: two bars per rule, fresh initialization and stress weights N1."""
    plt.rcParams.update(
        {"font.size": 10, "svg.hashsalt": "siglip_port", "font.family": "sans-serif"}
    )
    total = results["mutants"]
    rules = sorted(results["rules"], key=lambda rule: rule["detected"]["N1"])
    figure, axes = plt.subplots(figsize=(8.6, 5.2), layout="constrained")
    draw_bars(axes, rules, total, "default", 0.2, "#a3aebb", "#7cb581")
    draw_bars(axes, rules, total, "N1", -0.2, "#56626f", "#2e7d32")
    axes.set_yticks(range(len(rules)), [rule["rule"] for rule in rules])
    axes.set(xlim=(0, total * 1.18), xticks=[])
    axes.set_title(f"Mutants detected by each acceptance rule, of {total}", loc="left", fontsize=11)
    axes.legend(loc="upper left", bbox_to_anchor=(0, 0), ncols=2, frameon=False, fontsize=9)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    CHART.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(CHART, metadata={"Date": None})


def draw_bars(
    axes: Axes,
    rules: Sequence[dict[str, Any]],
    total: int,
    weights: str,
    offset: float,
    color: str,
    gates_color: str,
) -> None:
    """Draw the bars of all rules for one kind of weights.

    Args:
        axes: One row per rule.
        rules: Entries of the JSON.
        total: Number of mutants.
        weights: Key of `WEIGHTS`.
        offset: Vertical offset from the row, in rows.
        color: Color of other projects' rules.
        gates_color: Color of the gates.
    """
    rows = [row + offset for row in range(len(rules))]
    colors = [gates_color if rule["rule"] == GATES else color for rule in rules]
    detected = [rule["detected"][weights] for rule in rules]
    axes.barh(rows, total, color="#f3f1ee", height=0.36)
    axes.barh(rows, detected, color=colors, height=0.36, label=WEIGHTS[weights])
    for row, rule, number in zip(rows, rules, detected, strict=True):
        axes.text(
            number - 2, row, f"{number}", color="white", weight="bold", ha="right", **TEXT_STYLE
        )
        false_alarms = rule["false_alarms"][weights]
        if false_alarms:
            note = describe_alarms(false_alarms)
            axes.text(total + 2, row, note, color="#b3261e", ha="left", **TEXT_STYLE)


def main() -> None:
    """Measure, print the table, and write the JSON and the chart."""
    mutants = [mutant for mutant in catalog.MUTANTS if mutant.subject == "port"]
    mutants += catalog.EQUIVALENT
    with torch_threads(1):  # the fastest for small models, and one process a core
        results = to_json(mutants, measure(mutants))
    write_text(RESULTS, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    draw(results)
    print(to_markdown(results))


if __name__ == "__main__":
    main()
