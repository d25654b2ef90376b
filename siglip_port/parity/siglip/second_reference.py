"""Triangulation: a third implementation says which of port and reference is the odd one out.

The second reference gets the first one's weights and inputs, and computes in float64 in a process
of its own: in this environment, or, where it is not installed or a release is asked for, in an
isolated one (`second_reference_script.py`).
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
from dataclasses import dataclass
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
from siglip_port.parity.sides import Side, cast
from siglip_port.parity.siglip.cases import Case, port_outputs
from siglip_port.parity.siglip.reference import VERSION

SCRIPT = Path(__file__).with_name("second_reference_script.py")
DISTRIBUTIONS = {"timm": "timm", "open_clip": "open_clip_torch", "transformers": "transformers"}
TIMEOUT = 600.0
"""Seconds, for installation and computation together."""

LOG_LINES = 6
"""How many of the last lines of a script that failed are shown."""

Pair = tuple[str, str]

Distances = Mapping[Pair, Mapping[str, float]]
"""How far apart each two of the three are, by output."""


def ask(name: str, case: Case, port: SigLipVisionModel) -> str:
    """Ask a third implementation, and say which of the three is the odd one out.

    Args:
        name: of the second reference, as `parse` knows it.
        case: the checkpoint, with its reference.
        port: loaded from it.

    Returns:
        A table of how far apart each two are in float64, and a sentence.

    Raises:
        ValueError: there is no such second reference.
        RuntimeError: it could not be installed, or could not be run.
    """
    package, release = parse(name)
    command = script_command(package, release)
    with tempfile.TemporaryDirectory(prefix="siglip_port-") as scratch:
        folder = Path(scratch)
        write_inputs(folder, case)
        run_script(name, [*command, package, scratch], folder / "log.txt")
        with SecondReference.open(package, folder, str(case.inputs.device)) as second:
            return judge(second, case, port)


def parse(name: str) -> tuple[str, str]:
    """Take the name of a second reference apart: `timm`, `timm==1.0.31`, ...

    Returns:
        Package, and release or nothing.

    Raises:
        ValueError: there is no such second reference.
    """
    match = re.fullmatch(rf"({'|'.join(DISTRIBUTIONS)})(?:==(\d[\w.]*))?", name)
    if match is None or name == "transformers":
        raise ValueError(
            f"there is no second reference {name!r}; known are timm and open_clip, both also with a version "
            "(timm==1.0.31), and other releases of the reference (transformers==4.57.6)"
        )
    return match[1], match[2] or ""


def script_command(package: str, release: str) -> list[str]:
    """How the script is run.

    -P and -I keep what lies beside it from standing in for other modules.
    """
    if not release and importlib.util.find_spec(package) is not None:
        return [sys.executable, "-P", str(SCRIPT)]
    requirement = DISTRIBUTIONS[package]
    if release:
        requirement += f"=={release}"
    uv = shutil.which("uv")
    if uv is None:
        raise RuntimeError(
            f"to ask {requirement}, uv is needed, which would install it in an environment of its "
            "own, and there is no uv here: install it, or ask a second reference that is installed"
        )
    torch_requirement = f"torch=={torch.__version__.split('+')[0]}"
    options = ["--no-project", "--isolated", f"--python={sys.executable}"]
    for package_name in (requirement, torch_requirement, "safetensors", "numpy"):
        options.append(f"--with={package_name}")
    return [uv, "run", *options, "python", "-I", str(SCRIPT)]


def write_inputs(folder: Path, case: Case) -> None:
    """Write what the second reference is given."""
    run = case.reference_run(case.dtypes[0])
    model = case.reference.model
    with cast(model, run.dtype):
        weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    pixel_values = case.inputs.to(run.dtype).cpu().contiguous()
    save_file({"pixel_values": pixel_values}, folder / "inputs.safetensors")
    write_json(folder / "config.json", model.config.to_dict())
    write_json(folder / "points.json", list(run.exact.taps))


def write_json(path: Path, content: object) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content), encoding="utf-8")


def run_script(name: str, command: list[str], log: Path) -> None:
    """Run the script to its end, which is no later than ours."""
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
        ending = f"ended with exit status {process.wait(TIMEOUT)}"
    except subprocess.TimeoutExpired:
        ending = f"was not done after {TIMEOUT:g} s"
    finally:
        if process.poll() is None:  # uv would leave behind what it started
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        last_lines = "\n".join(lines[-LOG_LINES:])
        raise RuntimeError(
            f"{name} could not be asked: `{' '.join(command)}` {ending}. Its last lines:\n"
            f"{last_lines}\n"
            "If it could not be installed, see whether there is such a release and whether the "
            "package index can be reached; if it failed, ask another release of it, or another "
            "witness"
        )


@dataclass(frozen=True)
class SecondReference:
    """What the script left.

    Attributes:
        package: its name.
        label: package and version.
        is_float64: whether it computed in float64 throughout.
        places: where it has the reference's points.
        read: reads a tensor: `output.NAME`, `tap.POINT`.
    """

    package: str
    label: str
    is_float64: bool
    places: Mapping[str, str]
    read: Callable[[str], Tensor]

    @classmethod
    @contextlib.contextmanager
    def open(cls, package: str, folder: Path, device: str) -> Iterator[SecondReference]:
        """Read what lies in a folder; tensors when they are asked for."""
        about = json.loads((folder / "witness.json").read_text(encoding="utf-8"))
        with safe_open(folder / "outputs.safetensors", "pt", device=device) as file:
            yield cls(package, **about, read=file.get_tensor)


def judge(second: SecondReference, case: Case, port: SigLipVisionModel) -> str:
    """Compare what the second reference computed with what the other two compute."""
    run = case.reference_run(case.dtypes[0])
    with cast(port, run.dtype, torch.float64):
        outputs = Side(port, port_outputs).run(run.exact_inputs)
    expected = run.exact.outputs
    second_outputs = {name: second.read(f"output.{name}") for name in expected}
    sides = {
        f"reference (transformers {VERSION})": expected,
        "port": outputs,
        second.label: second_outputs,
    }
    distances = {}
    for a, b in combinations(sides, 2):
        distances[a, b] = distances_by_output(sides[a], sides[b], names=expected)
    sentence = verdict(distances, second.label, is_float64=second.is_float64)
    apart = distances_by_output(expected, second_outputs, names=expected)
    if max(apart.values()) > bounds.FLOAT64_BOUND:
        sentence += f"; {first_difference(second, run)}"
    return f"{distance_table(distances)}\n{sentence}"


def first_difference(second: SecondReference, run: ReferenceRun) -> str:
    """Where the second reference parts ways with the first, and what that looks like."""
    for point, truth in run.exact.taps.items():
        if point not in second.places:
            continue
        value = second.read(f"tap.{point}")
        if distance(value, truth) > bounds.FLOAT64_BOUND:
            text = f"first at {point} ({second.package}: {second.places[point]})"
            hint = hints.explain_tap(run, point, value)
            return f"{text}: looks like: {hint}" if hint else text
    return f"at none of its {len(second.places)} modules that have a counterpart"


def distances_by_output(
    truth: Mapping[str, Tensor], outputs: Mapping[str, Tensor], names: Iterable[str]
) -> dict[str, float]:
    """How far two sides are apart at every output."""
    return {name: distance(outputs.get(name), truth.get(name)) for name in names}


def distance(value: Tensor | None, truth: Tensor | None) -> float:
    """The relative error.

    Infinite where it is no number, for want of a tensor or of its shape too.
    """
    if value is None or truth is None or value.shape != truth.shape:
        return math.inf
    error = relative_error(value, truth)
    return error if math.isfinite(error) else math.inf


def verdict(distances: Distances, second: str, *, is_float64: bool = True) -> str:
    """Say who is the odd one out: the one that is far from both others while these agree.

    Args:
        distances: of all three pairs.
        second: which of the three is the second reference.
        is_float64: whether it computed in float64 throughout; else float32 rounding is no
            difference of its.
    """
    apart = {pair: max(by_output.values()) for pair, by_output in distances.items()}
    coarse = [] if is_float64 else [pair for pair in apart if second in pair]
    agreeing = [pair for pair in apart if agrees(apart[pair], is_coarse=pair in coarse)]
    note = ""
    if coarse:
        note = f" ({second} has a float32 softmax whatever the dtype, so it can tell nothing finer)"
    if len(agreeing) == 3:
        if coarse:
            largest = max(apart[pair] for pair in coarse)
            return f"all three agree, {second} to {largest:.1e} only{note}"
        return f"all three agree: at most {max(apart.values()):.1e} apart"
    if len(agreeing) == 2:
        ((a, b),) = apart.keys() - agreeing
        return (
            f"nobody is the odd one out: {a} and {b} differ, and the third agrees with both{note}"
        )
    if not agreeing:
        return f"all three differ{note}"
    (odd,) = {side for pair in apart for side in pair} - set(agreeing[0])
    name = odd if odd == second else f"the {odd}"
    far = distances_from_others(distances, odd)
    return f"{name} is the odd one out: {far} from both others{note}"


def agrees(error: float, *, is_coarse: bool) -> bool:
    """Whether two of the three compute the same.

    Args:
        error: their relative distance.
        is_coarse: whether one of them rounds to float32 inside.
    """
    return error <= (bounds.UPCAST_BOUND if is_coarse else bounds.FLOAT64_BOUND)


def distances_from_others(distances: Distances, side: str) -> str:
    """How far one side is from the nearer one of the others, by output."""
    first, second = (by_output for pair, by_output in distances.items() if side in pair)
    return ", ".join(f"{name} {min(first[name], second[name]):.1e}" for name in first)


def distance_table(distances: Distances) -> str:
    """One line a pair, one column an output."""
    names = list(next(iter(distances.values())))
    rows = [["in float64", *names]]
    for pair, by_output in distances.items():
        rows.append([" - ".join(pair), *(f"{by_output[name]:.1e}" for name in names)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join(lines)
