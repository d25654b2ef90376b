"""The command, end to end: what it prints, what it writes, and all three exit codes."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image

import compare_origin
from siglip_port import SigLipVisionConfig, SigLipVisionModel
from siglip_port import model as port
from siglip_port.parity.siglip import cases as proof
from siglip_port.parity.siglip import reference as references
from siglip_port.parity.siglip.cases import Case
from tests.helpers.checkpoints import SMALL, MakeCheckpoint, edit_config, edit_tensors
from tests.helpers.hub_server import Fault, Hub, Repository
from tests.helpers.network import silent_port

ROOT = Path(compare_origin.__file__).parent
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
GATES = ["pixels", "environment", "config", "weights", "liveness", "semantics", "interface"]


def run(*args: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the command as a user does, in a process of its own."""
    return subprocess.run(
        [sys.executable, ROOT / "compare_origin.py", *map(str, args)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_default_command_without_a_network(tmp_path: Path) -> None:
    """The main command of the README, full size."""
    done = run(
        "--json",
        tmp_path / "out.json",
        HF_ENDPOINT=f"http://127.0.0.1:{silent_port()}",
        HF_HOME=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(
        r"google/siglip-base-patch16-224 is not in the local cache, and the Hub cannot be reached "
        r"\(no connection to "
        r"127.0.0.1 \(.*\)\): comparing random weights of the same architecture instead\.\n",
        done.stderr,
    )
    lines = done.stdout.splitlines()
    assert [
        line[: len(known)] for line, known in zip(lines, KNOWN_LINES, strict=False)
    ] == KNOWN_LINES
    assert lines[0].endswith("torch.Size([2, 196, 768])")
    assert lines[3].endswith("torch.Size([2, 768])")
    assert float(lines[4].split(": ")[1]) == pytest.approx(1)
    table = [re.split(r" +\| +", line) for line in lines if " | " in line][1:]
    assert [row[0] for row in table] == [
        *GATES,
        "rounding float32",
        "rounding bfloat16",
        "rounding float16",
    ]
    assert {row[-1] for row in table} == {"passed"}
    assert re.match(
        r"EQUAL \(random weights\): passed pixels \(42\), environment \(16\), config \(22\), "
        r"weights \(464\), ",
        lines[-1],
    )
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["equal"] is True
    assert content["weights"] == "random weights"
    assert content["environment"]["transformers"] == references.VERSION
    names = [(section["name"], section["weights"]) for section in content["sections"]]
    assert names == [
        ("checkpoint", "random weights, N1"),
        ("odd tower", "N1, seed 1234"),
        ("small so400m", "N1, seed 1234"),
        ("odd tower", "L7, seed 1234"),
        ("odd tower", "S1, seed 1234"),
    ]
    assert [gate["name"] for gate in content["sections"][0]["gates"]] == [
        *GATES,
        "rounding float32",
    ]
    for section in content["sections"]:
        assert all(
            gate["passed"] and not gate["unseen"] and not gate["islands"]
            for gate in section["gates"]
        )
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".json"] == ["out.json"]


def test_exact_gelu_ends_in_exit_code_1(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """The same command, with a port in which one word is wrong."""
    folder = checkpoint()
    wrong = (
        "import sys, torch.nn.functional as F, siglip_port.model as port, compare_origin;"
        "port.ACTIVATIONS['gelu_pytorch_tanh'] = F.gelu; "
        "sys.exit(compare_origin.main(sys.argv[1:]))"
    )
    command = [
        sys.executable,
        "-c",
        wrong,
        "--checkpoint",
        str(folder),
        "--json",
        str(tmp_path / "out.json"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert re.match(
        r"DIFFERENT \(checkpoint weights\): semantics: encoder\.layers\.0\.mlp\.fc2:input \(port: "
        r".*\): differs in "
        r"float64, bound 1e-10, relative error .*; looks like: exact \(erf\) GELU; and \d+ more "
        r"findings",
        done.stdout.splitlines()[-1],
    )
    assert json.loads((tmp_path / "out.json").read_text())["equal"] is False


def test_wrong_calls_end_in_exit_code_2_and_one_sentence(tmp_path: Path) -> None:
    calls: list[tuple[list[str | Path], str]] = [
        (
            ["--checkpoint", tmp_path],
            r"could not compare: .* holds neither model.safetensors nor .*; found: nothing",
        ),
        (
            ["--image", tmp_path / "absent.png"],
            r"could not compare: --image .*No such file.*; pass a JPEG or PNG",
        ),
    ]
    for args, sentence in calls:
        done = run(*args, HF_HUB_OFFLINE="1")
        assert done.returncode == 2
        assert not done.stdout
        assert re.match(sentence, done.stderr)
        assert len(done.stderr.splitlines()) == 1


# The rest runs in this process, which saves importing transformers each time.


def call(*args: str | Path) -> int:
    return compare_origin.main([str(arg) for arg in args])


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (
            ["--checkpoint", "no/such/folder"],
            "could not compare: 'no/such/folder' does not exist on this machine",
        ),
        (
            ["--image", "tests/images/README.md"],
            r"could not compare: --image .*README.md cannot be read as a picture",
        ),
        (
            ["--device", "cuda"],
            r"could not compare: --device cuda cannot be used on this machine \(.*\); use cpu",
        ),
        (
            ["--device", "abacus"],
            r"could not compare: --device abacus cannot be used on this machine \(.*\); use cpu",
        ),
        (
            ["--json", "no/such/folder/out.json"],
            "could not compare: --json .*: its folder does not exist, or may not",
        ),
        (
            ["--json", "tests"],
            r"could not compare: --json .*tests is no file that could be replaced",
        ),
        (
            ["--report", "tests/images/README.md"],
            r"could not compare: --report .*: its folder does not exist, or",
        ),
        (
            ["--baseline", "pyproject.toml"],
            r"could not compare: --baseline pyproject.toml cannot be used: .*; name",
        ),
        (
            ["--baseline", "absent"],
            r"could not compare: --baseline absent cannot be used: .*No such file",
        ),
        (
            ["--second-ref", "clip"],
            r"could not compare: there is no witness 'clip'; known are timm and open_clip",
        ),
        (
            ["--json", "/dev/null"],
            r"could not compare: --json /dev/null is no file that could be replaced",
        ),
    ],
)
def test_wrong_arguments(
    args: list[str], sentence: str, capsys: pytest.CaptureFixture[str], hub: Hub
) -> None:
    if "cuda" in args and torch.cuda.is_available():
        pytest.skip("this machine has one")
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


def test_help_fits_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        call("--help")
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert "exit status: 0 equal, 1 different, 2 could not compare, 3 no power" in out
    assert len(out.splitlines()) <= 60


@pytest.mark.parametrize("dtype", compare_origin.DTYPES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dtypes_and_attentions(
    checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str], dtype: str, attention: str
) -> None:
    assert call("--checkpoint", checkpoint(), "--dtype", dtype, "--attn", attention) == 0
    out = capsys.readouterr().out
    assert f"dtype {dtype}, attention {attention}" in out
    assert out.splitlines()[-1].startswith("EQUAL (checkpoint weights): passed ")
    assert (f"rounding {dtype} (" in out) == (dtype != "float64" or attention == "none")


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "CMYK", "1", "LA"])
def test_pictures_of_all_modes(checkpoint: MakeCheckpoint, tmp_path: Path, mode: str) -> None:
    folder = checkpoint()
    (folder / "preprocessor_config.json").write_text('{"do_convert_rgb": null, "resample": 2}')
    with Image.open(compare_origin.PHOTOGRAPH) as image:
        image.convert(mode).resize((9, 5)).save(tmp_path / "picture.tif")
    arguments = ["--checkpoint", str(folder), "--image", str(tmp_path / "picture.tif")]
    if mode == "CMYK":  # one of them to the end
        assert call(*arguments) == 0
    args = compare_origin.parse(arguments)
    port, source = compare_origin.load_port(args, str(tmp_path))
    picture = compare_origin.read_picture(args.image)
    case = compare_origin.main_case(args, port, source, picture, is_random=False)
    assert case.inputs.shape == (2, 3, 16, 16)
    assert case.inputs.isfinite().all()
    assert all(gate.passed for gate in case.check(port))


def test_the_photograph_is_resized_as_the_checkpoint_says(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    write_reports = compare_origin.write_reports

    def keep(args: argparse.Namespace, report: dict[str, object], case: Case) -> None:
        seen.append(case.inputs)
        write_reports(args, report, case)

    monkeypatch.setattr(compare_origin, "write_reports", keep)
    folder = checkpoint()
    assert call("--checkpoint", folder) == 0
    (folder / "preprocessor_config.json").write_text('{"resample": 0}')
    assert call("--checkpoint", folder) == 0
    assert not torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1])


