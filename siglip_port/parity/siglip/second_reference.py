"""Triangulation: a second reference shows which of port and reference is the odd one out.

It runs on the weights and inputs of the reference in float64, in its own process
(`second_reference_script.py`): in this environment, or in an isolated one if the package is not
installed or a version is given.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from siglip_port.model import SigLipVisionModel
from siglip_port.parity import bounds, hints
from siglip_port.parity.metrics import relative_error
from siglip_port.parity.observe import ReferenceRun
from siglip_port.parity.results import Comparison, Finding, GateResult
from siglip_port.parity.sides import Side, cast
from siglip_port.parity.siglip import reference
from siglip_port.parity.siglip.cases import Case, port_outputs
from siglip_port.parity.siglip.reference import VERSION

SCRIPT = Path(__file__).with_name("second_reference_script.py")
DISTRIBUTIONS = {"timm": "timm", "open_clip": "open_clip_torch", "transformers": "transformers"}
TIMEOUT = 600.0
"""Seconds for installation and computation."""

LOG_LINES = 6
"""Lines of output that are shown of a script that failed."""

BOUND = (
    f"relative error {bounds.FLOAT64_BOUND:g} in float64, {bounds.UPCAST_BOUND:g} if it has "
    "float32 steps"
)
"""Bound of the gate."""

Pair = tuple[str, str]

Distances = Mapping[Pair, Mapping[str, float]]
"""Relative distance of each pair of implementations, by output."""


GATE = "second-ref"
"""Name of the gate in reports."""


@dataclass(frozen=True)
class Triangulation:
    """Comparison of port, reference and second reference.

    Attributes:
        text: Table of pairwise distances in float64, and a sentence that names the odd one out;
            empty if there is no second reference.
        gate: Whether the second reference agrees with the reference; None if it did not run.
        error: Why it did not run; empty if it ran, or there is none.
    """

    text: str = ""
    gate: GateResult | None = None
    error: str = ""

    def add_to(self, comparison: Comparison) -> Comparison:
        """Add the gate to the first checkpoint of a comparison."""
        if self.gate is None:
            return comparison
        first, *others = comparison.sections
        first = replace(first, gates=(*first.gates, self.gate))
        return replace(comparison, sections=(first, *others))


def run(name: str | None, case: Case, port: SigLipVisionModel) -> Triangulation:
    """Run a second reference, if there is one; an error is a part of the result.

    Args:
        name: Second reference, in the form of `parse`; None for none.
        case: Checkpoint with its reference.
        port: Port, loaded from the checkpoint.
    """
    if name is None:
        return Triangulation()
    try:
        return triangulate(name, case, port)
    except RuntimeError as error:
        return Triangulation(error=str(error))


def triangulate(name: str, case: Case, port: SigLipVisionModel) -> Triangulation:
    """Run a second reference, and find which of the three implementations is the odd one out.

    Args:
        name: Second reference, in the form of `parse`.
        case: Checkpoint with its reference.
        port: Port, loaded from the checkpoint.

    Raises:
        ValueError: The second reference is not supported.
        RuntimeError: It could not be installed or run.
    """
    package, release = parse(name)
    command = script_command(package, release)
    with tempfile.TemporaryDirectory(prefix="siglip_port-") as scratch:
        folder = Path(scratch)
        write_inputs(folder, case)
        run_script(name, [*command, package, scratch], folder / "log.txt")
        with SecondReference.open(package, folder, str(case.inputs.device)) as second:
            return judge(second, case, port)


def check_available(name: str) -> None:
    """Raise unless a second reference is supported and can be run, before anything is computed.

    Raises:
        ValueError: The second reference is not supported.
        RuntimeError: It is not installed, and uv is missing.
    """
    script_command(*parse(name))


def parse(name: str) -> tuple[str, str]:
    """Parse `timm`, `timm==1.0.31`, ...

    Returns:
        Package and version; an empty version if none is given.

    Raises:
        ValueError: The second reference is not supported.
    """
    match = re.fullmatch(rf"({'|'.join(DISTRIBUTIONS)})(?:==(\d[\w.]*))?", name)
    if match is None or name == "transformers":
        raise ValueError(
            "--second-ref must be timm or open_clip, with or without ==VERSION, or "
            f"transformers==VERSION, got {name!r}"
        )
    return match[1], match[2] or ""


def script_command(package: str, release: str) -> list[str]:
    """Return the command line of the script.

    -P and -I keep modules next to the script from shadowing packages.
    """
    if not release and importlib.util.find_spec(package) is not None:
        return [sys.executable, "-P", str(SCRIPT)]
    requirement = DISTRIBUTIONS[package]
    if release:
        requirement += f"=={release}"
    uv = shutil.which("uv")
    if uv is None:
        raise RuntimeError(
            f"--second-ref {requirement} needs uv to create an isolated environment; install uv, "
            "or name a package that is installed"
        )
    torch_requirement = f"torch=={torch.__version__.split('+')[0]}"
    options = ["--no-project", "--isolated", f"--python={sys.executable}"]
    for package_name in (requirement, torch_requirement, "safetensors", "numpy"):
        options.append(f"--with={package_name}")
    return [uv, "run", *options, "python", "-I", str(SCRIPT)]


def write_inputs(folder: Path, case: Case) -> None:
    """Write weights, inputs, configuration and points for the script."""
    run = case.reference_run(case.dtypes[0])
    tensors = case.reference.compute(reference.rounded_tensors_of, run.dtype)
    weights = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    pixel_values = case.inputs.to(run.dtype).cpu().contiguous()
    save_file({"pixel_values": pixel_values}, folder / "inputs.safetensors")
    write_json(folder / "config.json", case.reference.hf_config())
    write_json(folder / "points.json", list(run.exact.taps))


def write_json(path: Path, content: object) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content), encoding="utf-8")


def run_script(name: str, command: list[str], log: Path) -> None:
    """Run the script; kill it after `TIMEOUT`, or if this process is interrupted."""
    with log.open("wb") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            start_new_session=True,
        )
    try:
        outcome = f"exited with code {process.wait(TIMEOUT)}"
    except subprocess.TimeoutExpired:
        outcome = f"timed out after {TIMEOUT:g} s"
    finally:
        if process.poll() is None:  # the whole group: uv does not end its child
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        last_lines = "\n".join(lines[-LOG_LINES:])
        raise RuntimeError(
            f"--second-ref {name}: `{' '.join(command)}` {outcome}; end of its output:\n"
            f"{last_lines}\n"
            "check that the version exists and that the package index is reachable, or name "
            "another version or package"
        )


@dataclass(frozen=True)
class SecondReference:
    """Results of the script.

    Attributes:
        package: Package name.
        label: Package and version.
        is_float64: Whether all steps were computed in float64.
        places: Point of the reference -> place in the second reference.
        read: Function that reads a tensor: `output.NAME`, `tap.POINT`.
    """

    package: str
    label: str
    is_float64: bool
    places: Mapping[str, str]
    read: Callable[[str], Tensor]

    @classmethod
    @contextlib.contextmanager
    def open(cls, package: str, folder: Path, device: str) -> Iterator[SecondReference]:
        """Open the results in a folder; tensors are read on demand."""
        about = json.loads((folder / "second_reference.json").read_text(encoding="utf-8"))
        with safe_open(folder / "outputs.safetensors", "pt", device=device) as file:
            yield cls(package, **about, read=file.get_tensor)


def judge(second: SecondReference, case: Case, port: SigLipVisionModel) -> Triangulation:
    """Compare all three implementations."""
    run = case.reference_run(case.dtypes[0])
    expected = run.exact.outputs
    with cast(port, run.dtype, torch.float64):
        outputs = Side(port, port_outputs).run(run.exact_inputs)
    second_outputs = {name: second.read(f"output.{name}") for name in expected}
    sides = {
        f"reference (transformers {VERSION})": expected,
        "port": outputs,
        second.label: second_outputs,
    }
    distances = {}
    for a, b in combinations(sides, 2):
        distances[a, b] = distances_by_output(sides[a], sides[b], names=expected)
    is_coarse = not second.is_float64
    sentence = verdict(distances, second.label, is_float64=second.is_float64)
    apart = distances_by_output(expected, second_outputs, names=expected)
    findings = []
    if not agrees(max(apart.values()), is_coarse=is_coarse):
        from_port = distances_by_output(outputs, second_outputs, names=expected)
        agrees_with_port = agrees(max(from_port.values()), is_coarse=is_coarse)
        findings.append(difference_finding(second, run, apart, agrees_with_port=agrees_with_port))
        sentence += f"; {describe_place(second, findings[0])}"
    text = f"{distance_table(distances)}\n{sentence}"
    return Triangulation(text, GateResult(GATE, len(expected), BOUND, tuple(findings)))


def difference_finding(
    second: SecondReference,
    run: ReferenceRun,
    apart: Mapping[str, float],
    *,
    agrees_with_port: bool,
) -> Finding:
    """Return the finding for a second reference that differs from the reference.

    Args:
        second: Results of the second reference.
        run: Run of the reference.
        apart: Distance of the two by output.
        agrees_with_port: Whether the second reference agrees with the port.
    """
    transformers = f"transformers {VERSION}"
    far = ", ".join(f"{name} {error:.1e}" for name, error in apart.items())
    message = f"{second.label} differs from port and {transformers} in float64 ({far})"
    if agrees_with_port:
        message = f"{transformers} differs from {second.label} in float64 ({far}), the port agrees"
    point = first_difference(second, run)
    hint = ""
    if point:
        message += f", first at its {second.places[point]}"
        hint = hints.explain_tap(run, point, second.read(f"tap.{point}"))
    return Finding(message, point, hint=hint)


def first_difference(second: SecondReference, run: ReferenceRun) -> str:
    """Return the first point where the two references differ; empty if only outputs do."""
    for point, expected in run.exact.taps.items():
        if point not in second.places:
            continue
        value = second.read(f"tap.{point}")
        if distance(value, expected) > bounds.FLOAT64_BOUND:
            return point
    return ""


def describe_place(second: SecondReference, finding: Finding) -> str:
    """Describe the first point where the two references differ, with a hint."""
    point = finding.reference
    if not point:
        return f"equal at all {len(second.places)} modules that have a counterpart"
    text = f"first at {point} ({second.package}: {second.places[point]})"
    return f"{text}: looks like: {finding.hint}" if finding.hint else text


def distances_by_output(
    expected: Mapping[str, Tensor], outputs: Mapping[str, Tensor], names: Iterable[str]
) -> dict[str, float]:
    """Return the relative distance of two implementations, by output."""
    return {name: distance(outputs.get(name), expected.get(name)) for name in names}


def distance(value: Tensor | None, expected: Tensor | None) -> float:
    """Return the relative error; infinite for NaN, a missing tensor or another shape."""
    if value is None or expected is None or value.shape != expected.shape:
        return math.inf
    error = relative_error(value, expected)
    return error if math.isfinite(error) else math.inf


def verdict(distances: Distances, second: str, *, is_float64: bool = True) -> str:
    """Name the odd one out: the implementation that differs from two that agree.

    Args:
        distances: Distances of all three pairs.
        second: Label of the second reference.
        is_float64: Whether it computed all steps in float64; if not, float32 rounding is tolerated.
    """
    apart = {pair: max(by_output.values()) for pair, by_output in distances.items()}
    coarse = [] if is_float64 else [pair for pair in apart if second in pair]
    agreeing = [pair for pair in apart if agrees(apart[pair], is_coarse=pair in coarse)]
    note = ""
    if coarse:
        note = f" ({second} computes the softmax in float32, which limits the comparison)"
    if len(agreeing) == 3:
        if coarse:
            largest = max(apart[pair] for pair in coarse)
            return f"all three agree, {second} to {largest:.1e}{note}"
        return f"all three agree: at most {max(apart.values()):.1e} apart"
    if len(agreeing) == 2:
        ((a, b),) = apart.keys() - agreeing
        return f"no odd one out: {a} and {b} differ, and the third agrees with both{note}"
    if not agreeing:
        return f"all three differ{note}"
    (odd,) = {side for pair in apart for side in pair} - set(agreeing[0])
    name = odd if odd == second else f"the {odd}"
    far = distances_from_others(distances, odd)
    return f"{name} is the odd one out: {far} from both others{note}"


def agrees(error: float, *, is_coarse: bool) -> bool:
    """Return whether two implementations agree.

    Args:
        error: Their relative distance.
        is_coarse: Whether one of them rounds to float32 inside.
    """
    return error <= (bounds.UPCAST_BOUND if is_coarse else bounds.FLOAT64_BOUND)


def distances_from_others(distances: Distances, side: str) -> str:
    """Describe the distance of one side from the nearer one of the others, by output."""
    first, second = (by_output for pair, by_output in distances.items() if side in pair)
    return ", ".join(f"{name} {min(first[name], second[name]):.1e}" for name in first)


def distance_table(distances: Distances) -> str:
    """Return a table with one row per pair and one column per output."""
    names = list(next(iter(distances.values())))
    rows = [["in float64", *names]]
    for pair, by_output in distances.items():
        rows.append([" - ".join(pair), *(f"{by_output[name]:.1e}" for name in names)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join(lines)
