"""The gate `numerics`: both sides compute the same function.

Both run in float64, where rounding is negligible. Their outputs decide; the taps locate a
difference. Free-running, an error propagates to all later taps; teacher-forced (every step gets the
reference's inputs), only the step that causes it differs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from siglip_port.parity import bounds, hints
from siglip_port.parity.gates.float64_runs import Float64Runs, run_both_ways, run_in_float64
from siglip_port.parity.gates.missing_outputs import find_missing_outputs
from siglip_port.parity.gates.suspects import Judgment, judge, uncompared_before
from siglip_port.parity.hints import Explanation
from siglip_port.parity.observe import ComparedRun, ReferenceRun
from siglip_port.parity.results import Finding, GateResult, Measurement
from siglip_port.parity.sides import Side
from siglip_port.parity.taps import Tap
from siglip_port.text import fold_blocks


def check_numerics(
    port: Side, run: ReferenceRun, taps: list[Tap], *, with_hints: bool = True
) -> GateResult:
    """Compare a port with the reference in float64, at every output and tap.

    Args:
        port: Port in `eval()` mode.
        run: Run of the reference.
        taps: Taps to compare.
        with_hints: Whether to look for known bugs that explain the differences.
    """
    runs = run_both_ways(port, run, taps)
    judgment = judge(runs)
    findings = find_missing_outputs(run, runs.free)
    findings += explain_suspects(runs, judgment.suspects, with_hints=with_hints)
    measurements = [*measure(runs, judgment, "free-running", runs.free)]
    measurements += measure(runs, judgment, "teacher-forced", runs.forced)
    return GateResult(
        "numerics",
        len(measurements),
        f"{bounds.FLOAT64_BOUND:g}: {bounds.FLOAT64_ORIGIN}",
        tuple(findings),
        tuple(measurements),
        uncompared_taps=tuple(runs.free.uncompared),
        float32_upcasts=tuple(judgment.float32_rounding),
        differing_taps=tuple(judgment.differing_taps),
    )


def explain_suspects(runs: Float64Runs, suspects: list[str], *, with_hints: bool) -> list[Finding]:
    """Return a finding per suspect, with the known bug that explains it."""
    values = port_values(runs, suspects)
    explanations: dict[str, Explanation] = {}
    if with_hints:
        compared = {name: value for name, value in values.items() if name in runs.free.errors}
        explanations = hints.explain_taps(runs.reference, compared)
    findings = []
    for name in suspects:
        if name in runs.free.uncompared:
            findings.append(uncompared_finding(runs, name, values.get(name)))
        elif runs.is_output(name):
            findings.append(output_finding(runs, name, with_hints=with_hints))
        else:
            explanation = explanations.get(name, Explanation())
            findings.append(difference_finding(runs, name, explanation))
    return findings


def port_values(runs: Float64Runs, names: list[str]) -> dict[str, Tensor]:
    """Return the port's values at some taps, teacher-forced."""
    capture = frozenset(names) & runs.reference.exact.taps.keys()
    if not capture:
        return {}
    run = run_in_float64(runs.port, runs.reference, runs.taps, forced=True, capture=capture)
    return run.values


def uncompared_finding(runs: Float64Runs, name: str, value: Tensor | None) -> Finding:
    """Return the finding for a tap that could not be compared.

    Args:
        runs: Runs of both sides.
        name: Tap, by the reference's name.
        value: The port's value there, if the module was called.
    """
    message = runs.free.uncompared[name]
    if value is not None:
        expected = list(runs.reference.exact.taps[name].shape)
        message += f": {list(value.shape)}, expected {expected}"
    return Finding(message, name, runs.port_name(name), math.inf)


def output_finding(runs: Float64Runs, name: str, *, with_hints: bool) -> Finding:
    """Return the finding for an output that differs."""
    hint = ""
    if with_hints:
        exact = runs.reference.exact.outputs[name]
        hint = hints.explain_output(runs.free.outputs[name], exact)
    return difference_finding(runs, name, Explanation(hint))


def difference_finding(runs: Float64Runs, name: str, explanation: Explanation) -> Finding:
    """Return the finding for a point that differs.

    Args:
        runs: Runs of both sides.
        name: Tap or output, by the reference's name.
        explanation: Known bug that explains it, or the taps that would help to find one.
    """
    run = runs.forced if name in runs.wrong_steps else runs.free
    error = run.errors[name].overall
    message = f"differs in float64, bound {bounds.FLOAT64_BOUND:g}"
    covered = covered_modules(runs, name)
    if covered:
        message += f" (this step includes {covered}, which the port does not call as a module)"
    if explanation.missing_taps:
        message += f" (tap {' and '.join(explanation.missing_taps)} for its cause)"
    return Finding(message, name, runs.port_name(name), error, explanation.hint)


def covered_modules(runs: Float64Runs, name: str) -> str:
    """List the uncompared modules that the step to a point covers."""
    modules = []
    for point in uncompared_before(runs, name):
        if not point.endswith(":input"):
            modules.append(point)
    return ", ".join(fold_blocks(modules))


def measure(
    runs: Float64Runs, judgment: Judgment, kind: str, port_run: ComparedRun
) -> Iterator[Measurement]:
    """Yield the error at every point that shows a difference of the outputs, with its bound."""
    passed = not judgment.suspects
    for name in runs.reference.points:
        if name not in port_run.errors or name in judgment.differing_taps:
            continue
        error = port_run.errors[name].overall
        bound = bounds.FLOAT64_BOUND
        if judgment.noise and judgment.float32_rounding:
            bound = bounds.ROUNDING_FACTOR * judgment.noise[name].overall
        if passed and port_run is runs.forced and not error <= bound:
            continue  # no step of the port's computation: see `Float64Runs.wrong_steps`
        yield Measurement(f"float64, {kind}", name, runs.port_name(name), error, bound)
