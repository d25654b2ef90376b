"""Tests of the catalog: every mutant changes something and is undone."""

from __future__ import annotations

import copy
import re
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from scripts.selftest.catalog import EQUIVALENT, HARNESS, MUTANTS
from scripts.selftest.catalog.edits import quantize_to_int8, round_to_tf32
from scripts.selftest.mutant import LOCATIONS, HarnessMutant, Mutant
from siglip_port import SigLipVisionModel
from siglip_port.parity import randomize
from siglip_port.parity.siglip.cases import ALL_GATES
from tests.helpers.checkpoints import SMALL

ALL: list[Mutant | HarnessMutant] = [*MUTANTS, *EQUIVALENT, *HARNESS]


PLACES = ("model", "pooling_head", "forward")
"""Locations that are no points of the reference."""


def test_catalog_is_well_formed() -> None:
    assert (len(MUTANTS), len(EQUIVALENT), len(HARNESS)) == (385, 36, 18)
    names = [mutant.name for mutant in ALL]
    assert len(set(names)) == len(names)
    assert all(mutant.description for mutant in ALL)
    for mutant in MUTANTS:
        assert not mutant.is_equivalent, mutant.name
        assert mutant.gate in ("pixels", *ALL_GATES), mutant.name
        assert mutant.locations, mutant.name
        assert (mutant.patch is None) != (mutant.edit is None), mutant.name
        for word in mutant.locations.split():
            key = word.rpartition(".")[2]
            known = key in LOCATIONS or word in PLACES or word in vars(SMALL)
            is_entrance = mutant.subject == "entrances"
            assert known or is_entrance, (mutant.name, word)
    public = [mutant for mutant in MUTANTS if re.search(r"[\w.-]+/[\w.-]+#\d+", mutant.source)]
    assert len(public) == 138
    assert all(mutant.is_equivalent and not mutant.gate for mutant in EQUIVALENT)
    for bug in HARNESS:
        assert set(bug.probes) <= {mutant.name for mutant in (*MUTANTS, *EQUIVALENT)}, bug.name


@pytest.fixture(scope="module")
def namespaces() -> dict[int, dict[str, object]]:
    """Namespaces that a patch can change: modules, classes and tables of the port."""
    contents: dict[int, Any] = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] != "siglip_port":
            continue
        contents[id(module)] = vars(module)
        for key, value in vars(module).items():
            if isinstance(value, type) and value.__module__.startswith("siglip_port"):
                contents[id(value)] = vars(value)
            elif isinstance(value, dict) and key.isupper():
                contents[id(value)] = value
    return contents


def snapshot(namespaces: dict[int, dict[str, object]]) -> dict[int, dict[str, int]]:
    """Return the identity of every object by namespace and name."""
    state = {}
    for owner, contents in namespaces.items():
        state[owner] = {key: id(value) for key, value in contents.items()}
    return state


@pytest.mark.parametrize("mutant", ALL, ids=lambda mutant: mutant.name)
def test_patches_change_something_and_are_undone(
    mutant: Mutant | HarnessMutant, namespaces: dict[int, dict[str, object]]
) -> None:
    before = snapshot(namespaces)
    with mutant.applied():
        during = snapshot(namespaces)
    assert (during != before) == (mutant.patch is not None)
    assert snapshot(namespaces) == before


def describe(model: nn.Module) -> dict[str, object]:
    """Return everything about a model that an edit can change."""
    state: dict[str, object] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        values = tensor.detach().numpy().tobytes()
        state[name] = (values, tensor.stride(), tensor.requires_grad)
    for name, module in model.named_modules(remove_duplicate=False):
        plain = {key: id(value) for key, value in vars(module).items() if key[0] != "_"}
        hooks = (len(module._forward_hooks), len(module._forward_pre_hooks))
        state[f"{name}:"] = (id(module), plain, hooks)
    return state


EDITING = [mutant for mutant in (*MUTANTS, *EQUIVALENT) if mutant.edit is not None]


@pytest.fixture(scope="module")
def model() -> SigLipVisionModel:
    config = replace(SMALL, num_encoder_blocks=11, num_attention_heads=8, embed_dim=32)
    model = SigLipVisionModel(config).eval()
    randomize(model)
    return model


@pytest.mark.parametrize("mutant", EDITING, ids=lambda mutant: mutant.name)
def test_edits_change_something(mutant: Mutant, model: SigLipVisionModel) -> None:
    edited = copy.deepcopy(model)
    before = describe(edited)
    assert describe(edited) == before
    assert mutant.edit is not None
    with torch.no_grad():
        mutant.edit(edited)
    assert describe(edited) != before


def test_rounding_matches_format() -> None:
    x = torch.tensor([1 + 2**-10, 1 + 2**-12, -3.0, 1e-30])
    rounded = round_to_tf32(x)
    assert torch.equal(rounded[:3], torch.tensor([1 + 2**-10, 1.0, -3.0]))
    assert abs(float(rounded[3]) / 1e-30 - 1) < 2**-11
    rows = torch.tensor([[127.0, 1.4], [0.5, -1.27]])
    torch.testing.assert_close(quantize_to_int8(rows), torch.tensor([[127.0, 1.0], [0.5, -1.27]]))
