"""Triangulation: a third implementation is asked, and of port, reference and witness the odd one out is named.

The witness gets the reference's weights and inputs, and computes in float64 in a process of its
own: in this environment, or, where it is not installed or a release is asked for, in an isolated
one (`witness_script.py`).
"""

from __future__ import annotations

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
from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from siglip_port.model import SigLipVisionModel
from siglip_port.parity import bounds, hints
from siglip_port.parity.metrics import relative_error
from siglip_port.parity.observe import ReferenceRun
from siglip_port.parity.sides import Side, cast
from siglip_port.parity.siglip import cases as proof
from siglip_port.parity.siglip import reference as references

SCRIPT = Path(__file__).with_name("second_reference_script.py")
DISTRIBUTIONS = {"timm": "timm", "open_clip": "open_clip_torch", "transformers": "transformers"}
TIMEOUT = 600.0
"""Seconds, for installation and computation together."""

Distances = Mapping[tuple[str, str], Mapping[str, float]]
"""How far apart each two of the three are, by output."""


def ask(name: str, case: proof.Case, port: SigLipVisionModel) -> str:
    """Asks a third implementation, and says who is the odd one out.

    Args:
        name: of the witness, as `parse` knows it.
        case: the checkpoint, with its reference.
        port: loaded from it.

    Returns:
        A table of how far apart each two are in float64, and a sentence.

    Raises:
        ValueError: there is no such witness.
        RuntimeError: it could not be installed, or could not be run.
    """
    package, release = parse(name)
    command = _command(package, release)
    truth = case.reference_run(case.dtypes[0])
    with tempfile.TemporaryDirectory(prefix="siglip_port-") as scratch:
        folder = Path(scratch)
        _write(folder, case, truth)
        _run(name, [*command, package, scratch], folder / "log.txt")
        about = json.loads((folder / "witness.json").read_text(encoding="utf-8"))
        with safe_open(
            folder / "outputs.safetensors", "pt", device=str(case.inputs.device)
        ) as file:
            return _judge(package, about, file.get_tensor, case, port)


def parse(name: str) -> tuple[str, str]:
    """Takes the name of a witness apart: `timm`, `timm==1.0.31`, ...

    -> package, and release or nothing.

    Raises:
        ValueError: there is no such witness.
    """
    match = re.fullmatch(rf"({'|'.join(DISTRIBUTIONS)})(?:==(\d[\w.]*))?", name)
    if match is None or name == "transformers":
        raise ValueError(
            f"there is no witness {name!r}; known are timm and open_clip, both also with a version "
            "(timm==1.0.31), and "
            "other releases of the reference (transformers==4.57.6)"
        )
    return match[1], match[2] or ""


def _command(package: str, release: str) -> list[str]:
    """How the script is run.

    Without -P or -I, what lies beside it (`html.py`) would stand in for Python's own.
    """
    if not release and importlib.util.find_spec(package) is not None:
        return [sys.executable, "-P", str(SCRIPT)]
    requirement = DISTRIBUTIONS[package] + (f"=={release}" if release else "")
    uv = shutil.which("uv")
    if uv is None:
        raise RuntimeError(
            f"to ask {requirement}, uv is needed, which would install it in an environment of its "
            "own, and there is no "
            "uv here: install it, or ask a witness that is installed"
        )
    packages = (requirement, f"torch=={torch.__version__.split('+')[0]}", "safetensors", "numpy")
    options = [
        "--no-project",
        "--isolated",
        f"--python={sys.executable}",
        *(f"--with={p}" for p in packages),
    ]
    return [uv, "run", *options, "python", "-I", str(SCRIPT)]


def _write(folder: Path, case: proof.Case, truth: ReferenceRun) -> None:
    """Writes what the witness is given."""
    model = case.reference.model
    with cast(model, truth.dtype):
        weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    save_file(
        {"pixel_values": case.inputs.to(truth.dtype).cpu().contiguous()},
        folder / "inputs.safetensors",
    )
    for name, content in (
        ("config.json", model.config.to_dict()),
        ("points.json", list(truth.exact.taps)),
    ):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")


