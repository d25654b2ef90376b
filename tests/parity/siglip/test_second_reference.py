from __future__ import annotations

import re
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from siglip_port import SigLipVisionConfig, SigLipVisionModel
from siglip_port.parity.siglip import second_reference, second_reference_script
from siglip_port.parity.siglip.cases import random_case
from siglip_port.parity.siglip.reference import VERSION, Reference, hf_config
from siglip_port.parity.siglip.taps import siglip_taps
from tests.helpers.checkpoints import ODD, SMALL

ERF = replace(SMALL, hidden_act="gelu")  # timm uses this activation for every checkpoint
REFERENCE = f"reference (transformers {VERSION})"


def exact_gelu(package: str, prefix: str = "") -> str:
    """Pattern for the first difference due to timm's activation."""
    point = "mlp.fc2:input"
    return (
        rf"first at encoder\.layers\.0\.{point} \({package}: {prefix}blocks\.0\.{point}\): "
        r"looks like: exact \(erf\) GELU instead of tanh GELU"
    )


def triangulate(name: str, config: SigLipVisionConfig, broken: str = "") -> tuple[list[str], str]:
    """Return the table and the verdict; `broken` is the side with a wrong eps."""
    with random_case(config, "N1") as case:
        port = SigLipVisionModel.from_hf(case.source)
        assert isinstance(case.reference, Reference)
        norms = {
            "port": port.transformer.encoder.encoder_blocks[1].layer_norm2,
            "reference": case.reference.model.encoder.layers[1].layer_norm2,
        }
        if broken:
            norm = norms[broken]
            assert isinstance(norm, nn.LayerNorm)
            norm.eps = 1e-3
        *table, sentence = second_reference.triangulate(name, case, port).text.splitlines()
    print("", *table, sentence, sep="\n")
    return table, sentence


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder for temporary files during a test."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the script in this process, which saves importing torch and timm each time."""

    def run_script(name: str, command: list[str], log: Path) -> None:
        package, folder = command[-2:]
        second_reference_script.main(package, Path(folder))

    monkeypatch.setattr(second_reference, "run_script", run_script)


def test_timm_gelu_is_located(scratch: Path) -> None:
    table, sentence = triangulate("timm", ODD)
    assert table[0].split() == ["in", "float64", "tokens", "pooled"]
    assert [line.split("  ")[0].split(" 1.0")[0] for line in table[1:]] == [
        f"{REFERENCE} - port",
        f"{REFERENCE} - timm",
        "port - timm",
    ]
    assert len({line.rindex("  ") for line in table}) == 1
    distances = r"tokens \d\.\de-04, pooled \d\.\de-04"
    assert re.fullmatch(
        rf"timm [\d.]+ is the odd one out: {distances} from both others; {exact_gelu('timm')}",
        sentence,
    )
    assert not list(scratch.iterdir())


@pytest.mark.usefixtures("in_this_process")
def test_broken_port_is_identified() -> None:
    _, sentence = triangulate("timm", ERF, broken="port")
    assert sentence.startswith("the port is the odd one out: tokens ")
    assert sentence.endswith(" from both others")


@pytest.mark.usefixtures("in_this_process")
def test_broken_reference_is_identified_and_located() -> None:
    _, sentence = triangulate("timm", ERF, broken="reference")
    assert sentence.startswith(f"the {REFERENCE} is the odd one out: tokens ")
    assert sentence.endswith(
        "first at encoder.layers.1.layer_norm2 (timm: blocks.1.norm2): "
        "looks like: eps 1e-06 instead of 0.001"
    )


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("pooling_head", [True, False])
def test_agreement_of_all_three(pooling_head: bool) -> None:
    table, sentence = triangulate("timm", replace(ERF, pooling_head=pooling_head))
    assert re.fullmatch(r"all three agree: at most \d\.\de-1[3-6] apart", sentence)
    assert ("pooled" in table[0]) == pooling_head


def test_every_tap_exists_in_timm() -> None:
    trunk = second_reference_script.make_trunk(hf_config(SMALL).to_dict())
    modules = dict(trunk.named_modules())
    for point in siglip_taps(pooling_head=True):
        location = second_reference_script.rename(point.replace("{}", "2"))
        assert location.partition(":")[0] in modules, location


FLOAT32_NOTE = " (W computes the softmax in float32"


