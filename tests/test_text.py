"""Folding of parameter names by block."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from siglip_port.text import fold_blocks


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        (
            [f"encoder.layers.{i}.mlp.fc1.bias" for i in range(12)],
            ["encoder.layers.{0...11}.mlp.fc1.bias"],
        ),
        (
            [f"layers.{i}.layer_norm1.weight" for i in (5, 0, 1, 2)],
            ["layers.{0...2,5}.layer_norm1.weight"],
        ),
        (["a.{}.3.b", "a.{}.4.b", "{}"], ["a.{}.{3...4}.b", "{}"]),
        ([f"layers.{'9' * 5000}.x"], [f"layers.{'9' * 5000}.x"]),
        (["layers.7.mlp.fc2.bias", "head.probe"], ["layers.7.mlp.fc2.bias", "head.probe"]),
    ],
)
def test_fold_blocks(names: list[str], folded: list[str]) -> None:
    assert fold_blocks(names) == folded


@given(st.sets(st.integers(0, 60), min_size=1))
def test_fold_blocks_lossless(blocks: set[int]) -> None:
    (folded,) = fold_blocks(f"layers.{i}.mlp.fc1.bias" for i in sorted(blocks))
    text = folded.removeprefix("layers.").removesuffix(".mlp.fc1.bias").strip("{}")
    runs = [re.fullmatch(r"(\d+)(?:\.\.\.(\d+))?", run) for run in text.split(",")]
    unfolded = {i for run in runs if run for i in range(int(run[1]), int(run[2] or run[1]) + 1)}
    assert unfolded == blocks
