"""A golden folder of a toy model: written, read, and judged."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from siglip_port.parity.golden import (
    PORT_FILE,
    Expected,
    GoldenCase,
    GoldenError,
    judge_folder,
    read_folder,
    write_folder,
)
from siglip_port.parity.observe import run_reference
from siglip_port.parity.results import Comparison
from siglip_port.parity.sides import Side, dtype_name
from tests.parity.toy_models import ToyEncoder, toy_images

POINTS = ["conv", "norm"]
LOW_DTYPES = (torch.float32, torch.bfloat16)


def golden_case(name: str, checkpoint: Path, dtypes: tuple[torch.dtype, ...]) -> GoldenCase:
    expected = {}
    for dtype in dtypes:
        run = run_reference(Side(ToyEncoder()), toy_images(), POINTS, dtype)
        expected[dtype_name(dtype)] = Expected.of(run)
    return GoldenCase(name, "random", checkpoint, {"pixel_values": toy_images()}, expected)


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    save_file(ToyEncoder().state_dict(), checkpoint / "model.safetensors")
    folder = tmp_path / "golden"
    cases = [golden_case("a", checkpoint, LOW_DTYPES), golden_case("b", checkpoint, LOW_DTYPES[:1])]
    assert write_folder(folder, cases, {"date": "today"}) == ["a", "b"]
    return folder


def results(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Run the toy model as a port that writes one tap and the output."""
    model = ToyEncoder().to(dtype)
    with torch.no_grad():
        tap = model.conv(toy_images().to(dtype))
        return {"conv": tap, "output": model(toy_images().to(dtype))}


def run_port(
    folder: Path, change: Callable[[dict[str, Tensor]], object], dtype: torch.dtype = torch.float32
) -> None:
    for name in ("a", "b"):
        tensors = results(dtype)
        change(tensors)
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(tensors, folder / name / PORT_FILE)


def judge(folder: Path, dtype: torch.dtype | None = None) -> Comparison:
    return judge_folder(read_folder(folder), dtype)


def nothing(tensors: dict[str, Tensor]) -> None:
    pass


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_right_port_is_equal(golden: Path, dtype: torch.dtype) -> None:
    run_port(golden, nothing, dtype)
    comparison = judge(golden)
    assert comparison.equal, comparison
    gate = "numerics" if dtype == torch.float64 else f"rounding {dtype_name(dtype)}"
    count = 1 if dtype == torch.bfloat16 else 2
    assert [result.name for _, result in comparison.gates] == [gate] * count
    assert comparison.label == f"{count} of 2 golden cases"


def test_stated_dtype_decides_the_bound(golden: Path) -> None:
    def round_outputs(tensors: dict[str, Tensor]) -> None:
        for name, tensor in results(torch.bfloat16).items():
            tensors[name] = tensor.float()

    run_port(golden, round_outputs)
    assert not judge(golden).equal
    assert judge(golden, torch.bfloat16).equal


def scale_tap(tensors: dict[str, Tensor]) -> None:
    tensors["conv"] *= 1.001
    tensors["output"] *= 1.001


def drop_output(tensors: dict[str, Tensor]) -> None:
    del tensors["output"]


def rename_tap(tensors: dict[str, Tensor]) -> None:
    tensors["convolution"] = tensors.pop("conv")


def cut_output(tensors: dict[str, Tensor]) -> None:
    tensors["output"] = tensors["output"][:1]


def fill_with_nan(tensors: dict[str, Tensor]) -> None:
    tensors["output"][0, 0, 0] = torch.nan


@pytest.mark.parametrize(
    ("change", "place", "message"),
    [
        (scale_tap, "conv", "error in float32"),
        (drop_output, "output", "does not return this output"),
        (rename_tap, "convolution", "no output or tap"),
        (cut_output, "output", "expected [3, 4, 8]"),
        (fill_with_nan, "output", "error in float32"),
    ],
)
def test_wrong_port_is_different(
    golden: Path, change: Callable[[dict[str, Tensor]], object], place: str, message: str
) -> None:
    run_port(golden, change)
    comparison = judge(golden)
    assert not comparison.equal
    finding = comparison.findings[0][2]
    assert place in (finding.reference, finding.port)
    assert message in finding.message


def test_missing_case_is_different(golden: Path) -> None:
    run_port(golden, nothing)
    (golden / "b" / PORT_FILE).unlink()
    assert "b/port.safetensors: missing" in str(judge(golden))


def test_port_that_did_not_run(golden: Path) -> None:
    with pytest.raises(GoldenError, match=r"no case has a port\.safetensors"):
        judge(golden)


def test_dtype_without_results(golden: Path) -> None:
    run_port(golden, nothing, torch.float16)
    with pytest.raises(GoldenError, match="results are in float16"):
        judge(golden)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("golden.json", None, "not a golden folder"),
        ("golden.json", "[", "cannot be read"),
        ("golden.json", "{}", "expected an object with cases"),
        ("golden.json", '{"schema": 9, "cases": []}', "has schema 9, expected 1"),
        ("golden.json", '{"schema": 1, "cases": [{"name": "a"}]}', "damaged"),
        ("a/expected-float32.safetensors", "x", "not a readable safetensors file"),
        ("a/inputs.safetensors", None, "missing"),
        (f"a/{PORT_FILE}", "x", "not a readable safetensors file"),
    ],
)
def test_damaged_folder(golden: Path, file: str, content: str | None, message: str) -> None:
    run_port(golden, nothing)
    if content is None:
        (golden / file).unlink()
    else:
        (golden / file).write_text(content)
    with pytest.raises(GoldenError, match=message):
        judge(golden)


def test_folder_is_replaced_as_a_whole(golden: Path, tmp_path: Path) -> None:
    run_port(golden, nothing)
    write_folder(golden, [golden_case("c", tmp_path / "checkpoint", LOW_DTYPES)], {})
    assert sorted(path.name for path in golden.iterdir()) == ["c", "golden.json"]
    (tmp_path / "folder").mkdir()
    assert golden.stat().st_mode == (tmp_path / "folder").stat().st_mode  # others may read it


def test_failure_keeps_the_old_folder(golden: Path, tmp_path: Path) -> None:
    def fail() -> Iterator[GoldenCase]:
        yield golden_case("c", tmp_path / "checkpoint", LOW_DTYPES)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_folder(golden, fail(), {})
    assert [case.name for case in read_folder(golden).cases] == ["a", "b"]


def test_other_files_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(OSError, match="expected an empty folder or a golden folder"):
        write_folder(tmp_path, [], {})
    with pytest.raises(OSError, match=r"golden: cannot be created in .*photo\.jpg; choose another"):
        write_folder(tmp_path / "photo.jpg" / "sub" / "golden", [], {})
    with pytest.raises(OSError, match="expected a folder, found a file"):
        write_folder(tmp_path / "photo.jpg", [], {})


def test_index_states_bounds(golden: Path) -> None:
    index = json.loads((golden / "golden.json").read_text())
    assert index["bounds"]["rounding"]["factor"] == 3
    (point, *_) = index["cases"][0]["expected"]["bfloat16"]["points"]
    assert point["name"] == "conv"
    assert point["kind"] == "tap"
    assert point["bound"] == pytest.approx(3 * point["reference_error"])
