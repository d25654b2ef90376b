"""`verify --save` and `verify --against`, and the port in NumPy of docs/golden.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from siglip_port import SigLipVisionModel
from siglip_port.cli.verify import main
from siglip_port.parity.siglip.reference import write_random_checkpoint
from tests.helpers.checkpoints import SMALL

PAGE = Path(__file__).parents[2] / "docs" / "golden.md"
pytestmark = pytest.mark.usefixtures("shared_references")
MODULE = "siglip_port.parity.siglip.foreign_ports"


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder, with a folder `golden` in it."""
    folder = tmp_path_factory.mktemp("golden")
    write_random_checkpoint(folder / "checkpoint", SMALL)
    arguments = ["--checkpoint", str(folder / "checkpoint"), "--save", str(folder / "golden")]
    assert main(arguments) == 0
    return folder


def numpy_port() -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return str(code)


def run_numpy_port(code: str) -> None:
    exec(compile(code, str(PAGE), "exec"), {"__name__": "numpy_port"})


def test_numpy_port_is_equal(
    golden: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(golden)
    run_numpy_port(numpy_port())
    assert main(["--against", "golden"]) == 0
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert verdict == "EQUAL (4 of 4 golden cases): passed rounding float32 (41)"
    assert verdict in PAGE.read_text()


def test_wrong_numpy_port_is_different(
    golden: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(golden)
    run_numpy_port(numpy_port().replace("np.float32(eps)", "np.float32(1e-5)"))
    assert main(["--against", "golden", "--json", "report.json"]) == 1
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert "rounding float32: encoder.layers.0: error in float32" in verdict
    assert json.loads(Path("report.json").read_text())["equal"] is False


def test_golden_needs_no_transformers(
    golden: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("siglip_port.extras.importlib.util.find_spec", lambda name: None)
    monkeypatch.chdir(golden)
    run_numpy_port(numpy_port())
    assert main(["--against", "golden"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "photos"], "not a golden folder"),
        (["--against", "nowhere", "--checkpoint", "checkpoint"], "--against must be a golden"),
        (["--against", "no.onnx", "--checkpoint", "checkpoint"], "--against no.onnx: no such file"),
        (["--against", "no.onnx", "--checkpoint", "missing"], "--against no.onnx: no such file"),
        (["--against", "math:sin", "--weights", "random"], "needs the weights of the checkpoint"),
        (["--against", "golden", "--save", "other"], "--save and --against exclude each other"),
        (["--save", "photos", "--checkpoint", "checkpoint"], "expected an empty folder"),
    ],
)
def test_wrong_arguments(
    golden: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(golden)
    (golden / "photos").mkdir(exist_ok=True)
    (golden / "photos" / "a.jpg").touch()
    if "random" in arguments:
        arguments = [*arguments, "--checkpoint", "checkpoint"]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("scale", [1.0, 1.001])
def test_function(golden: Path, monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    model = SigLipVisionModel.from_hf(golden / "checkpoint").requires_grad_(False)
    monkeypatch.setattr(
        f"{MODULE}.encode", lambda pixels: model.embed(pixels) * scale, raising=False
    )
    arguments = ["--checkpoint", str(golden / "checkpoint"), "--against", f"{MODULE}:encode"]
    assert main(arguments) == (0 if scale == 1.0 else 1)
