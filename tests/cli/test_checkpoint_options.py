"""The options that select an encoder are the same in every command."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from siglip_port import SigLipVisionModel
from siglip_port.cli import exit_codes, verify
from tests.helpers.checkpoints import edit_config
from tests.helpers.commands import inspect, run
from tests.helpers.hub_cache import NAME
from tests.helpers.hub_server import Hub, Repository

SELECTION = "--subfolder image_encoder --layout huggingface --prefix b."


@pytest.fixture
def commands(tmp_path: Path) -> dict[str, list[Any]]:
    """Command lines without the source of the model, which follows."""
    Image.new("RGB", (20, 20), (90, 30, 0)).save(tmp_path / "a.png")
    program = ["--format", "program"]
    return {
        "inspect": ["inspect"],
        "extract": ["extract", "--force", tmp_path / "extracted"],
        "export": ["export", *program, tmp_path / "encoder.pt2"],
        "plot": ["plot", tmp_path / "a.png", "-o", tmp_path / "plots", "--model"],
        "embed": ["embed", tmp_path / "a.png", "-o", tmp_path / "embeddings", "--model"],
    }


def command_line(commands: dict[str, list[Any]], name: str, source: object) -> list[Any]:
    """Return a command line with its source, which precedes an output that is an argument."""
    command = commands[name]
    if name in ("extract", "export"):
        return [*command[:-1], source, command[-1]]
    return [*command, source]


@pytest.fixture
def pipeline(two_encoders: Path, tmp_path: Path) -> Path:
    """A folder with two encoders in its subfolder `image_encoder`."""
    shutil.move(two_encoders, tmp_path / "pipeline" / "image_encoder")
    return tmp_path / "pipeline"


@pytest.mark.parametrize("name", ["inspect", "extract", "export", "plot", "embed"])
def test_errors_lead_to_the_encoder(
    name: str, commands: dict[str, list[Any]], pipeline: Path
) -> None:
    """Each error offers the options that the next call needs."""
    command = command_line(commands, name, pipeline)
    stderr = run(*command, code=exit_codes.FAILURE).stderr
    assert stderr.endswith(": pass --subfolder image_encoder\n")
    command += ["--subfolder", "image_encoder"]
    stderr = run(*command, code=exit_codes.FAILURE).stderr
    assert "--layout huggingface --prefix b." in stderr
    stderr = run(*command, "--subfolder", "x", code=exit_codes.FAILURE).stderr
    assert stderr == (
        f"{pipeline} has no folder 'x'; weights are in its folder image_encoder: pass --subfolder "
        "image_encoder\n"
    )
    result = run(*command, *SELECTION.split())
    if name in ("inspect", "extract", "export"):
        assert f"source   {pipeline}/image_encoder\n" in result.stdout
        assert "prefix b" in result.stdout


def test_extract_selected_encoder(
    commands: dict[str, list[Any]], pipeline: Path, tmp_path: Path
) -> None:
    run(*command_line(commands, "extract", pipeline), *SELECTION.split())
    state = SigLipVisionModel.from_hf(tmp_path / "extracted").state_dict()
    expected = SigLipVisionModel.from_hf(
        pipeline, subfolder="image_encoder", layout="huggingface", prefix="b."
    ).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_extract_into_subfolder_is_refused(pipeline: Path) -> None:
    output = pipeline / "image_encoder"
    command = ["extract", pipeline, output, *SELECTION.split(), "--force"]
    assert "contains the source" in run(*command, code=exit_codes.USAGE_ERROR).stderr


def test_problem_in_json_names_options(pipeline: Path) -> None:
    arguments = (pipeline, "--subfolder", "image_encoder")
    problem = inspect(*arguments, code=exit_codes.FAILURE)["problem"]
    assert "--layout huggingface --prefix a." in problem
    folder = pipeline / "image_encoder"
    weights = folder / "model.safetensors"
    selection = SELECTION.split()[2:]
    assert inspect(weights, *selection)["problem"] is None


def test_problem_of_changed_config(encoder_copy: Path, tmp_path: Path) -> None:
    config = Path(shutil.copy(encoder_copy / "config.json", tmp_path / "right.json"))
    edit_config(encoder_copy, layer_norm_eps=1e-5)
    problem = inspect(encoder_copy, code=exit_codes.FAILURE)["problem"]
    assert problem.endswith("save or download both again, or pass --config FILE")
    assert run("inspect", encoder_copy, code=exit_codes.FAILURE).stderr == f"{problem}\n"
    assert inspect(encoder_copy, "--config", config)["problem"] is None


def test_revision_and_offline(hub: Hub, hub_cache: Path, pipeline: Path) -> None:
    hub.repositories[NAME] = Repository(pipeline)
    selection = SELECTION.split()
    message = f"{NAME}@v9: no such revision on the Hub"
    assert message in run("inspect", NAME, "--revision", "v9", *selection, code=1).stderr
    stderr = run("inspect", NAME, "--offline", *selection, code=1).stderr
    assert "image_encoder/config.json is not in the local cache, and downloads are dis" in stderr
    assert "disabled by --offline; load it once online" in stderr
    printed = run("inspect", NAME, "--revision", "v1", *selection).stdout
    assert printed.startswith(f"source   hf://{NAME}/image_encoder at commit ")
    hub.repositories.clear()
    commit = printed.split()[4]
    assert run("inspect", NAME, "--offline", "--revision", commit, *selection).stdout == printed


# --- verify ---------------------------------------------------------------------------------------


def test_verify_offers_its_options(pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--checkpoint", str(pipeline)]
    assert verify.main(command) == exit_codes.USAGE_ERROR
    assert "pass --subfolder image_encoder" in capsys.readouterr().err
    command += ["--subfolder", "image_encoder"]
    assert verify.main(command) == exit_codes.USAGE_ERROR
    assert "--layout huggingface --prefix b." in capsys.readouterr().err
    assert verify.main([*command, *SELECTION.split()]) == exit_codes.USAGE_ERROR
    advice = (
        "siglip-port extract {} DIR --layout huggingface --prefix b. --subfolder "
        "image_encoder` and pass --checkpoint DIR"
    )
    assert advice.format(pipeline) in capsys.readouterr().err


@pytest.mark.parametrize("on_hub", [False, True])
def test_verify_subfolder(
    on_hub: bool,
    hub: Hub,
    hub_cache: Path,
    encoder_copy: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from siglip_port.parity.siglip import cases

    monkeypatch.setattr(cases, "small_cases", lambda *_, **__: [])  # only the checkpoint
    root = encoder_copy.parent / "pipeline"
    shutil.move(encoder_copy, root / "image_encoder")
    hub.repositories[NAME] = Repository(root)
    source = NAME if on_hub else str(root)
    command = ["--checkpoint", source, "--subfolder", "image_encoder", "--weights", "hub"]
    assert verify.main(command) == exit_codes.SUCCESS, capsys.readouterr()
    assert "EQUAL" in capsys.readouterr().out
    if on_hub:
        hub.repositories.clear()
        assert verify.main([*command, "--offline"]) == exit_codes.SUCCESS, capsys.readouterr()
