"""The format of a golden folder.

`golden.json` lists the cases; each case has a folder with its checkpoint, its inputs, and the
results that are expected of a port.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from siglip_port import atomic
from siglip_port.parity import bounds
from siglip_port.parity.metrics import RelativeError
from siglip_port.parity.observe import ReferenceRun
from siglip_port.parity.sides import Inputs, dtype_name

SCHEMA = 1
"""Version of the format; folders of other versions are refused."""

INDEX = "golden.json"
INPUTS_FILE = "inputs.safetensors"
PORT_FILE = "port.safetensors"
"""File that a port writes into the folder of each case."""

CHECKPOINT_FILES = ("config.json", "model.safetensors")


class GoldenError(Exception):
    """A golden folder cannot be read; the message says what is wrong with which file."""


@dataclass(frozen=True)
class Expected:
    """Results that are expected of a port in one dtype.

    Attributes:
        tensors: Exact values by name: taps in order of computation, then outputs. float64.
        outputs: Names of the outputs; all others are taps.
        noise: Rounding error of the reference in this dtype, by name.
    """

    tensors: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    noise: Mapping[str, RelativeError]

    @classmethod
    def of(cls, run: ReferenceRun) -> Expected:
        """Return the results of a run of the reference."""
        tensors = {**run.exact.taps, **run.exact.outputs}
        return cls(tensors, tuple(run.exact.outputs), run.noise)

    def only(self, names: Collection[str]) -> Expected:
        """Return the results of these names."""
        tensors = {name: tensor for name, tensor in self.tensors.items() if name in names}
        return replace(
            self,
            tensors=tensors,
            outputs=tuple(name for name in self.outputs if name in names),
        )


@dataclass(frozen=True)
class GoldenCase:
    """One model with inputs and expected results.

    Attributes:
        name: Name of the case, and of its folder.
        weights: Kind of weights, such as `N1, seed 1234`.
        checkpoint: Folder with `config.json` and `model.safetensors`.
        inputs: Inputs by name.
        expected: Results by the name of the dtype.
    """

    name: str
    weights: str
    checkpoint: Path
    inputs: Mapping[str, Tensor]
    expected: Mapping[str, Expected]


@dataclass(frozen=True)
class GoldenFolder:
    """A golden folder that was read.

    Attributes:
        path: The folder.
        origin: Versions, machine, date and command that made it.
        cases: The cases.
    """

    path: Path
    origin: Mapping[str, Any]
    cases: tuple[GoldenCase, ...]


# --- writing --------------------------------------------------------------------------------------


def named_inputs(inputs: Inputs) -> dict[str, Tensor]:
    """Return inputs by name; a tensor alone is `pixel_values`."""
    if isinstance(inputs, Tensor):
        inputs = {"pixel_values": inputs}
    assert isinstance(inputs, Mapping)
    return {name: value for name, value in inputs.items() if isinstance(value, Tensor)}


def write_folder(folder: Path, cases: Iterable[GoldenCase], origin: Mapping[str, Any]) -> list[str]:
    """Write a golden folder; cases are written as they come, and all of them or none is kept.

    Args:
        folder: Output folder, created if missing. It must be empty or a golden folder, which is
            replaced, together with the results of a port in it.
        cases: Cases to write.
        origin: Versions, machine, date and command.

    Returns:
        Names of the cases.

    Raises:
        OSError: The folder is neither empty nor a golden folder, or cannot be written.
    """
    check_replaceable(folder)
    entries = []
    with atomic.staging_dir(folder.parent) as staging:
        for case in cases:
            entries.append(write_case(staging / case.name, case))
        index = {
            "schema": SCHEMA,
            "origin": dict(origin),
            "bounds": describe_bounds(),
            "cases": entries,
        }
        (staging / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        for path in (*staging.glob("*/"), staging / INDEX):  # the index last: it makes it whole
            path.rename(folder / path.name)
    return [entry["name"] for entry in entries]


def check_replaceable(folder: Path) -> None:
    """Raise OSError unless a golden folder may be written here."""
    if not folder.exists():
        parent = next(path for path in folder.absolute().parents if path.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise OSError(f"{folder}: cannot be created in {parent}; choose another path")
        return
    if not folder.is_dir():
        raise OSError(f"{folder}: expected a folder, found a file; choose another path")
    if any(folder.iterdir()) and not (folder / INDEX).is_file():
        raise OSError(
            f"{folder}: expected an empty folder or a golden folder, found other files; choose "
            "another path"
        )


def write_case(folder: Path, case: GoldenCase) -> dict[str, Any]:
    """Write the files of a case; return its entry in the index."""
    folder.mkdir(parents=True)
    for name in CHECKPOINT_FILES:
        shutil.copyfile(case.checkpoint / name, folder / name)
    (folder / INPUTS_FILE).write_bytes(save(contiguous(case.inputs)))
    results = {}
    for dtype, expected in case.expected.items():
        file = expected_file(dtype)
        (folder / file).write_bytes(save(contiguous(expected.tensors)))
        results[dtype] = {"file": file, "points": describe_points(expected)}
    return {
        "name": case.name,
        "weights": case.weights,
        "inputs": {name: describe_tensor(tensor) for name, tensor in case.inputs.items()},
        "expected": results,
    }


def expected_file(dtype: str) -> str:
    """Return the name of the file of expected results in a dtype."""
    return f"expected-{dtype}.safetensors"


def contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to memory of their own on the CPU, as safetensors needs."""
    copies = {}
    for name, tensor in tensors.items():
        copies[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return copies


def describe_tensor(tensor: Tensor) -> dict[str, Any]:
    """Return shape and dtype."""
    return {"dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape)}


def describe_points(expected: Expected) -> list[dict[str, Any]]:
    """Describe the expected tensors in order, with the bounds of a port's error."""
    points = []
    for name, tensor in expected.tensors.items():
        noise = expected.noise[name]
        points.append(
            {
                "name": name,
                "kind": "output" if name in expected.outputs else "tap",
                "shape": list(tensor.shape),
                "reference_error": noise.overall,
                "reference_worst_vector": noise.worst,
                "bound": bounds.ROUNDING_FACTOR * noise.overall,
                "bound_worst_vector": bounds.WORST_FACTOR * noise.worst,
            }
        )
    return points


def describe_bounds() -> dict[str, Any]:
    """Return the bounds and their origin."""
    return {
        "float64": {"bound": bounds.FLOAT64_BOUND, "origin": bounds.FLOAT64_ORIGIN},
        "rounding": {
            "factor": bounds.ROUNDING_FACTOR,
            "worst_vector_factor": bounds.WORST_FACTOR,
            "origin": bounds.ROUNDING_ORIGIN,
        },
    }


# --- reading --------------------------------------------------------------------------------------


def read_folder(path: Path) -> GoldenFolder:
    """Read a golden folder.

    Raises:
        GoldenError: A file is missing or damaged, or of another version of the format.
    """
    index = read_index(path / INDEX)
    cases = []
    for entry in index["cases"]:
        try:
            cases.append(read_case(path / entry["name"], entry))
        except (KeyError, TypeError) as error:
            raise GoldenError(f"{path / INDEX}: damaged ({error!r}); write it again") from error
    return GoldenFolder(path, index.get("origin", {}), tuple(cases))


def read_index(path: Path) -> dict[str, Any]:
    """Read `golden.json`."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise GoldenError(
            f"{path.parent}: not a golden folder ({path.name} is missing); write one with "
            "siglip-port verify --save"
        ) from error
    except (OSError, ValueError) as error:
        raise GoldenError(f"{path}: cannot be read ({error}); write it again") from error
    if not isinstance(index, dict) or not isinstance(index.get("cases"), list):
        raise GoldenError(f"{path}: expected an object with cases, found other JSON")
    if index.get("schema") != SCHEMA:
        raise GoldenError(
            f"{path}: has schema {index.get('schema')!r}, expected {SCHEMA}; write it again"
        )
    return index


def read_case(folder: Path, entry: Mapping[str, Any]) -> GoldenCase:
    """Read the files of a case."""
    expected = {}
    for dtype, result in entry["expected"].items():
        tensors = read_tensors(folder / result["file"])
        points = result["points"]
        noise = {}
        for point in points:
            noise[point["name"]] = RelativeError(
                float(point["reference_error"]), float(point["reference_worst_vector"])
            )
        missing = sorted(noise.keys() - tensors.keys())
        if missing:
            raise GoldenError(f"{folder / result['file']}: {missing[0]} is missing; write it again")
        outputs = tuple(point["name"] for point in points if point["kind"] == "output")
        expected[dtype] = Expected({name: tensors[name] for name in noise}, outputs, noise)
    inputs = read_tensors(folder / INPUTS_FILE)
    return GoldenCase(entry["name"], entry["weights"], folder, inputs, expected)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        GoldenError: The file is missing or damaged.
    """
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise GoldenError(f"{path}: missing") from error
    except (OSError, SafetensorError) as error:
        raise GoldenError(f"{path}: not a readable safetensors file ({error})") from error
