from __future__ import annotations

import re
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from siglip_port import SigLipVisionConfig, SigLipVisionModel
from siglip_port.parity.siglip import cases as proof
from siglip_port.parity.siglip import second_reference as witness
from siglip_port.parity.siglip import second_reference_script as witness_script
from siglip_port.parity.siglip.reference import VERSION, hf_config
from siglip_port.parity.siglip.taps import siglip_taps
from tests.helpers.checkpoints import ODD, SMALL

ERF = replace(SMALL, hidden_act="gelu")  # the activation that timm has whatever the checkpoint says
REFERENCE = f"reference (transformers {VERSION})"
EXACT_GELU = r"first at encoder\.layers\.0\.mlp\.fc2:input \({}: {}blocks\.0\.mlp\.fc2:input\): looks like: exact \(erf\) GELU"


def ask(name: str, config: SigLipVisionConfig, broken: str = "") -> tuple[list[str], str]:
    """The table, and the sentence.

    With one eps of the `port` or of the `reference` as it must not be.
    """
    with proof.random_case(config, "N1") as case:
        port = SigLipVisionModel.from_hf(case.source)
        norms = {
            "port": port.transformer.encoder.encoder_blocks[1].layer_norm2,
            "reference": case.reference.model.encoder.layers[1].layer_norm2,
        }
        if broken:
            assert isinstance(norms[broken], nn.LayerNorm)
            norms[broken].eps = 1e-3
        *table, sentence = witness.ask(name, case, port).splitlines()
    print("", *table, sentence, sep="\n")
    return table, sentence


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go meanwhile."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


def test_timm_is_the_odd_one_out_and_its_exact_gelu_is_called_by_name(scratch: Path) -> None:
    table, sentence = ask("timm", ODD)
    assert table[0].split() == ["in", "float64", "tokens", "pooled"]
    assert [line.split("  ")[0].split(" 1.0")[0] for line in table[1:]] == [
        f"{REFERENCE} - port",
        f"{REFERENCE} - timm",
        "port - timm",
    ]
    assert len({line.rindex("  ") for line in table}) == 1
    figures = r"tokens \d\.\de-04, pooled \d\.\de-04"
    where = EXACT_GELU.format("timm", "")
    assert re.fullmatch(
        rf"timm [\d.]+ is the odd one out: {figures} from both others; {where}", sentence
    )
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("broken", ["port", "reference"])
def test_who_is_wrong_is_named(broken: str) -> None:
    _, sentence = ask("timm", ERF, broken)
    name = {"port": "port", "reference": REFERENCE}[broken]
    assert sentence.startswith(f"the {name} is the odd one out: tokens ")
    where = "first at encoder.layers.1.layer_norm2 (timm: blocks.1.norm2): looks like: eps 1e-06 instead of 0.001"
    assert sentence.endswith(where if broken == "reference" else " from both others")


@pytest.mark.parametrize(
    "config", [ERF, replace(ERF, pooling_head=False)], ids=["head", "headless"]
)
def test_where_nothing_differs_all_three_agree(config: SigLipVisionConfig) -> None:
    table, sentence = ask("timm", config)
    assert re.fullmatch(r"all three agree: at most \d\.\de-1[3-6] apart", sentence)
    assert ("pooled" in table[0]) == config.pooling_head


def test_timm_has_a_place_for_every_tap() -> None:
    modules = dict(witness_script.make_trunk(hf_config(SMALL).to_dict()).named_modules())
    places = [
        witness_script.rename(point.replace("{}", "2")) for point in siglip_taps(pooling_head=True)
    ]
    assert [place for place in places if place.partition(":")[0] not in modules] == []


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
        ((1e-15, 5e-8, 5e-8), False, "all three agree, W to 5.0e-08 only (W has a float32 softmax"),
        (
            (1e-4, 5e-8, 1e-4),
            False,
            "the P is the odd one out: tokens 1.0e-04 from both others (W has a float32",
        ),
        (
            (1e-8, 5e-8, 5e-8),
            False,
            "nobody is the odd one out: R and P differ, and the third agrees with both (W has",
        ),
    ],
)
def test_verdict(distances: tuple[float, float, float], is_float64: bool, sentence: str) -> None:
    pairs = (("R", "P"), ("R", "W"), ("P", "W"))
    told = {pair: {"tokens": distance} for pair, distance in zip(pairs, distances, strict=True)}
    assert witness.verdict(told, "W", is_float64=is_float64)[: len(sentence)] == sentence


@pytest.mark.parametrize(
    "name", ["", "keras", "transformers", "transformers==", "timm>=1", "timm==--help", "timm "]
)
def test_an_unknown_witness(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"no witness .*; known are timm and open_clip, .*transformers==4\.57\.6"
    ):
        witness.parse(name)


def test_a_witness_that_fails(
    scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit('no such tower')")
    monkeypatch.setattr(witness, "SCRIPT", script)
    expected = r"timm could not be asked: `.*script\.py timm .*` ended with exit status 1\. .*:\nno such tower\nIf it"
    with pytest.raises(RuntimeError, match=expected):
        ask("timm", SMALL)
    script.write_text("import time; time.sleep(99)")
    monkeypatch.setattr(witness, "TIMEOUT", 0.5)
    with pytest.raises(RuntimeError, match=r"was not done after 0\.5 s"):
        ask("timm", SMALL)
    assert not list(scratch.iterdir())


def test_without_uv_no_other_release_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(RuntimeError, match=r"to ask transformers==4\.57\.6, uv is needed"):
        ask("transformers==4.57.6", SMALL)


@pytest.mark.versions
def test_open_clip() -> None:
    _, sentence = ask("open_clip", ODD)
    assert re.match(r"open_clip [\d.]+ \(timm [\d.]+\) is the odd one out: tokens ", sentence)
    assert re.search(EXACT_GELU.format("open_clip", r"trunk\."), sentence)
    assert ask("open_clip", replace(ERF, pooling_head=False))[1].startswith(
        "all three agree: at most "
    )


@pytest.mark.versions
@pytest.mark.parametrize("release", ["4.57.6", "5.5.4"])
def test_another_release_of_the_reference(release: str) -> None:
    assert ask(f"transformers=={release}", ODD)[1].startswith("all three agree: at most ")
    _, sentence = ask(f"transformers=={release}", ODD, broken="reference")
    assert sentence.startswith(f"the {REFERENCE} is the odd one out: ")
    where = "first at encoder.layers.1.layer_norm2 (transformers: vision_model.encoder.layers.1.layer_norm2): "
    assert sentence.endswith(f"{where}looks like: eps 1e-06 instead of 0.001")


@pytest.mark.versions
def test_a_release_whose_softmax_is_always_float32() -> None:
    _, sentence = ask("transformers==4.40.2", ODD)
    agrees = r"all three agree, transformers 4\.40\.2 to \d\.\de-0[78] only \(transformers 4\.40\.2 has a float32 softmax"
    assert re.match(agrees, sentence)


@pytest.mark.versions
def test_a_release_that_does_not_exist() -> None:
    with pytest.raises(
        RuntimeError, match=r"timm==0\.0\.99 could not be asked: .* ended with exit status 1"
    ):
        ask("timm==0.0.99", SMALL)
