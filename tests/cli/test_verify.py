"""End-to-end tests of the command `verify`: output, reports and exit codes."""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from huggingface_hub import constants
from PIL import Image
from torch import Tensor

import compare_origin
from siglip_port import SigLipVisionConfig, SigLipVisionModel
from siglip_port import model as port
from siglip_port.cli import verify
from siglip_port.parity.siglip import (
    cases,
    census,
    reference,
    second_reference,
    second_reference_script,
    verification,
    verify_options,
)
from siglip_port.parity.siglip.reference_process import ReferenceProcess
from siglip_port.parity.siglip.verify_options import (
    DTYPES,
    SAMPLE_IMAGE,
    VerifyOptions,
    read_image,
)
from tests.helpers.checkpoints import SMALL, MakeCheckpoint, edit_config, edit_tensors
from tests.helpers.hub_server import Fault, Hub, Repository
from tests.helpers.network import silent_port

ROOT = Path(compare_origin.__file__).parent
SCRIPT = ROOT / "compare_origin.py"
KNOWN_LINES = [
    "siglip_custom.shape: ",
    "siglip_custom-afterPooling.shape: ",
    "siglip_original.shape: ",
    "siglip_original-afterPooling.shape: ",
    "cosine_similarity.mean(): ",
    "cosine_similarity.min(): ",
    "cosine_similarity after pooling.mean(): ",
    "cosine_similarity after pooling.min(): ",
]
GATES = [
    "pixels",
    "environment",
    "config",
    "weights",
    "sensitivity",
    "numerics",
    "gradients",
    "calls",
    "interface",
]
ON_SMALL_MODELS = ("gradients", "calls")
LOW_ROUNDINGS = ["rounding bfloat16", "rounding float16"]


pytestmark = pytest.mark.usefixtures("shared_references")


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shrink the small models of a comparison, for a quarter of the time."""
    monkeypatch.setattr(cases, "ODD", replace(SMALL, image_size=28, num_encoder_blocks=2))
    monkeypatch.setattr(cases, "MINI", replace(SMALL, image_size=24, num_encoder_blocks=2))
    # tests/parity/siglip runs them
    monkeypatch.setattr(cases, "regime_models", lambda *_: [])
    monkeypatch.setattr(verification, "check_entrance_models", lambda _: [])


def call(*arguments: str | Path) -> int:
    """Run the command in this process, without another import of transformers."""
    return compare_origin.main([str(argument) for argument in arguments])


def run_python(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a new process."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


# --- the default command --------------------------------------------------------------------------


def check_default_command(stdout: str, stderr: str, report: Path, shape: tuple[int, ...]) -> None:
    """Assert that random weights were compared on all checkpoints and are equal."""
    assert re.fullmatch(
        r"google/siglip-base-patch16-224 is not in the local cache, and the Hub cannot be reached "
        r"\(no connection to 127.0.0.1 \(.*\)\); comparing random weights of the same "
        r"architecture instead\n",
        stderr,
    )
    lines = stdout.splitlines()
    beginnings = [line[: len(known)] for line, known in zip(lines, KNOWN_LINES, strict=False)]
    assert beginnings == KNOWN_LINES
    assert lines[0].endswith(f"torch.Size({list(shape)})")
    assert lines[3].endswith(f"torch.Size({[shape[0], shape[2]]})")
    assert float(lines[4].split(": ")[1]) == pytest.approx(1)
    table = [re.split(r" +\| +", line) for line in lines if " | " in line][1:]
    names = [row[0] for row in table]
    assert sorted(names) == sorted([*GATES, "rounding float32", *LOW_ROUNDINGS])
    assert {row[-1] for row in table} == {"passed"}
    assert lines[-1].startswith("EQUAL (random weights): passed pixels (282), environment (")
    content = json.loads(report.read_text())
    assert content["equal"] is True
    assert content["weights"] == "random weights"
    assert content["environment"]["transformers"] == reference.VERSION
    names = [(section["name"], section["weights"]) for section in content["sections"]]
    assert names[:8] == [  # the input regimes follow
        ("checkpoint", "random weights, N1"),
        ("preprocessing", "no weights"),
        ("NaFlex preprocessing", "no weights"),
        ("odd encoder", "N1, seed 1234"),
        ("small so400m", "N1, seed 1234"),
        ("odd encoder", "L7, seed 1234"),
        ("odd encoder", "S1, seed 1234"),
        ("odd encoder", "L8, seed 1234"),
    ]
    gates = [gate["name"] for gate in content["sections"][0]["gates"]]
    assert gates == [*(gate for gate in GATES if gate not in ON_SMALL_MODELS), "rounding float32"]
    for section in content["sections"]:
        for gate in section["gates"]:
            assert gate["passed"]
            assert not gate["uncompared_taps"]
            assert not gate["float32_upcasts"]


def test_default_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a network, on a small architecture."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    silent = template.replace(constants.ENDPOINT, f"http://127.0.0.1:{silent_port()}")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", silent)
    monkeypatch.setattr(verification, "DEFAULT_CONFIG", SMALL)
    assert call("--json", tmp_path / "out.json") == 0
    out, err = capsys.readouterr()
    check_default_command(out, err, tmp_path / "out.json", (2, 4, 24))
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


@pytest.mark.slow
def test_default_command_full_size(tmp_path: Path) -> None:
    """The command of the README."""
    result = run_python(
        SCRIPT,
        "--json",
        tmp_path / "out.json",
        HF_ENDPOINT=f"http://127.0.0.1:{silent_port()}",
        HF_HOME=str(tmp_path),
    )
    assert result.returncode == 0, result.stderr
    check_default_command(result.stdout, result.stderr, tmp_path / "out.json", (2, 196, 768))
    weights = re.search(r", weights \((\d+)\), ", result.stdout.splitlines()[-1])
    assert weights is not None
    assert int(weights[1]) > 208  # tensors of the full-size model
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".json"] == ["out.json"]


# --- as a program ---------------------------------------------------------------------------------


@pytest.fixture
def source_tree(tmp_path: Path) -> Path:
    """A copy of the package and the script, with another version number."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "siglip_port", tree / "siglip_port")
    shutil.copy(SCRIPT, tree)
    init = tree / "siglip_port" / "__init__.py"
    init.write_text(re.sub('__version__ = ".*"', '__version__ = "9.8.7"', init.read_text()))
    return tree


