"""Updates the generated tables and counts of README.md and docs/.

    uv run scripts/docs.py            rewrite every generated block
    uv run scripts/docs.py --check    fail if a block is out of date

A block lies between `<!-- generated: NAME -->` and `<!-- end -->`; NAME is a key of `BLOCKS`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def to_markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format a table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def read_json(name: str) -> Any:  # noqa: ANN401 (whatever the file holds)
    """Read a file of docs/."""
    return json.loads((ROOT / "docs" / name).read_text(encoding="utf-8"))


def checkpoints() -> str:
    """The published checkpoints: one row per size, one column per family."""
    from siglip_port.checkpoint.registry import PUBLISHED, SIZES

    cells: dict[tuple[str, str], list[str]] = defaultdict(list)
    parameters: dict[str, int] = {}
    for published in PUBLISHED:
        _, family, name = re.split(r"[/-]", published.repo, maxsplit=2)
        parameters.setdefault(published.size, published.vision_parameters)
        name = name.removeprefix(f"{published.size}-")
        cells[published.size, family].append(f"`{name}`")
    rows = []
    for size in SIZES:
        siglip = ", ".join(cells[size, "siglip"])
        if cells[size, "medsiglip"]:
            siglip += "; `google/medsiglip-448`"
        siglip2 = ", ".join(cells[size, "siglip2"])
        rows.append((f"{size}, {parameters[size] / 1e6:,.0f} M", siglip or "none", siglip2))
    header = ["vision encoder", "`google/siglip-SIZE-...`", "`google/siglip2-SIZE-...`"]
    return to_markdown(header, rows)


def layouts() -> str:
    """The layouts: their users, and the stored names that identify them."""
    from siglip_port.checkpoint.layouts import LAYOUTS

    rows = []
    for layout in LAYOUTS:
        patch_embedding, other = layout.signature_keys
        dimensions = 2 if layout.square_dims is None else 4
        names = f"`{patch_embedding}`, {dimensions} dimensions; `{other}`"
        rows.append((f"`{layout.name}`", layout.used_by, names))
    return to_markdown(["`layout=`", "used by", "recognized by, under any prefix"], rows)


def models() -> str:
    """The models that contain the encoder, by the layout of their files."""
    from siglip_port.checkpoint.layouts import LAYOUTS

    rows = []
    others = []
    for layout in LAYOUTS:
        if layout.name in ("huggingface", "huggingface-naflex", "timm", "big_vision"):
            rows.append((f"`{layout.name}`", layout.used_by))
        elif not layout.name.endswith(("-naflex", "-scanned")):
            others.append(layout)
    names = ", ".join(f"`{layout.name}`" for layout in others)
    rows.append((names, "; ".join(layout.used_by for layout in others)))
    return to_markdown(["layout", "used by"], rows)


def commands() -> str:
    """The commands of `siglip-port`."""
    import typer.main

    from siglip_port.cli.app import app

    group = typer.main.get_command(app)
    rows = []
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        rows.append((f"`siglip-port {name}`", command.get_short_help_str(limit=100)))
    return to_markdown(["command", "purpose"], rows)


def gates() -> str:
    """The gates, their meaning, and their bounds."""
    from siglip_port.parity.gates.meaning import MEANING

    rows = [(name, meaning.text, meaning.bound) for name, meaning in MEANING.items()]
    return to_markdown(["gate", "what holds if it passes", "bound"], rows)


def bounds() -> str:
    """The bounds and their basis."""
    from siglip_port.parity import bounds as values

    calibration = read_json("calibration.json")
    largest = max(calibration["equivalent_variants"].values())
    rounding = (
        f"equivalent variants reach at most {largest:.2f} of the bound, the smallest rounding bug "
        f"{calibration['smallest_bug']:.2f}"
    )
    upcast = (
        "accepted only if it changes on inputs and weights that differ by 1e-3, as rounding does "
        "and a bug does not; the verdict lists it, and the gate `rounding` judges it"
    )
    factor, worst = values.ROUNDING_FACTOR, values.WORST_FACTOR
    factors = f"{factor:g}x the reference's ({worst:g}x for the worst vector)"
    rows = [
        ("difference in float64", f"{values.FLOAT64_BOUND:g}", values.FLOAT64_ORIGIN),
        ("float32 inside the port", f"{factor:g}x the reference's in float32", upcast),
        ("rounding error", factors, rounding),
    ]
    return to_markdown(["bound", "value", "basis"], rows)


def selftest() -> str:
    """The detections of the recorded self-test, by gate."""
    from siglip_port.parity.siglip.census import summarize

    recorded = read_json("selftest.json")
    rows = []
    for gate, counts in summarize(recorded)["gates"].items():
        rows.append((gate, counts["mutants"], counts["detected"], counts["located"]))
    header = ["gate", "its mutants", "detected", "located"]
    command = "`uv run siglip-port verify --selftest` ([full results](selftest.json))"
    text = f"{command}, on {recorded['machine']}: {recorded['summary']}.\n\n"
    return text + to_markdown(header, rows)


def proof() -> str:
    """The recorded self-test in one sentence."""
    recorded = read_json("selftest.json")
    mutants = recorded["mutants"]
    public = sum(mutant["source"] != "variant" for mutant in mutants)
    detected = sum(mutant["gate"] in mutant["detected_by"] for mutant in mutants)
    located = sum(mutant["located"] for mutant in mutants)
    runs = recorded["equivalent_variants"]
    variants = len({run["name"] for run in runs})
    false_alarms = sum(run["false_alarm"] for run in runs)
    return (
        f"`uv run compare_origin.py --selftest` plants {len(mutants)} bugs in the port, "
        f"{public} of them with a public source. The gates detect {detected} and locate "
        f"{located}, with {false_alarms} false alarms in {len(runs)} runs of {variants} equivalent "
        "variants ([details](docs/parity.md)).\n\nEach gate is judged on weights made for it. On "
        "the same weights for every rule, fresh or stressed, the gates still detect the most:\n"
    )


def acceptance_rules() -> str:
    """Mutants that each acceptance rule detects, by weights."""
    recorded = read_json("acceptance_rules.json")
    weights = recorded["weights"]
    rows = []
    for rule in recorded["rules"]:
        cells = []
        for name in weights:
            false_alarms = rule["false_alarms"][name]
            noun = "false alarm" if false_alarms == 1 else "false alarms"
            suffix = f" ({false_alarms} {noun})" if false_alarms else ""
            cells.append(f"{rule['detected'][name]}{suffix}")
        rows.append((rule["rule"], *cells))
    return to_markdown([f"detected, of {recorded['mutants']}", *weights.values()], rows)


def verdict() -> str:
    """The last lines of the recorded comparison: two gates, and the verdict."""
    lines = (ROOT / "docs" / "verify.txt").read_text(encoding="utf-8").splitlines()
    shown = [line for line in lines if line.startswith(("gate ", "numerics ", "rounding float32"))]
    last = textwrap.fill(lines[-1], 110, subsequent_indent="  ")
    command = "$ uv run compare_origin.py --weights random"
    text = "\n".join([command, "...", *shown, "...", last])
    return f"```\n{text}\n```\n"


BLOCKS: dict[str, Callable[[], str]] = {
    "acceptance_rules": acceptance_rules,
    "bounds": bounds,
    "checkpoints": checkpoints,
    "commands": commands,
    "gates": gates,
    "layouts": layouts,
    "models": models,
    "proof": proof,
    "selftest": selftest,
    "verdict": verdict,
}


def update(page: str) -> str:
    """Rewrite the generated blocks of a page."""

    def replace(match: re.Match[str]) -> str:
        return match[1] + BLOCKS[match[2]]() + match[3]

    return BLOCK.sub(replace, page)


def main() -> int:
    """Update or check the pages; return 1 if `--check` finds an outdated block."""
    parser = argparse.ArgumentParser(description="Update the generated blocks of the docs.")
    parser.add_argument("--check", action="store_true", help="Change nothing; fail if out of date.")
    check = parser.parse_args().check
    outdated = []
    for path in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
    ]:
        old = path.read_text(encoding="utf-8")
        new = update(old)
        if new != old:
            outdated.append(path.relative_to(ROOT).as_posix())
            if not check:
                path.write_text(new, encoding="utf-8")
    if check and outdated:
        print(f"out of date: {', '.join(outdated)}; run: uv run scripts/docs.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