def _run(name: str, command: list[str], log: Path) -> None:
    """Runs the script to its end, which is no later than ours."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    null = subprocess.DEVNULL
    with log.open("wb") as errors:
        process = subprocess.Popen(
            command, stdin=null, stdout=null, stderr=errors, env=environment, start_new_session=True
        )
    try:
        how = f"ended with exit status {process.wait(TIMEOUT)}"
    except subprocess.TimeoutExpired:
        how = f"was not done after {TIMEOUT:g} s"
    finally:
        if process.poll() is None:  # uv would leave behind what it started
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode != 0:
        last = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-6:])
        raise RuntimeError(
            f"{name} could not be asked: `{' '.join(command)}` {how}. Its last lines:\n{last}\n"
            "If it could not be installed, see whether there is such a release and whether the "
            "package index can be "
            "reached; if it failed, ask another release of it, or another witness"
        )


def _judge(
    package: str,
    about: Mapping[str, Any],
    read: Callable[[str], Tensor],
    case: proof.Case,
    port: SigLipVisionModel,
) -> str:
    """Compares what the script left, which `read` reads, with what the other two compute."""
    truth, witness = case.reference_run(case.dtypes[0]), about["label"]
    exact = truth.exact.outputs
    with cast(port, truth.dtype, torch.float64):
        ours = Side(port, proof.port_outputs).run(truth.exact_inputs)
    theirs = {name: read(f"output.{name}") for name in exact}
    sides = {f"reference (transformers {references.VERSION})": exact, "port": ours, witness: theirs}
    distances = {
        (a, b): {name: _distance(sides[b].get(name), sides[a].get(name)) for name in exact}
        for a, b in combinations(sides, 2)
    }
    lines = f"{_table(distances)}\n{verdict(distances, witness, is_float64=about['is_float64'])}"
    if all(_distance(theirs[name], exact[name]) <= bounds.FLOAT64_BOUND for name in exact):
        return lines
    return f"{lines}; {_first_difference(package, about['places'], read, case)}"


def _first_difference(
    package: str, places: Mapping[str, str], read: Callable[[str], Tensor], case: proof.Case
) -> str:
    """Where the witness parts ways with the reference, and what that looks like."""
    truth = case.reference_run(case.dtypes[0])
    for point in (point for point in truth.exact.taps if point in places):
        value = read(f"tap.{point}")
        if _distance(value, truth.exact.taps[point]) > bounds.FLOAT64_BOUND:
            hint = hints.explain_tap(truth, point, value)
            return (
                f"first at {point} ({package}: {places[point]}){hint and f': looks like: {hint}'}"
            )
    return f"at none of its {len(places)} modules that have a counterpart"


def _distance(value: Tensor | None, truth: Tensor | None) -> float:
    """The relative error.

    Infinite where it is no number, for want of a tensor or of its shape too.
    """
    if value is None or truth is None or value.shape != truth.shape:
        return math.inf
    distance = relative_error(value, truth)
    return distance if math.isfinite(distance) else math.inf


def verdict(distances: Distances, witness: str, *, is_float64: bool = True) -> str:
    """Says who is the odd one out: the one that is far from both others while these agree.

    Args:
        distances: of all three pairs.
        witness: which of the three is the witness.
        is_float64: whether it computed in float64 throughout; else float32 rounding is no
            difference of its.
    """
    apart = {pair: max(figures.values()) for pair, figures in distances.items()}
    coarse = [pair for pair in apart if witness in pair and not is_float64]
    agreeing = [
        pair
        for pair in apart
        if apart[pair] <= (bounds.UPCAST_BOUND if pair in coarse else bounds.FLOAT64_BOUND)
    ]
    note = (
        f" ({witness} has a float32 softmax whatever the dtype, so it can tell nothing finer)"
        if coarse
        else ""
    )
    if len(agreeing) == 3 and coarse:
        return f"all three agree, {witness} to {max(apart[pair] for pair in coarse):.1e} only{note}"
    if len(agreeing) == 3:
        return f"all three agree: at most {max(apart.values()):.1e} apart"
    if len(agreeing) == 2:
        (far,) = apart.keys() - agreeing
        return f"nobody is the odd one out: {far[0]} and {far[1]} differ, and the third agrees with both{note}"
    if not agreeing:
        return f"all three differ{note}"
    (odd,) = {side for pair in apart for side in pair} - set(agreeing[0])
    both = [figures for pair, figures in distances.items() if odd in pair]
    far_off = ", ".join(f"{name} {min(figures[name] for figures in both):.1e}" for name in both[0])
    return f"{odd if odd == witness else f'the {odd}'} is the odd one out: {far_off} from both others{note}"


def _table(distances: Distances) -> str:
    names = list(next(iter(distances.values())))
    rows = [["in float64", *names]]
    rows += [
        [" - ".join(pair), *(f"{figures[name]:.1e}" for name in names)]
        for pair, figures in distances.items()
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
