from __future__ import annotations

from siglip_port.parity.hints import explain_weight
from tests.parity.toy_models import float_noise


def test_weights() -> None:
    tensors = {"a": float_noise(6, 6), "b": float_noise(6, 6, seed=1)}
    a = tensors["a"]
    truncated = a.clone()
    truncated[4:] = 0
    for value, hint in [
        (a * 0, "all zeros (not loaded?)"),
        (tensors["b"], "same as b"),
        (a.T, "transposed"),
        (a.bfloat16().float(), "rounded to bfloat16"),
        (truncated, "12 elements are zero (truncated file?)"),
        (a.flip(0), "rows permuted"),
        (a.flip(1), "elements permuted"),
        (a * 2, "scaled by 2"),
        (a + tensors["b"], ""),
    ]:
        assert explain_weight(value, "a", tensors) == hint


def test_vectors() -> None:
    bias = float_noise(6)
    tensors = {"bias": bias}
    assert explain_weight(bias.flip(0), "bias", tensors) == "rows permuted"
    assert explain_weight(-bias, "bias", tensors) == "scaled by -1"