@pytest.mark.parametrize(
    ("distances", "is_float64", "sentence"),
    [
        ((0.0, 1e-15, 1e-15), True, "all three agree: at most 1.0e-15 apart"),
        ((1e-4, 1e-4, 1e-15), True, "the R is the odd one out: tokens 1.0e-04 from both others"),
        ((1e-4, 1e-15, 1e-4), True, "the P is the odd one out: tokens 1.0e-04 from both others"),
        ((1e-15, 1e-4, 1e-4), True, "W is the odd one out: tokens 1.0e-04 from both others"),
        ((1e-4, 1e-4, 1e-4), True, "all three differ"),
        (
            (float("inf"), 1e-15, float("inf")),
            True,
            "the P is the odd one out: tokens inf from both others",
        ),
        ((1e-15, 5e-8, 5e-8), True, "W is the odd one out: tokens 5.0e-08 from both others"),
        ((1e-15, 5e-8, 5e-8), False, f"all three agree, W to 5.0e-08{FLOAT32_NOTE}"),
        (
            (1e-4, 5e-8, 1e-4),
            False,
            f"the P is the odd one out: tokens 1.0e-04 from both others{FLOAT32_NOTE}",
        ),
        (
            (1e-8, 5e-8, 5e-8),
            False,
            f"no odd one out: R and P differ, and the third agrees with both{FLOAT32_NOTE}",
        ),
    ],
)
def test_verdict(distances: tuple[float, float, float], is_float64: bool, sentence: str) -> None:
    pairs = (("R", "P"), ("R", "W"), ("P", "W"))
    by_pair = {pair: {"tokens": distance} for pair, distance in zip(pairs, distances, strict=True)}
    verdict = second_reference.verdict(by_pair, "W", is_float64=is_float64)
    assert verdict.startswith(sentence)


@pytest.mark.parametrize(
    "name", ["", "keras", "transformers", "transformers==", "timm>=1", "timm==--help", "timm "]
)
def test_unknown_second_reference(name: str) -> None:
    message = r"^--second-ref must be timm or open_clip, .* or transformers==VERSION, got '"
    with pytest.raises(ValueError, match=message):
        second_reference.parse(name)


def test_failed_script(scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit('no such encoder')")
    monkeypatch.setattr(second_reference, "SCRIPT", script)
    message = (
        r"^--second-ref timm: `.*script\.py timm .*` exited with code 1; end of its output:\n"
        r"no such encoder\ncheck that the version exists"
    )
    with pytest.raises(RuntimeError, match=message):
        triangulate("timm", SMALL)
    assert not list(scratch.iterdir())


def test_script_timeout(scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "script.py"
    script.write_text("import time; time.sleep(99)")
    monkeypatch.setattr(second_reference, "SCRIPT", script)
    monkeypatch.setattr(second_reference, "TIMEOUT", 0.5)
    with pytest.raises(RuntimeError, match=r"` timed out after 0\.5 s; end of its output:"):
        triangulate("timm", SMALL)
    assert not list(scratch.iterdir())


def test_other_releases_need_uv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(RuntimeError, match=r"^--second-ref transformers==4\.57\.6 needs uv to "):
        triangulate("transformers==4.57.6", SMALL)


@pytest.mark.versions
def test_open_clip() -> None:
    _, sentence = triangulate("open_clip", ODD)
    assert re.match(r"open_clip [\d.]+ \(timm [\d.]+\) is the odd one out: tokens ", sentence)
    assert re.search(exact_gelu("open_clip", r"trunk\."), sentence)
    _, sentence = triangulate("open_clip", replace(ERF, pooling_head=False))
    assert sentence.startswith("all three agree: at most ")


@pytest.mark.versions
@pytest.mark.parametrize("release", ["4.57.6", "5.5.4"])
def test_other_release_of_reference(release: str) -> None:
    name = f"transformers=={release}"
    assert triangulate(name, ODD)[1].startswith("all three agree: at most ")
    _, sentence = triangulate(name, ODD, broken="reference")
    assert sentence.startswith(f"the {REFERENCE} is the odd one out: ")
    location = "vision_model.encoder.layers.1.layer_norm2"
    assert sentence.endswith(
        f"first at encoder.layers.1.layer_norm2 (transformers: {location}): "
        "looks like: eps 1e-06 instead of 0.001"
    )


@pytest.mark.versions
def test_release_with_float32_softmax() -> None:
    _, sentence = triangulate("transformers==4.40.2", ODD)
    assert re.match(
        r"all three agree, transformers 4\.40\.2 to \d\.\de-0[78] "
        r"\(transformers 4\.40\.2 computes the softmax in float32",
        sentence,
    )


@pytest.mark.versions
def test_nonexistent_release() -> None:
    message = r"--second-ref timm==0\.0\.99: .* exited with code 1"
    with pytest.raises(RuntimeError, match=message):
        triangulate("timm==0.0.99", SMALL)