def test_an_error_of_any_kind_is_no_verdict(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(references, "load", fail)
    assert call("--checkpoint", checkpoint()) == 2
    assert capsys.readouterr().err == "could not compare: KeyError: 'surprise'\n"


def test_sizes_written_as_pairs(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint()
    edit_config(folder, image_size=[16, 16], patch_size=[8, 8])
    assert call("--checkpoint", folder) == 0


@pytest.mark.parametrize("resample", [2, 3])
def test_a_naflex_checkpoint(
    checkpoint: MakeCheckpoint, resample: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(replace(SMALL, naflex=True))
    processor = {
        "image_processor_type": "Siglip2ImageProcessor",
        "resample": resample,
        "patch_size": 8,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    assert compare_origin.main(["--checkpoint", str(folder), "--attn", "sdpa"]) == 0
    # The small towers are NaFlex too, and given pictures that are not square: another rule would be
    # noticed.
    monkeypatch.setattr(SigLipVisionConfig, "resize_rule", property(lambda _: "timm"))
    assert compare_origin.main(["--checkpoint", str(folder), "--attn", "sdpa"]) == 1


def test_layouts_that_transformers_cannot_load(
    checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The way is to take the tower out, and to compare that."""
    folder = checkpoint(SMALL, prefix="vision_tower.vision_model.")
    assert call("--checkpoint", folder) == 2
    assert re.search(
        r"\(layout: HuggingFace, prefix vision_tower.vision_model\) is no checkpoint that "
        r"transformers loads .*; take "
        r"the tower out, `siglip-port extract .* FOLDER`, and compare that folder",
        capsys.readouterr().err,
    )
    SigLipVisionModel.from_hf(folder).save_hf(tmp_path / "taken out")
    assert call("--checkpoint", tmp_path / "taken out") == 0


def test_headless_checkpoints_are_compared_before_pooling(
    checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint()
    edit_tensors(folder, lambda t: {k: v for k, v in t.items() if not k.startswith("head.")})
    assert call("--checkpoint", folder) == 0
    out = capsys.readouterr().out
    assert "afterPooling" not in out
    assert out.splitlines()[-1].startswith("EQUAL (checkpoint weights): ")


def test_a_file_and_random_weights_of_its_architecture(
    checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    file = checkpoint() / "model.safetensors"
    assert call("--checkpoint", file) == 0
    assert "siglip_custom.shape: torch.Size([2, 4, 24])" in capsys.readouterr().out
    file.write_bytes(b"")
    assert call("--checkpoint", file.parent, "--weights", "random") == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("EQUAL (random weights): passed ")
    assert call("--checkpoint", file) == 2


def test_weights_that_are_not_the_files_are_noticed(
    checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loader that gets one bias of the keys wrong: no output shows it, and the verdict does."""
    load_state_dict = port.SigLipVisionModel.load_state_dict

    def almost(
        self: port.SigLipVisionModel, state: dict[str, torch.Tensor], **kwargs: bool
    ) -> object:
        name = "transformer.encoder.encoder_blocks.1.self_attn.k_proj.bias"
        return load_state_dict(self, {**state, name: state[name] + 1}, **kwargs)

    monkeypatch.setattr(port.SigLipVisionModel, "load_state_dict", almost)
    assert call("--checkpoint", checkpoint()) == 1
    out = capsys.readouterr().out
    assert "weights: encoder.layers.1.self_attn.k_proj.bias: 24 of 24 elements differ" in out
    assert out.splitlines()[-1].startswith(
        "DIFFERENT (checkpoint weights): semantics: encoder.layers.1.self_attn.k_proj (port: "
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_numbers_are_no_verdict(
    value: float, checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    """One element in each of two blocks.

    They are named, and nothing is called equal or different.
    """
    folder = checkpoint()

    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for number in (0, 2):
            tensors[f"encoder.layers.{number}.mlp.fc1.bias"][3] = value
        return tensors

    edit_tensors(folder, spoil)
    assert call("--checkpoint", folder) == 2
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1] == (
        "could not compare: the reference's weights hold NaN or infinity in float32, so there is "
        "nothing to compare "
        "with: encoder.layers.{0,2}.mlp.fc1.bias"
    )
    assert printed.out == ""


def test_weights_that_a_narrow_dtype_cannot_hold_are_no_verdict(
    checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint()
    edit_tensors(folder, lambda t: {**t, "post_layernorm.bias": t["post_layernorm.bias"] + 1e5})
    assert call("--checkpoint", folder, "--dtype", "float16") == 2
    assert (
        "hold NaN or infinity in float16, so there is nothing to compare with: post_lay"
        in capsys.readouterr().err
    )


def test_a_port_that_gives_no_number_is_different(
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
    assert verdict.startswith(
        "DIFFERENT (checkpoint weights): semantics: encoder.layers.0.mlp.fc2:input "
    )
    assert "not finite" in verdict
    assert (tmp_path / "link.json").is_symlink()
    assert (
        json.loads(report.read_text(), parse_constant=pytest.fail)["findings"][0]["error"] == "nan"
    )


def test_an_interrupt_is_no_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare_origin, "run", interrupt)
    assert call() == 130
    assert capsys.readouterr().err == "interrupted: nothing was compared\n"


def test_a_config_that_the_port_misread_would_be_noticed(
    checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint()
    edit_config(folder, hidden_act="gelu")
    assert call("--checkpoint", folder) == 0
    monkeypatch.setitem(port.ACTIVATIONS, "gelu", lambda x: F.gelu(x, approximate="tanh"))
    assert call("--checkpoint", folder) == 1
    capsys.readouterr()


def test_hub_ids(hub: Hub, checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]) -> None:
    """From the Hub, then from its cache, then from neither."""
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
    assert "the Hub has no repository 'google/siglip-absent'" in capsys.readouterr().err
    from huggingface_hub import constants

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


def test_a_hub_that_answers_and_then_breaks_off(
    hub: Hub,
    checkpoint: MakeCheckpoint,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The default command goes on with random weights, of a small architecture here, and says why."""
    monkeypatch.setattr(compare_origin, "CHECKPOINT", "google/siglip-broken")
    monkeypatch.setattr("siglip_port.SigLipVisionConfig", lambda **_: SMALL)
    hub.repositories["google/siglip-broken"] = Repository(checkpoint())
    hub.faults = [Fault("reset", "CDN * model.safetensors", times=None)]
    assert call("--checkpoint", "google/siglip-broken") == 0
    out, err = capsys.readouterr()
    assert re.search(
        r"model.safetensors of 'google/siglip-broken' .*: comparing random weights of the same", err
    )
    assert out.splitlines()[-1].startswith("EQUAL (random weights)")
    assert call("--checkpoint", "google/siglip-broken", "--weights", "hub") == 2


def test_the_photograph_is_not_square_and_pixels_are_not_all_noise() -> None:
    with Image.open(compare_origin.PHOTOGRAPH) as image:
        assert image.width != image.height
        pixels = compare_origin.with_noise(
            references.processors(SMALL)["pil"](image)["pixel_values"]
        )
    assert pixels.shape == (2, 3, 16, 16)
    assert pixels.abs().max() <= 1
    assert (pixels[0] - pixels[1]).std() > 0.3


# --- reports, baselines, witnesses, and what else there is ----------------------------------------


def test_reports_and_a_baseline(
    checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint()
    assert call("--checkpoint", folder, "--report", tmp_path / "made" / "reports") == 0
    written = sorted(path.name for path in (tmp_path / "made" / "reports").iterdir())
    assert written == ["junit.xml", "report.html", "report.json", "report.md"]
    report = tmp_path / "made" / "reports" / "report.json"
    assert json.loads(report.read_text())["patches"]["grid"] == 2
    assert "data:image/png;base64," in (tmp_path / "made" / "reports" / "report.html").read_text()
    capsys.readouterr()
    assert call("--checkpoint", folder, "--baseline", report) == 0
    assert re.search(
        r"against the baseline: \d+ figures in both, 0 new, 0 gone", capsys.readouterr().out
    )


def test_the_full_proof(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    assert call("--checkpoint", checkpoint(), "--full", "--json", tmp_path / "full.json") == 0
    sections = json.loads((tmp_path / "full.json").read_text())["sections"]
    names = [gate["name"] for gate in sections[0]["gates"]]
    assert names == [*GATES, "rounding float32", "rounding bfloat16", "rounding float16"]
    assert len(sections) == 1 + 2 * 6
    assert {section["weights"].split(",")[0] for section in sections[1:]} == {
        "default",
        "N1",
        "S1",
        "L7",
        "L8",
    }


def test_gates_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--list-gates") == 0
    out = capsys.readouterr().out
    assert all(f"\n{gate}: " in f"\n{out}" for gate in [*GATES, "rounding"])
    assert re.search(
        r"semantics: .*\n  bound: .*1e-10.*\n  notices \d+ of \d+ mistakes, alone: \w+", out
    )


def test_large_towers_state_their_need(capsys: pytest.CaptureFixture[str]) -> None:
    so400m = SigLipVisionConfig(
        embed_dim=1152, image_size=384, patch_size=14, num_attention_heads=16, num_encoder_blocks=27,
        mlp_hidden_dim=4304, pooling_head=True,
    )  # fmt: skip
    with torch.device("meta"):
        towers = [
            port.SigLipVisionModel(config)
            for config in (so400m, SigLipVisionConfig(pooling_head=True))
        ]
    compare_origin.warn_of_memory(towers[0], torch.float32)
    assert re.match(r"this tower has 428 M parameters: needs about 1\d GB", capsys.readouterr().err)
    compare_origin.warn_of_memory(towers[1], torch.float32)
    assert capsys.readouterr().err == ""


def test_every_form_of_optimize_is_judged(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with proof.random_case(proof.ODD, "L7", gates=("rounding",)) as case:
        found = list(compare_origin.optimized_forms(case, SigLipVisionModel.from_hf(case.source)))
    assert [gate.name for gate in found] == [
        f"rounding float32, {engine}" for engine in ("packed", "packed-gelu", "onnxruntime")
    ]
    assert all(gate.passed and gate.checked == 2 for gate in found)
    told = capsys.readouterr().err
    assert "openvino is not judged on the odd tower: it is not installed" in told
    assert "compiled is not judged on the odd tower: it is for GPUs" in told
