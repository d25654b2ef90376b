"""Tests of the self-test's examination of entrances."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from scripts.selftest import catalog
from scripts.selftest.examination import examine_entrances, make_entrance_models
from siglip_port.parity.siglip.entrances.subject import Expected

BY_NAME = {mutant.name: mutant for mutant in catalog.MUTANTS}


@pytest.fixture(scope="module")
def entrance_models() -> Iterator[list[Expected]]:
    with make_entrance_models() as models:
        yield models


def test_mutant_is_detected_and_located(entrance_models: list[Expected]) -> None:
    mutant = BY_NAME["pooling_attention_inverted"]  # visible on NaFlex models only
    result = examine_entrances(mutant, entrance_models)
    assert result.passed
    assert list(result.detections) == ["interface"]
    assert not examine_entrances(replace(mutant, patch=None), entrance_models).detected


def test_other_location_is_false(entrance_models: list[Expected]) -> None:
    mutant = replace(BY_NAME["attention_maps_transposed"], locations="hidden_states")
    result = examine_entrances(mutant, entrance_models, stops=True)
    assert result.detected
    assert result.false_locations == ["interface: attention_maps"]
    assert not result.passed
