from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from siglip_port.parity import randomise
from siglip_port.parity.hints import explain, explain_output, explain_weight


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("eps", [2.5e-7, 1e-5, 1e-3, 0.0])
def test_an_eps_is_fitted(eps: float) -> None:
    norm = nn.LayerNorm(32, eps=1e-6).double()
    randomise(norm)
    x = normal(2, 5, 32)
    truth = norm(x)
    norm.eps = eps
    value, norm.eps = norm(x), 1e-6
    assert (
        explain(nn.ModuleDict({"norm": norm}), "norm", x, {"norm": truth}, value)
        == f"eps {eps:.3g} instead of 1e-06"
    )


def test_nothing_is_said_of_what_is_unknown() -> None:
    """A hint is no guess: what is merely near gets none."""
    norm, linear = nn.LayerNorm(32).double(), nn.Linear(32, 32).double()
    randomise(norm)
    randomise(linear)
    x = normal(2, 5, 32)
    for name, module in (("norm", norm), ("linear", linear)):
        truth = module(x)
        value = truth * (1 + 1e-3 * normal(2, 5, 32, seed=1))
        assert explain(nn.ModuleDict({name: module}), name, x, {name: truth}, value) == ""


def test_linears() -> None:
    both = nn.ModuleDict({"one": nn.Linear(6, 6), "other": nn.Linear(6, 6)}).double()
    randomise(both)
    one, other = both["one"], both["other"]
    assert isinstance(one, nn.Linear)
    x = normal(2, 5, 6)
    for value, expected in [
        (x @ one.weight.T, "no bias"),
        (x @ one.weight + one.bias, "weight transposed"),
        (other(x), "it has the weights of other"),
        (x @ one.weight.bfloat16().double().T + one.bias, "weight rounded to bfloat16"),
        (one(x.half().double()), "its input rounded to float16"),
        (one(x).flip(1), "tokens reversed"),
        (one(x).roll(1, 2), "features shifted by 1"),
        (one(x) * 1.5, "scaled by 1.5"),
        (one(x).float().double(), "cast to float32"),
        (one(x) * 0, "all zero"),
        (one(x) / 0, "not finite"),
        (one(x)[:, :4], "its shape is [2, 4, 6], expected [2, 5, 6]"),
    ]:
        assert explain(both, "one", x, {"one": one(x)}, value.detach()) == expected


def test_outputs() -> None:
    truth = normal(3, 16)
    assert (
        explain_output(truth / truth.norm(dim=-1, keepdim=True), truth)
        == "every vector scaled to length 1"
    )
    assert explain_output(truth.flip(0), truth) == "pictures reversed"
    assert explain_output(truth[:, :3], truth) == "its shape is [3, 3]"
    assert explain_output(normal(3, 16, seed=1), truth) == ""


def test_weights() -> None:
    tensors = {"a": normal(6, 6).float(), "b": normal(6, 6, seed=1).float()}
    a = tensors["a"]
    truncated = a.clone()
    truncated[4:] = 0
    for value, expected in [
        (a * 0, "all zero: not loaded?"),
        (tensors["b"], "it is b"),
        (a.T, "transposed"),
        (a.bfloat16().float(), "rounded to bfloat16"),
        (truncated, "12 elements are zero: a truncated file?"),
        (a.flip(0), "the same rows in another order"),
        (a.flip(1), "the same numbers in another order"),
        (a * 2, "scaled by 2"),
        (a + tensors["b"], ""),
    ]:
        assert explain_weight(value, "a", tensors) == expected
