"""The league table: what the acceptance rules of other projects make of our catalog of mutants.

`uv run --group plot scripts/benchmarks/acceptance_rules.py` takes a minute on 2 cores, prints
the table, writes it into docs/parity.md and draws docs/images/league.svg. Our own row is that of
`uv run compare_origin.py --selftest --full`, recorded in docs/selftest.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from scripts.selftest import catalog
from scripts.selftest.mutant import Mutant
from siglip_port.parity.metrics import cosine, relative_error
from siglip_port.parity.siglip import cases as proof
from siglip_port.parity.siglip.cases import Case

ROOT = Path(__file__).resolve().parents[2]

FIGURE = ROOT / "docs" / "images" / "league.svg"
RECORDED = ROOT / "docs" / "selftest.json"
WEIGHTS = ("default", "N1", "L7")
OURS = "**this harness**"

Rule = Callable[[Tensor, Tensor, Tensor], bool]
"""Whether the port's output is accepted, given the reference's, and its float64 truth."""


def same(port: Tensor, reference: Tensor, truth: Tensor) -> bool:
    """The rule of `torch._dynamo.utils.same`.

    The port's RMSE may be twice the reference's own, and 1e-5.
    """

    def rmse(value: Tensor) -> float:
        return float((value.double() - truth).square().mean().sqrt())

    return torch.allclose(port, reference, 1e-4, 1e-4) or rmse(port) <= 2 * rmse(reference) + 1e-5


RULES: dict[str, Rule] = {
    "cosine ≥ 0.997 (Polygraphy)": lambda p, r, t: float(cosine(p, r).min()) >= 0.997,
    "cosine ≥ 0.999 (vLLM)": lambda p, r, t: float(cosine(p, r).min()) >= 0.999,
    "mean cosine ≥ 0.9999": lambda p, r, t: float(cosine(p, r).mean()) >= 0.9999,
    "cosine ≥ 0.9999 (the usual)": lambda p, r, t: float(cosine(p, r).min()) >= 0.9999,
    "NMSE < 1e-2 (llama.cpp)": lambda p, r, t: relative_error(p, r) ** 2 < 1e-2,
    "largest difference ≤ 1e-3 (keras-hub)": lambda p, r, t: float((p - r).abs().max()) <= 1e-3,
    "largest difference ≤ 1e-4 (optimum)": lambda p, r, t: float((p - r).abs().max()) <= 1e-4,
    "torch.testing.assert_close": lambda p, r, t: torch.allclose(p, r, 1.3e-6, 1e-5),
    "torch._dynamo.utils.same": same,
}


def accepted(mutant: Mutant, case: Case) -> dict[str, bool]:
    """What each rule makes of a mutant's outputs in float32.

    What cannot even run is accepted by none.
    """
    truth = case.reference_run(torch.float32)
    theirs, exact = truth.outputs["sdpa"], truth.exact.outputs
    try:
        with mutant.applied():
            torch.manual_seed(0)
            port = mutant.load(case.source)
            with torch.inference_mode():
                ours = proof.port_outputs(port, case.inputs)
    except (RuntimeError, ValueError):
        return dict.fromkeys(RULES, False)
    fits = all(
        ours[name].shape == tensor.shape and ours[name].isfinite().all()
        for name, tensor in theirs.items()
    )
    return {
        name: bool(fits) and all(rule(ours[n], theirs[n], exact[n]) for n in theirs)
        for name, rule in RULES.items()
    }


def measure() -> tuple[int, dict[str, dict[str, tuple[int, int]]]]:
    """Counts: rule -> weights -> (bugs detected, false alarms)."""
    mistakes = [mutant for mutant in catalog.MUTANTS if mutant.subject == "port"]
    counts: dict[str, dict[str, tuple[int, int]]] = {name: {} for name in RULES}
    for weights in WEIGHTS:
        with proof.random_case(proof.ODD, weights, gates=()) as case:
            wrong = [accepted(mutant, case) for mutant in mistakes]
            right = [accepted(mutant, case) for mutant in catalog.EQUIVALENT]
        for name in RULES:
            counts[name][weights] = (
                sum(not a[name] for a in wrong),
                sum(not a[name] for a in right),
            )
    return len(mistakes), counts


def ours() -> tuple[int, int]:
    """Bugs in the port that the harness detects and names, and false alarms, as recorded."""
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    port = {mutant.name for mutant in catalog.MUTANTS if mutant.subject == "port"}
    found = sum(
        bool(m["noticed"]) and m["named"] for m in recorded["mistakes"] if m["name"] in port
    )
    return found, sum(not run["passed"] for run in recorded["false_alarms"])


def table(total: int, counts: Mapping[str, Mapping[str, tuple[int, int]]]) -> str:
    """The league in Markdown."""
    lines = [
        f"| accept if ... ({total} bugs, {len(catalog.EQUIVALENT)} equivalent variants) | fresh "
        "initialization | N1 | L7 |"
    ]
    lines.append("|---|---|---|---|")
    for name, by_weights in counts.items():
        cells = [
            f"{noticed}{f' ({alarms} false alarms)' if alarms else ''}"
            for noticed, alarms in by_weights.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    noticed, alarms = ours()
    lines.append(
        f"| {OURS} (makes its own weights) | | **{noticed}, each by name** ({alarms} false alarms) "
        "| |"
    )
    return "\n".join(lines)


def draw(total: int, counts: Mapping[str, Mapping[str, tuple[int, int]]]) -> None:
    """Draws how many bugs each rule detects on a fresh initialization, as most tests use it."""
    plt.rcParams.update(
        {"font.size": 10, "svg.hashsalt": "siglip_port", "font.family": "sans-serif"}
    )
    rows = sorted((by_weights["default"][0], name) for name, by_weights in counts.items())
    rows.append((ours()[0], "this harness"))
    figure, axes = plt.subplots(figsize=(8, 3.9), layout="constrained")
    for y, (noticed, name) in enumerate(rows):
        last = name == "this harness"
        axes.barh(y, total, color="#f3e3e1", height=0.68)
        axes.barh(y, noticed, color="#2e7d32" if last else "#8a97a6", height=0.68)
        missed = total - noticed
        axes.text(
            noticed - 3, y, f"{noticed}", ha="right", va="center", color="white", weight="bold"
        )
        if missed:
            axes.text(total - 2, y, f"{missed} unnoticed", ha="right", va="center", color="#b3261e")
    axes.set_yticks(range(len(rows)), [name for _, name in rows])
    axes.set(xlim=(0, total), xticks=[])
    title = f"Of {total} bugs, detected by each acceptance rule on freshly initialized weights"
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, metadata={"Date": None})


def insert(path: Path, text: str) -> None:
    """Puts the table between the marks of a document."""
    before = path.read_text(encoding="utf-8")
    marks = "<!-- generated: league -->", "<!-- end -->"
    pattern = re.escape(marks[0]) + ".*?" + re.escape(marks[1])
    after, times = re.subn(
        pattern, lambda _: f"{marks[0]}\n{text}\n{marks[1]}", before, flags=re.DOTALL
    )
    if times != 1:
        raise ValueError(f"{path.name} has the marks {marks} {times} times, expected once")
    path.write_text(after, encoding="utf-8")


def main() -> None:
    """Measures, prints, writes and draws."""
    torch.set_num_threads(1)  # small encoders are fastest so
    total, counts = measure()
    text = table(total, counts)
    print(text)
    insert(ROOT / "docs" / "parity.md", text)
    draw(total, counts)


if __name__ == "__main__":
    main()
