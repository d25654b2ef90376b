from __future__ import annotations

from siglip_port.parity.hints.guess import first_match
from siglip_port.parity.hints.sums import embedding_guesses, residual_guesses
from tests.parity.toy_models import double_noise


def test_embeddings() -> None:
    patches = double_noise(2, 8, 3, 3)
    table = double_noise(1, 9, 8, seed=1)
    tokens = patches.flatten(2).transpose(1, 2)
    columns = patches.transpose(2, 3).flatten(2).transpose(1, 2)
    transposed = table.unflatten(1, (3, 3)).transpose(1, 2).flatten(1, 2)
    exact = tokens + table
    for value, hint in [
        (tokens, "position embedding not added"),
        (tokens + 2 * table, "position embedding added twice"),
        (tokens + table[:, :1], "position 0 used for every token"),
        (tokens + table.roll(1, 1), "positions shifted by 1"),
        (tokens + transposed, "position grid transposed (x and y swapped)"),
        (columns + table, "patches in column-major order"),
        (tokens + 3 * table, ""),
    ]:
        assert first_match(embedding_guesses({"conv": patches}, exact), value, exact) == hint


def test_residual_connections() -> None:
    taps = {name: double_noise(2, 5, 8, seed=seed) for seed, name in enumerate("abc")}
    exact = taps["a"] + taps["c"]
    for value, hint in [
        (taps["a"], "c not added"),
        (taps["c"], "no residual connection from a"),
        (exact + taps["c"], "c added twice"),
        (taps["b"] + taps["c"], "residual connection from b instead of a"),
        (exact * 2, ""),
    ]:
        assert first_match(residual_guesses(taps, exact), value, exact) == hint


def test_no_hint_without_summands() -> None:
    taps = {name: double_noise(2, 5, 8, seed=seed) for seed, name in enumerate("abc")}
    assert not list(residual_guesses(taps, double_noise(2, 5, 8, seed=9)))