@pytest.fixture
def other_packages(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH: all installed packages except siglip_port."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for path in Path(torch.__file__).parents[1].iterdir():
        if not path.name.startswith(("siglip_port", "__pycache__")):
            (folder / path.name).symlink_to(path)
    return folder


def test_source_tree_without_installation(
    source_tree: Path, other_packages: Path, checkpoint: MakeCheckpoint
) -> None:
    """With -S, packages are found on PYTHONPATH only."""
    result = run_python(
        "-S",
        source_tree / "compare_origin.py",
        "--checkpoint",
        checkpoint(),
        PYTHONPATH=str(other_packages),
    )
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[-2].startswith("siglip_port 9.8.7, torch ")
    assert lines[-1].startswith("EQUAL (checkpoint weights): ")


def test_source_tree_beside_installed_package(source_tree: Path) -> None:
    """The script imports the package next to it."""
    census_file = source_tree / "siglip_port" / "parity" / "siglip" / census.SUMMARY.name
    summary = json.loads(census_file.read_text())
    census_file.write_text(json.dumps({**summary, "machine": "another machine"}))
    result = run_python(source_tree / "compare_origin.py", "--list-gates", PYTHONPATH=str(ROOT))
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.endswith(" on another machine)\n")


def run_script(*arguments: str | Path) -> int:
    """Run the script in this process; return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(SCRIPT), run_name="__main__")
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def test_script_exit_codes(
    checkpoint: MakeCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """0 for an intact port, 1 for a wrong activation."""
    folder = checkpoint()
    assert run_script("--checkpoint", folder) == 0
    capsys.readouterr()
    monkeypatch.setitem(port.ACTIVATIONS, "gelu_pytorch_tanh", F.gelu)
    assert run_script("--checkpoint", folder, "--json", tmp_path / "out.json") == 1
    assert re.match(
        r"DIFFERENT \(checkpoint weights\): numerics: encoder\.layers\.\{0\.\.\.\d+\}\.mlp\."
        r"fc2:input \(port: .*\): differs in float64, bound 1e-10, relative error .*; looks like: "
        r"exact \(erf\) GELU instead of tanh GELU; in all checkpoints",
        capsys.readouterr().out.splitlines()[-1],
    )
    assert json.loads((tmp_path / "out.json").read_text())["equal"] is False


def test_script_without_torch() -> None:
    """The script runs in a Python without the dependencies."""
    code = (
        "import sys; sys.modules['torch'] = None; import compare_origin;"
        "sys.exit(compare_origin.main([]))"
    )
    result = run_python("-c", code, PYTHONPATH=str(ROOT))
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(
        r"could not compare: ModuleNotFoundError: .* torch .*; run: "
        r"uv run compare_origin.py\n",
        result.stderr,
    )


def test_script_reports_wrong_argument(tmp_path: Path) -> None:
    """The error is one line on stderr; stdout is empty."""
    result = run_python(SCRIPT, "--image", tmp_path / "absent.png", HF_HUB_OFFLINE="1")
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(
        r"could not compare: --image .*: .*No such file.*; pass a local JPEG or PNG .*\n",
        result.stderr,
    )


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (
            ["--checkpoint", "no/such/folder"],
            "could not compare: 'no/such/folder' is neither a local path nor a Hub id",
        ),
        (
            ["--checkpoint", "docs/images"],
            r"could not compare: .* contains neither model.safetensors nor .*; found: league.svg",
        ),
        (
            ["--image", "README.md"],
            r"could not compare: --image .*README.md: cannot be read as an image",
        ),
        (
            ["--device", "cuda"],
            r"could not compare: --device cuda: not available on this machine \(.*\); use cpu",
        ),
        (
            ["--device", "abacus"],
            r"could not compare: --device abacus: not available on this machine \(.*\); use cpu",
        ),
        (
            ["--json", "no/such/folder/out.json"],
            "could not compare: --json .*: the folder is missing or not writable; choose",
        ),
        (
            ["--json", "tests"],
            r"could not compare: --json .*tests: not a regular file; choose another path",
        ),
        (
            ["--report", "README.md"],
            r"could not compare: --report .*: the folder is missing or not writable; choose",
        ),
        (
            ["--baseline", "pyproject.toml"],
            r"could not compare: --baseline pyproject.toml: cannot be read \(.*\); pass a file",
        ),
        (
            ["--baseline", "absent"],
            r"could not compare: --baseline absent: cannot be read \(.*No such file",
        ),
        (
            ["--second-ref", "clip"],
            r"could not compare: --second-ref must be timm or open_clip, .*, got 'clip'",
        ),
        (
            ["--json", "/dev/null"],
            r"could not compare: --json /dev/null: not a regular file; choose another path",
        ),
    ],
)
def test_wrong_arguments(
    args: list[str], sentence: str, capsys: pytest.CaptureFixture[str], hub: Hub
) -> None:
    if "cuda" in args and torch.cuda.is_available():
        pytest.skip("CUDA is available")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert call(*args) == 2
    out, err = capsys.readouterr()
    assert re.match(sentence, err)
    assert not out


@pytest.mark.parametrize(
    "args",
    [
        ["--dtype", "int8"],
        ["--weights", "mine"],
        ["--attn", "flash"],
        ["surplus"],
        ["--check", "x"],
        ["--json", ""],
        ["--report", ""],
        ["--selftest", "--calibrate"],
    ],
)
def test_unknown_options(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        call(*args)
    assert exit_.value.code == 2
    assert "usage: compare_origin.py" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        call("--help")
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    exit_codes = out[out.index("exit codes:") :].split("\n")[1:-1]
    assert [line.split()[0] for line in exit_codes] == ["0", "1", "2", "3", "130"]
    assert len(out.splitlines()) <= 60
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("arguments", [["--help"], ["--attn", "flash"]])
@pytest.mark.parametrize(
    "command", ["from siglip_port.cli import main", "from compare_origin import main"]
)
def test_help_and_usage_errors_import_no_heavy_package(command: str, arguments: list[str]) -> None:
    packages = ("torch", "numpy", "transformers", "PIL")
    code = f"""
import sys
{command}
try:
    main({arguments if "compare_origin" in command else ""})
finally:
    print("imported:", *{set(packages)} & sys.modules.keys())
"""
    program = [] if "compare_origin" in command else ["verify"]
    result = run_python("-c", code, *program, *arguments, PYTHONPATH=str(ROOT))
    assert "usage: " in result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == "imported:"


def test_help_shows_defaults_of_options() -> None:
    """The parser cannot import VerifyOptions, which would import torch."""
    options = vars(VerifyOptions())
    assert {name: options[name] for name in verify.DEFAULTS} == verify.DEFAULTS
    choices = (verify_options.WEIGHTS, verify_options.DTYPES, verify_options.ATTENTIONS)
    assert choices == (verify.WEIGHTS, verify.DTYPES, verify.ATTENTIONS)


def test_options_reach_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, VerifyOptions]] = []

    def run(action: str, arguments: dict[str, Any]) -> int:
        calls.append((action, VerifyOptions(**arguments)))
        return 0

    monkeypatch.setattr(verify, "run", run)
    assert call() == 0
    options = (
        "--checkpoint c --weights hub --image i --dtype float16 --attn eager --device cuda:1 "
        "--full --second-ref timm --optimized --json j --report r --baseline b --selftest"
    )
    assert call(*options.split()) == 0
    assert calls == [
        ("compare", VerifyOptions()),
        (
            "selftest",
            VerifyOptions(
                checkpoint="c",
                weights="hub",
                image=Path("i"),
                dtype="float16",
                attention="eager",
                device="cuda:1",
                full=True,
                second_reference="timm",
                optimized=True,
                json=Path("j"),
                report=Path("r"),
                baseline=Path("b"),
            ),
        ),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dtype_and_attention(
    checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str], dtype: str, attention: str
) -> None:
    assert call("--checkpoint", checkpoint(), "--dtype", dtype, "--attn", attention) == 0
    out = capsys.readouterr().out
    assert f"dtype {dtype}, attention {attention}" in out
    assert out.splitlines()[-1].startswith("EQUAL (checkpoint weights): passed ")
    assert (f"rounding {dtype} (" in out) == (dtype != "float64" or attention == "none")


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "CMYK", "1", "LA"])
def test_image_modes(
    checkpoint: MakeCheckpoint, tmp_path: Path, mode: str, references: ReferenceProcess
) -> None:
    folder = checkpoint()
    (folder / "preprocessor_config.json").write_text('{"do_convert_rgb": null, "resample": 2}')
    with Image.open(SAMPLE_IMAGE) as image:
        image.convert(mode).resize((9, 5)).save(tmp_path / "image.tif")
    if mode == "CMYK":  # the whole command for one of them
        assert call("--checkpoint", folder, "--image", tmp_path / "image.tif") == 0
    options = VerifyOptions(str(folder), image=tmp_path / "image.tif")
    loaded = verification.load_port(options, tmp_path, references)
    case = verification.checkpoint_case(options, loaded, read_image(options.image), references)
    assert case.inputs.shape == (2, 3, 16, 16)
    assert case.inputs.isfinite().all()
    assert all(gate.passed for gate in case.check(loaded.model))


def test_image_is_resized_by_checkpoint(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs: list[Tensor] = []
    with_noise = verification.with_noise

    def record(pixel_values: Tensor) -> Tensor:
        inputs.append(with_noise(pixel_values))
        return inputs[-1]

    monkeypatch.setattr(verification, "with_noise", record)
    folder = checkpoint()
    assert call("--checkpoint", folder) == 0
    (folder / "preprocessor_config.json").write_text('{"resample": 0}')
    assert call("--checkpoint", folder) == 0
    assert not torch.equal(inputs[0][0], inputs[1][0])
    assert torch.equal(inputs[0][1], inputs[1][1])


def test_unexpected_error(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(verification, "checkpoint_case", fail)
    assert call("--checkpoint", checkpoint()) == 2
    assert capsys.readouterr().err == "could not compare: KeyError: 'surprise'\n"


def test_sizes_as_pairs(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint()
    edit_config(folder, image_size=[16, 16], patch_size=[8, 8])
    assert call("--checkpoint", folder) == 0


@pytest.mark.parametrize("resample", [2, 3])
def test_naflex(checkpoint: MakeCheckpoint, resample: int, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint(replace(SMALL, naflex=True))
    processor = {
        "image_processor_type": "Siglip2ImageProcessor",
        "resample": resample,
        "patch_size": 8,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    assert call("--checkpoint", folder, "--attn", "sdpa") == 0
    # The small models are NaFlex too, on images that are not square: they detect another resize
    # rule.
    monkeypatch.setattr(SigLipVisionConfig, "resize_rule", property(lambda _: "timm"))
    assert call("--checkpoint", folder, "--attn", "sdpa") == 1


def test_layout_unsupported_by_transformers(
    checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message suggests to extract the encoder."""
    folder = checkpoint(SMALL, prefix="vision_tower.vision_model.")
    assert call("--checkpoint", folder) == 2
    assert re.search(
        r"\(layout: HuggingFace, prefix vision_tower.vision_model\): transformers cannot load it "
        r"as a SigLIP vision encoder; run `siglip-port extract .* DIR` and pass --checkpoint DIR",
        capsys.readouterr().err,
    )
    SigLipVisionModel.from_hf(folder).save_hf(tmp_path / "extracted")
    assert call("--checkpoint", tmp_path / "extracted") == 0


def test_without_pooling_head(
    checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint()
    edit_tensors(folder, lambda t: {k: v for k, v in t.items() if not k.startswith("head.")})
    assert call("--checkpoint", folder) == 0
    out = capsys.readouterr().out
    assert "afterPooling" not in out
    assert out.splitlines()[-1].startswith("EQUAL (checkpoint weights): ")


def test_file_and_random_weights(
    checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    file = checkpoint() / "model.safetensors"
    assert call("--checkpoint", file) == 0
    assert "siglip_custom.shape: torch.Size([2, 4, 24])" in capsys.readouterr().out
    file.write_bytes(b"")
    assert call("--checkpoint", file.parent, "--weights", "random") == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("EQUAL (random weights): passed ")
    assert call("--checkpoint", file) == 2


def test_wrong_weights(
    checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loader changes a key bias, which affects no output."""
    load_state_dict = port.SigLipVisionModel.load_state_dict

    def load_with_wrong_bias(
        self: port.SigLipVisionModel, state: dict[str, torch.Tensor], **kwargs: bool
    ) -> object:
        name = "transformer.encoder.encoder_blocks.1.self_attn.k_proj.bias"
        return load_state_dict(self, {**state, name: state[name] + 1}, **kwargs)

    monkeypatch.setattr(port.SigLipVisionModel, "load_state_dict", load_with_wrong_bias)
    assert call("--checkpoint", checkpoint()) == 1
    out = capsys.readouterr().out
    assert "weights: encoder.layers.1.self_attn.k_proj.bias: 24 of 24 elements differ" in out
    assert out.splitlines()[-1].startswith(
        "DIFFERENT (checkpoint weights): weights: encoder.layers.1.self_attn.k_proj.bias: 24 of 24 "
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_weights(
    value: float, checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    """NaN in two blocks: the error names both, and there is no verdict."""
    folder = checkpoint()

    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for number in (0, 2):
            tensors[f"encoder.layers.{number}.mlp.fc1.bias"][3] = value
        return tensors

    edit_tensors(folder, spoil)
    assert call("--checkpoint", folder) == 2
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1] == (
        "could not compare: the reference's weights contain NaN or Inf in float32 "
        "(encoder.layers.{0,2}.mlp.fc1.bias), expected finite values; use other weights or a wider "
        "dtype"
    )
    assert printed.out == ""


def test_weights_beyond_float16(
    checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint()
    edit_tensors(folder, lambda t: {**t, "post_layernorm.bias": t["post_layernorm.bias"] + 1e5})
    assert call("--checkpoint", folder, "--dtype", "float16") == 2
    message = "contain NaN or Inf in float16 (post_layernorm.bias), expected finite values"
    assert message in capsys.readouterr().err


def test_non_finite_port_outputs(
    checkpoint: MakeCheckpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(port.ACTIVATIONS, "gelu_pytorch_tanh", lambda x: x * float("nan"))
    report = tmp_path / "report.json"
    (tmp_path / "link.json").symlink_to(report)
    assert call("--checkpoint", checkpoint(), "--json", tmp_path / "link.json") == 1
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert verdict.startswith("DIFFERENT (checkpoint weights): numerics: encoder.layers.{0...")
    assert "looks like: NaN or Inf in the port" in verdict
    assert (tmp_path / "link.json").is_symlink()
    assert (
        json.loads(report.read_text(), parse_constant=pytest.fail)["findings"][0]["error"] == "nan"
    )


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "run", interrupt)
    assert call() == 130
    assert capsys.readouterr().err == "interrupted: no verdict\n"


def test_port_that_raises_is_different(
    checkpoint: MakeCheckpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> Tensor:
        raise AssertionError

    monkeypatch.setattr(port.MLP, "forward", refuse)
    assert call("--checkpoint", checkpoint(), "--report", tmp_path) == 1
    output = capsys.readouterr()
    assert output.err == ""
    assert re.fullmatch(
        r"DIFFERENT \(checkpoint weights\): numerics: encoder\.layers\.0\.mlp \(port: "
        r"transformer\.encoder\.encoder_blocks\.0\.mlp\): the port raises AssertionError "
        r"\(test_verify\.py:\d+, in refuse\); in \d of \d checkpoints; and \d+ more findings",
        output.out.splitlines()[-1],
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["outputs"] == []
    kinds = [(cause["kind"], cause["is_consequence"]) for cause in report["causes"]]
    assert kinds[0] == ("error", False)
    assert all(is_consequence for _, is_consequence in kinds[1:])
    passed = {gate["name"] for gate in report["sections"][0]["gates"] if gate["passed"]}
    assert passed == {"pixels", "config", "weights"}


def test_port_that_does_not_load_is_different(
    checkpoint: MakeCheckpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Random weights were written for it, so that it must load them."""

    def refuse(*_: object, **options: object) -> SigLipVisionModel:
        raise KeyError("encoder.layers.0")

    monkeypatch.setattr(SigLipVisionModel, "from_hf", refuse)
    arguments = ("--checkpoint", checkpoint(), "--weights", "random", "--report", tmp_path)
    assert call(*arguments) == 1
    assert re.fullmatch(
        r"DIFFERENT \(random weights\): weights: loading the port raises KeyError: "
        r"'encoder.layers.0' \(test_verify.py:\d+, in refuse\)",
        capsys.readouterr().out.splitlines()[-1],
    )
    assert json.loads((tmp_path / "report.json").read_text())["equal"] is False
    assert (tmp_path / "report.html").read_text().startswith("<!")


def test_port_of_a_small_model_that_does_not_load_is_different(
    checkpoint: MakeCheckpoint,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = SigLipVisionModel.from_hf
    folder = checkpoint()

    def refuse_small(source: str, **options: object) -> SigLipVisionModel:
        if source != str(folder):
            raise TypeError("unknown layout")
        return original(source)

    monkeypatch.setattr(SigLipVisionModel, "from_hf", refuse_small)
    assert call("--checkpoint", folder) == 1
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert "weights: loading the port raises TypeError: unknown layout" in verdict


def test_wrong_activation(
    checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint()
    edit_config(folder, hidden_act="gelu")
    assert call("--checkpoint", folder) == 0
    monkeypatch.setitem(port.ACTIVATIONS, "gelu", lambda x: F.gelu(x, approximate="tanh"))
    assert call("--checkpoint", folder) == 1
    capsys.readouterr()


def test_hub(hub: Hub, checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]) -> None:
    """Comparisons from the Hub and from its cache, and an error without both."""
    folder = checkpoint(prefix="vision_model.")
    hub.repositories["google/siglip-served"] = Repository(folder)
    for weights in ("auto", "hub"):
        assert call("--checkpoint", "google/siglip-served", "--weights", weights) == 0
        assert (
            capsys.readouterr()
            .out.splitlines()[-1]
            .startswith("EQUAL (checkpoint weights): passed ")
        )
    assert call("--checkpoint", "google/siglip-absent") == 2
    assert "google/siglip-absent: no such repository on the Hub" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        assert call("--checkpoint", "google/siglip-served") == 0
        capsys.readouterr()
        for args in (
            ["--checkpoint", "google/siglip-elsewhere"],
            ["--checkpoint", "google/siglip-elsewhere", "--weights", "random"],
            ["--weights", "hub"],
        ):
            assert call(*args) == 2
            assert (
                "is not in the local cache, and the Hub cannot be reached"
                in capsys.readouterr().err
            )


def test_default_command_without_hub(
    hub: Hub,
    checkpoint: MakeCheckpoint,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The default command falls back to random weights and prints the reason."""
    monkeypatch.setattr(verification, "DEFAULT_CHECKPOINT", "google/siglip-broken")
    monkeypatch.setattr(verification, "DEFAULT_CONFIG", SMALL)
    hub.repositories["google/siglip-broken"] = Repository(checkpoint())
    hub.faults = [Fault("reset", "CDN * model.safetensors", times=None)]
    assert call("--checkpoint", "google/siglip-broken") == 0
    out, err = capsys.readouterr()
    assert re.search(
        r"google/siglip-broken: cannot download model.safetensors.*; comparing random weights of",
        err,
    )
    assert out.splitlines()[-1].startswith("EQUAL (random weights)")
    assert call("--checkpoint", "google/siglip-broken", "--weights", "hub") == 2


def test_inputs() -> None:
    with Image.open(SAMPLE_IMAGE) as image:
        assert image.width != image.height
        pixels = verification.with_noise(
            reference.image_processors(SMALL)["pil"](image)["pixel_values"]
        )
    assert pixels.shape == (2, 3, 16, 16)
    assert pixels.abs().max() <= 1
    assert (pixels[0] - pixels[1]).std() > 0.3


# --- the reference --------------------------------------------------------------------------------


def test_patched_torch(
    checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The port patches torch for everything in its process, so the reference is in another one."""
    layer_norm = F.layer_norm

    def with_other_eps(
        x: Tensor, shape: list[int], weight: Tensor, bias: Tensor, _: float
    ) -> Tensor:
        return layer_norm(x, shape, weight, bias, 1e-3)

    monkeypatch.setattr(F, "layer_norm", with_other_eps)
    assert call("--checkpoint", checkpoint()) == 1
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert "looks like: eps 0.001 instead of 1e-06" in verdict


def run_in_this_process(name: str, command: list[str], log: Path) -> None:
    """Run the script of a second reference, without another import of torch and timm."""
    package, folder = command[-2:]
    second_reference_script.main(package, Path(folder))


@pytest.mark.parametrize(
    ("activation", "code", "verdict"),
    [
        ("gelu", 0, r"EQUAL \(checkpoint weights\): passed .*, second-ref \(2\).*"),
        (
            "gelu_pytorch_tanh",
            1,
            r"DIFFERENT \(checkpoint weights\): second-ref: encoder.layers.0.mlp.fc2:input: timm "
            r"[\d.]+ differs from port and transformers [\d.]+ in float64 \(tokens .*, pooled .*\)"
            r", first at its blocks.0.mlp.fc2:input; looks like: exact \(erf\) GELU .*",
        ),
    ],
)
def test_second_reference(
    activation: str,
    code: int,
    verdict: str,
    checkpoint: MakeCheckpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """timm has exact GELU for every checkpoint."""
    monkeypatch.setattr(second_reference, "run_script", run_in_this_process)
    folder = checkpoint(replace(SMALL, hidden_act=activation))
    report = tmp_path / "report.json"
    arguments = ("--checkpoint", folder, "--second-ref", "timm", "--json", report)
    assert call(*arguments) == code
    out = capsys.readouterr().out
    assert re.fullmatch(verdict, out.splitlines()[-1])
    assert "port - timm " in out
    assert json.loads(report.read_text())["equal"] is (code == 0)


@pytest.mark.parametrize("is_equal", [True, False])
def test_second_reference_that_cannot_run(
    is_equal: bool,
    checkpoint: MakeCheckpoint,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Everything else is reported; a port that is different stays different."""

    def fail(*_: object) -> None:
        raise RuntimeError("--second-ref timm: timed out")

    monkeypatch.setattr(second_reference, "run_script", fail)
    if not is_equal:
        monkeypatch.setitem(port.ACTIVATIONS, "gelu_pytorch_tanh", F.gelu)
    code = call("--checkpoint", checkpoint(), "--second-ref", "timm")
    printed = capsys.readouterr()
    assert code == (2 if is_equal else 1)
    assert printed.out.splitlines()[-1].startswith("EQUAL (" if is_equal else "DIFFERENT (")
    assert printed.err.endswith(
        "could not compare with the second reference: --second-ref timm: timed out\n"
    )


# --- reports, baselines, gates, notes -------------------------------------------------------------


def test_reports_and_baseline(
    checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint()
    assert call("--checkpoint", folder, "--report", tmp_path / "new" / "reports") == 0
    written = sorted(path.name for path in (tmp_path / "new" / "reports").iterdir())
    assert written == ["badge.json", "junit.xml", "report.html", "report.json", "report.md"]
    report = tmp_path / "new" / "reports" / "report.json"
    assert json.loads(report.read_text())["patches"]["grid"] == 2
    assert "data:image/png;base64," in (tmp_path / "new" / "reports" / "report.html").read_text()
    capsys.readouterr()
    assert call("--checkpoint", folder, "--baseline", report) == 0
    assert re.search(
        r"measurements against the baseline: \d+ in both, 0 new, 0 removed", capsys.readouterr().out
    )


@pytest.mark.parametrize("size", ["tiny", pytest.param("small", marks=pytest.mark.slow)])
def test_full_comparison(
    size: str, checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if size == "small":
        monkeypatch.undo()
    assert call("--checkpoint", checkpoint(), "--full", "--json", tmp_path / "full.json") == 0
    sections = json.loads((tmp_path / "full.json").read_text())["sections"]
    names = [gate["name"] for gate in sections[0]["gates"]]
    assert names == [*GATES, "rounding float32", "rounding bfloat16", "rounding float16"]
    assert len(sections) >= 3 + 2 * 6  # the input regimes follow
    assert {section["weights"].split(",")[0] for section in sections[3:15]} == {
        "default",
        "N1",
        "S1",
        "L7",
        "L8",
    }


def test_list_gates(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--list-gates") == 0
    out = capsys.readouterr().out
    assert all(f"\n{gate}: " in f"\n{out}" for gate in [*GATES, "rounding"])
    assert re.search(
        r"numerics: .*\n  bound: .*1e-10.*\n  detected (\d+) and located \d+ of its \1 mutants",
        out,
    )


def test_memory_note(capsys: pytest.CaptureFixture[str]) -> None:
    so400m = SigLipVisionConfig(
        embed_dim=1152,
        image_size=384,
        patch_size=14,
        num_attention_heads=16,
        num_encoder_blocks=27,
        mlp_hidden_dim=4304,
        pooling_head=True,
    )
    with torch.device("meta"):
        models = [
            port.SigLipVisionModel(config)
            for config in (so400m, SigLipVisionConfig(pooling_head=True))
        ]
    verification.warn_of_memory(models[0], torch.float32)
    assert re.match(
        r"428 M parameters: the comparison needs about 1\d GB of memory\n", capsys.readouterr().err
    )
    verification.warn_of_memory(models[1], torch.float32)
    assert capsys.readouterr().err == ""


def test_engine_gates(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with cases.random_case(cases.ODD, "L7", gates=("rounding",)) as case:
        gates = list(verification.engine_gates(case, SigLipVisionModel.from_hf(case.source)))
    assert [gate.name for gate in gates] == [
        f"rounding float32, {engine}" for engine in ("prepacked", "prepacked-gelu", "onnxruntime")
    ]
    assert all(gate.passed and gate.checked == 2 for gate in gates)
    notes = capsys.readouterr().err
    assert "skipped openvino on the odd encoder: openvino is not installed" in notes
    assert "skipped compiled on the odd encoder: requires a CUDA device, got cpu" in notes


# --- missing extras, missing clone ----------------------------------------------------------------


def test_without_transformers(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for arguments in (["--checkpoint", checkpoint()], ["--selftest"]):
        assert call(*arguments) == 2
        assert capsys.readouterr().err == (
            "could not compare: transformers is not installed; run: pip install "
            "'siglip-port[parity]'\n"
        )
    assert call("--list-gates") == 0


@pytest.mark.parametrize("option", ["--selftest", "--calibrate"])
def test_without_clone(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])

    monkeypatch.setattr(importlib, "import_module", fail)
    assert call(option) == 2
    assert capsys.readouterr().err == (
        "could not compare: --selftest and --calibrate need a clone of siglip-port: "
        "scripts/selftest is not installed\n"
    )


@pytest.mark.parametrize("field", ["weights", "dtype", "attention"])
def test_options_are_validated(field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be one of .*, got 'mine'"):
        VerifyOptions(**{field: "mine"})  # type: ignore[arg-type]
