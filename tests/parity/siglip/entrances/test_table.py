"""Tests of the entrances: the port passes, and every mutant is found where it is."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest
import torch
from torch import Tensor

from scripts.selftest import catalog
from scripts.selftest.catalog.entrances import PIXELS
from scripts.selftest.catalog.equivalent import EQUIVALENT
from scripts.selftest.mutant import Mutant
from siglip_port import SigLipVisionModel
from siglip_port.parity.results import Finding, GateResult
from siglip_port.parity.siglip.entrances.subject import Expected, Subject
from siglip_port.parity.siglip.entrances.table import ENTRANCES, check_entrance, check_entrances

BY_NAME = {entrance.name: entrance for entrance in ENTRANCES}
MUTANTS = [mutant for mutant in catalog.MUTANTS if mutant.subject == "entrances"]
FLOAT32_STEPS = [m for m in EQUIVALENT if m.name in ("float32_softmax", "float32_ln", "in_place")]


def entrances_of(mutant: Mutant) -> list[str]:
    """Return the entrances that a mutant breaks."""
    names = []
    for name in mutant.locations.split():
        names += ["ImageProcessor", "ImageProcessor(invalid)"] if name == PIXELS else [name]
    return names


def check_some(mutant: Mutant, expected: Expected, scratch: Path) -> list[Finding]:
    """Run a mutant through the entrances that it breaks."""
    findings = []
    names = entrances_of(mutant)
    with mutant.applied():
        port = mutant.load(expected.source, interpolation=expected.interpolation)
        for name in names:
            findings += check_entrance(BY_NAME[name], Subject(port, expected, scratch))
    return findings


@pytest.mark.parametrize("model", ["fixed", "naflex"])
def test_port_passes(model: str, request: pytest.FixtureRequest) -> None:
    gate = check_entrances(request.getfixturevalue(model))
    assert gate.passed, gate.findings[0]
    assert gate.name == "interface"
    assert gate.checked == len(ENTRANCES)


def test_every_entrance_has_a_mutant() -> None:
    broken = {name for mutant in MUTANTS for name in entrances_of(mutant)}
    assert broken == set(BY_NAME)


def test_entrances_follow_those_that_they_need() -> None:
    names: set[str] = set()
    for entrance in ENTRANCES:
        assert names.issuperset(entrance.needs), entrance.name
        names.add(entrance.name)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutants_are_found(
    mutant: Mutant, fixed: Expected, naflex: Expected, tmp_path: Path
) -> None:
    findings = check_some(mutant, fixed, tmp_path)
    if not findings:
        findings = check_some(mutant, naflex, tmp_path)
    assert {finding.port for finding in findings} <= set(mutant.locations.split())
    assert findings


@pytest.mark.parametrize("variant", FLOAT32_STEPS, ids=lambda variant: variant.name)
def test_equivalent_variants_pass(variant: Mutant, fixed: Expected) -> None:
    with variant.applied():
        gate = check_entrances(fixed, variant.load)
    assert gate.passed, gate.findings[0]


def check_with(
    monkeypatch: pytest.MonkeyPatch, expected: Expected, method: str, function: object
) -> GateResult:
    """Run all entrances with a method of the model replaced."""
    monkeypatch.setattr(SigLipVisionModel, method, function)
    return check_entrances(expected)


def test_entrance_that_raises(monkeypatch: pytest.MonkeyPatch, naflex: Expected) -> None:
    def fail(*_: object, **__: object) -> NoReturn:
        raise TypeError("unhashable type")

    gate = check_with(monkeypatch, naflex, "pooling_attention", fail)
    assert [str(finding) for finding in gate.findings] == [
        "head.attention (port: pooling_attention): raises TypeError: unhashable type"
    ]
    assert gate.checked == len(ENTRANCES)


def test_port_that_cannot_be_loaded(naflex: Expected) -> None:
    def load(*_: object, **__: object) -> NoReturn:
        raise KeyError("weight")

    gate = check_entrances(naflex, load)
    assert [str(finding) for finding in gate.findings] == [
        "from_pretrained (port: from_hf): raises KeyError: 'weight'"
    ]


def test_consequences_are_not_reported(monkeypatch: pytest.MonkeyPatch, naflex: Expected) -> None:
    pool = SigLipVisionModel.pool

    def double(port: SigLipVisionModel, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        return 2 * pool(port, tokens, mask)

    gate = check_with(monkeypatch, naflex, "pool", double)
    names = [finding.port for finding in gate.findings]
    assert names[0] == "pool"
    assert not {"embed", "embed_images", "optimize"} & set(names)
    assert "more checks of it fail" in gate.findings[0].message


def test_layers_must_be_a_tuple(monkeypatch: pytest.MonkeyPatch, naflex: Expected) -> None:
    def states(
        port: SigLipVisionModel, pixel_values: Tensor, layers: list[int], **_: object
    ) -> object:
        return (torch.zeros(2, 28, 40),)

    gate = check_with(monkeypatch, naflex, "attention_maps", states)
    assert gate.findings[0].port == "attention_maps"
    assert "the result is a tuple of 1, expected a tuple of 2" in gate.findings[0].message
