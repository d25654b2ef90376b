from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from siglip_port import SigLipVisionModel
from siglip_port.parity import mutants
from siglip_port.parity.mutants import CATALOGUE, HARNESS, LEGAL, PLACES, is_guilty
from siglip_port.parity.mutation import edited, replaced
from siglip_port.parity.siglip.cases import ALL_GATES
from tests.helpers.checkpoints import SMALL, pixels


def test_a_changed_copy_leaves_the_package_as_it_is() -> None:
    before = {
        name: module for name, module in sys.modules.items() if name.startswith("siglip_port")
    }
    finders = list(sys.meta_path)
    with edited([("model", 'functools.partial(F.gelu, approximate="tanh")', "F.gelu")]) as modules:
        changed = modules["siglip_port.model"].SigLipVisionModel
        config = modules["siglip_port.config"].SigLipVisionConfig(**vars(SMALL))
        wrong = changed(config).eval()
    assert {
        name: module for name, module in sys.modules.items() if name.startswith("siglip_port")
    } == before
    assert sys.meta_path == finders
    right = SigLipVisionModel(SMALL).eval()
    wrong.load_state_dict(right.state_dict())
    x = pixels(SMALL).float()
    assert 1e-9 < (right(x) - wrong(x)).abs().max() < 1e-2
    assert changed is not SigLipVisionModel


def test_a_text_that_is_not_there_exactly_once_is_an_error() -> None:
    for old, times in (("no such text", 0), ("import", None)):
        with (
            pytest.raises(
                ValueError, match=f"holds this text {times or r'[0-9]+'} times, expected once"
            ),
            edited([("model", old, "")]),
        ):
            pass
    assert sys.modules["siglip_port.model"].SigLipVisionModel is SigLipVisionModel


def test_every_change_of_the_catalogue_finds_its_text_once() -> None:
    """In milliseconds what the self-test would tell after minutes.

    Code moved on and a mutant of it did not.
    """
    package = Path(mutants.__file__).parents[1]
    for mutant in [*CATALOGUE, *LEGAL, *HARNESS]:
        texts: dict[str, str] = {}
        for file, old, new in mutant.edits:
            text = texts.get(file) or (package / f"{file}.py").read_text()
            texts[file] = replaced(text, old, new, f"{file}.py of {mutant.name}")
        for file, text in texts.items():
            compile(text, file, "exec")


def test_the_catalogue_is_well_formed() -> None:
    everything = [*CATALOGUE, *LEGAL, *HARNESS]
    names = [mutant.name for mutant in everything]
    assert len(CATALOGUE) >= 160
    assert sorted(set(names)) == sorted(names)
    for mutant in CATALOGUE:
        assert mutant.gate in ("pixels", *ALL_GATES), mutant.name
        assert mutant.guilty, mutant.name
        assert mutant.what, mutant.name
        assert mutant.edits or mutant.change or mutant.pixels, mutant.name
        for word in mutant.guilty.split():
            place = word.rpartition(".")[2]
            known = place in PLACES or word in ("model", "pooling_head") or word in vars(SMALL)
            assert known, (mutant.name, word)
    public = [m for m in CATALOGUE if re.search(r"[\w.-]+/[\w.-]+#\d+", m.source)]
    assert len(public) > 90
    shown = {mutant.name for mutant in (*CATALOGUE, *LEGAL)}
    assert all(set(mutant.guilty.split()) <= shown for mutant in HARNESS)
    assert all(mutant.kind == "legal" and not mutant.gate for mutant in LEGAL)


def test_who_is_guilty() -> None:
    assert is_guilty("encoder.layers.7.layer_norm1", "ln1 q")
    assert is_guilty("encoder.layers.5.mlp.fc1.bias", "5.fc1")
    assert not is_guilty("encoder.layers.4.mlp.fc1.bias", "5.fc1")
    assert not is_guilty("encoder.layers.5.layer_norm1:input", "ln1")
    assert is_guilty("encoder.layers.10", "out")
    assert not is_guilty("encoder.layers.10.mlp", "out")
    assert is_guilty("head.attention.in_proj_weight", "head-k")
    assert is_guilty("layer_norm_eps", "layer_norm_eps")
    assert not is_guilty("tokens", "pooled")


def test_numbers_are_rounded_as_the_formats_do() -> None:
    x = torch.tensor([1 + 2**-10, 1 + 2**-12, -3.0, 1e-30])
    assert torch.equal(
        mutants.tf32(x), torch.tensor([1 + 2**-10, 1.0, -3.0, float(mutants.tf32(x[3:]))])
    )
    assert abs(float(mutants.tf32(x[3:])) / 1e-30 - 1) < 2**-11
    rows = torch.tensor([[127.0, 1.4], [0.5, -1.27]])
    torch.testing.assert_close(mutants.int8(rows), torch.tensor([[127.0, 1.0], [0.5, -1.27]]))
