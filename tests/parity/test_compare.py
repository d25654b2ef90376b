"""`compare` passes equal models, fails different ones, and restores both sides."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from siglip_port import MLP, EncoderBlock, SigLipVisionModel
from siglip_port.parity import Comparison, assert_parity, compare
from siglip_port.parity.siglip import cases, reference
from siglip_port.parity.siglip.taps import siglip_taps
from tests.helpers.checkpoints import ODD, SMALL, MakeCheckpoint, pixels

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Pair:
    """Reference and port of one checkpoint; tests break the port."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.reference: nn.Module = reference.load(folder, pooling_head=True, dtype=dtype).model
        self.port = SigLipVisionModel.from_hf(folder, dtype=dtype)

    def block(self, i: int = 5) -> EncoderBlock:
        block = self.port.transformer.encoder.encoder_blocks[i]
        assert isinstance(block, EncoderBlock)
        return block

    def compare(self, inputs: Tensor | None = None) -> Comparison:
        if inputs is None:
            inputs = pixels(ODD)
        return compare(
            self.reference,
            self.port,
            inputs.to(self.dtype),
            siglip_taps(True),
            call_reference=reference.outputs,
            call_port=cases.port_outputs,
            weights=cases.tensors_by_reference_name,
        )

    def compare_outputs(self) -> Comparison:
        """Compare outputs only, without taps and weights."""
        return compare(
            self.reference,
            self.port,
            pixels(ODD).to(self.dtype),
            call_reference=reference.outputs,
            call_port=cases.port_outputs,
        )


@pytest.fixture
def pair(odd_checkpoint: Path) -> Pair:
    return Pair(odd_checkpoint)


@pytest.fixture
def restored_threads() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


def check_no_false_alarm(folder: Path, seed: int, dtype: torch.dtype, threads: int) -> None:
    reference.write_random_checkpoint(folder, ODD, seed)
    torch.set_num_threads(threads)
    comparison = Pair(folder, dtype).compare(pixels(ODD, seed=seed))
    assert comparison.equal, comparison
    names = ["environment", "weights", "sensitivity", "numerics", "gradients", "calls"]
    if dtype != torch.float64:
        names.append(f"rounding {str(dtype)[6:]}")
    assert [gate.name for gate in comparison.sections[0].gates] == names


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_false_alarm(tmp_path: Path, dtype: torch.dtype) -> None:
    check_no_false_alarm(tmp_path, seed=0, dtype=dtype, threads=1)


@pytest.mark.usefixtures("restored_threads")
def test_no_false_alarm_with_two_threads(tmp_path: Path) -> None:
    check_no_false_alarm(tmp_path, seed=1, dtype=torch.float32, threads=2)


@pytest.mark.slow
@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_false_alarm_on_many_weights(
    tmp_path: Path, seed: int, dtype: torch.dtype, threads: int
) -> None:
    check_no_false_alarm(tmp_path, seed, dtype, threads)


def test_both_sides_are_restored(pair: Pair) -> None:
    pair.port.requires_grad_(False)

    def state_of_parameters() -> list[tuple[int, torch.dtype, bool]]:
        return [
            (parameter.data_ptr(), parameter.dtype, parameter.requires_grad)
            for side in (pair.reference, pair.port)
            for parameter in side.parameters()
        ]

    before = state_of_parameters()
    inputs = pixels(ODD).float()
    original_inputs = inputs.clone()
    random_state = torch.get_rng_state()
    assert pair.compare(inputs).equal
    assert state_of_parameters() == before
    assert torch.equal(inputs, original_inputs)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.is_grad_enabled()
    for part in pair.port.modules():
        assert not part._forward_hooks
        assert not part._forward_pre_hooks


def test_verdict_has_location_error_and_hint(pair: Pair) -> None:
    pair.block().layer_norm2.eps = 3.7e-6
    comparison = pair.compare()
    assert not comparison.equal
    assert re.match(
        r"DIFFERENT \(weights as given\): numerics: encoder\.layers\.5\.layer_norm2 \(port: "
        r"transformer\.encoder\.encoder_blocks\.5\.layer_norm2\): differs in float64, bound 1e-10, "
        r"relative error [\d.]+e-0[678]; looks like: eps 3.7e-06 instead of 1e-06",
        comparison.verdict,
    )
    assert places(comparison, "numerics") == ["encoder.layers.5.layer_norm2"]


def places(comparison: Comparison, gate_name: str) -> list[str]:
    """Locations of the findings of a gate."""
    return [finding.reference for _, gate, finding in comparison.findings if gate.name == gate_name]


def check_parity(pair: Pair) -> None:
    assert_parity(
        pair.reference,
        pair.port,
        pixels(ODD).float(),
        siglip_taps(True),
        call_reference=reference.outputs,
        call_port=cases.port_outputs,
        weights=cases.tensors_by_reference_name,
    )


def test_assert_parity_fails_with_verdict(pair: Pair) -> None:
    pair.block().layer_norm2.eps = 3.7e-6
    comparison = pair.compare()
    with pytest.raises(AssertionError) as error:
        check_parity(pair)
    # The summary of pytest shows the first line.
    assert str(error.value).splitlines() == [comparison.verdict, *comparison.lines()]
    assert comparison.verdict.startswith("DIFFERENT")


def test_assert_parity_passes_equal_models(pair: Pair) -> None:
    check_parity(pair)


def test_port_that_raises_is_different(pair: Pair) -> None:
    pair.block().mlp.fc1 = nn.Linear(3, 3).eval()
    comparison = pair.compare()
    assert comparison.verdict.startswith(
        "DIFFERENT (weights as given): weights: encoder.layers.5.mlp.fc1."
    )
    assert (
        "numerics: encoder.layers.5.mlp.fc1: the port raises RuntimeError: addmm: mat1 and mat2 "
        "shapes cannot be multiplied (72x72 and 3x3)"
    ) in comparison.verdict
    assert [gate.name for _, gate in comparison.gates][-1] == "rounding float32"


def test_switches_of_torch_do_not_change_the_result(pair: Pair) -> None:
    with torch.no_grad():
        assert pair.compare().equal
    torch.set_float32_matmul_precision("high")
    try:
        comparison = pair.compare()
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert [cause.finding.message for cause in comparison.causes] == [
        "torch.get_float32_matmul_precision() is high before the port runs, expected highest"
    ]


def test_port_that_leaves_autocast_on(pair: Pair) -> None:
    """It does not reach the reference."""

    def enable_autocast(*_: object) -> None:
        torch.set_autocast_enabled("cpu", True)

    pair.port.transformer.post_layernorm.register_forward_hook(enable_autocast)
    comparison = pair.compare()
    assert comparison.verdict.startswith(
        "DIFFERENT (weights as given): environment: a run of the port changes "
        "torch.is_autocast_enabled('cpu') from False to True, and does not restore it"
    )
    assert not torch.is_autocast_enabled("cpu")


def test_two_bugs_are_located(pair: Pair) -> None:
    with torch.no_grad():
        pair.block(2).self_attn.out_proj.bias.zero_()
        pair.block(9).mlp.fc1.bias.zero_()
    assert places(pair.compare(), "numerics") == [
        "encoder.layers.2.self_attn.out_proj",
        "encoder.layers.9.mlp.fc1",
    ]


def test_key_bias_without_effect_on_outputs_is_compared(pair: Pair) -> None:
    with torch.no_grad():
        pair.block().self_attn.k_proj.bias.add_(1)
    assert pair.compare_outputs().equal
    comparison = pair.compare()
    (finding,) = [finding for _, _, finding in comparison.findings]
    assert finding.reference == "encoder.layers.5.self_attn.k_proj.bias"
    differing = {tap for _, gate in comparison.gates for tap in gate.differing_taps}
    assert differing == {"encoder.layers.5.self_attn.k_proj"}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_are_different(pair: Pair, value: float) -> None:
    pair.block().self_attn.register_forward_hook(lambda _, args, output: output * value)
    comparison = pair.compare()
    assert not comparison.equal
    assert comparison.findings[0][2].reference == "encoder.layers.5.self_attn"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_reference_weights_must_be_finite(pair: Pair, value: float) -> None:
    with torch.no_grad():
        for side in (pair.reference, pair.port):
            next(iter(side.parameters())).fill_(value)
    message = (
        r"the reference's weights contain NaN or Inf in float32 \([a-z_.]+\), expected finite "
        "values; use other weights or a wider dtype"
    )
    with pytest.raises(ValueError, match=message):
        pair.compare()


def test_overflow_in_narrow_dtype_raises(odd_checkpoint: Path) -> None:
    """If both overflow, infinity is not within an infinite bound."""
    pair = Pair(odd_checkpoint, torch.float16)
    with torch.no_grad():
        for side in (pair.reference, pair.port.transformer):
            side.get_parameter("post_layernorm.weight").fill_(6e4)
    with pytest.raises(ValueError, match=r"computes NaN or Inf in float16 \(post_layernorm\)"):
        pair.compare()


def test_reference_with_zero_outputs_raises(pair: Pair) -> None:
    with torch.no_grad():
        for parameter in [*pair.port.parameters(), *pair.reference.parameters()]:
            parameter.zero_()
    with pytest.raises(
        ValueError, match=r"the reference computes only zeros \(tokens\), which cannot show"
    ):
        pair.compare()


def test_constant_outputs_are_different(pair: Pair) -> None:
    with torch.no_grad():
        for side in (pair.reference, pair.port.transformer):
            side.get_parameter("embeddings.patch_embedding.weight").zero_()
    message = "sensitivity: tokens: same output for every example, so equality proves nothing"
    assert message in str(pair.compare())


def test_reference_must_be_float64_throughout(odd_checkpoint: Path) -> None:
    pair = Pair(odd_checkpoint)
    loaded = reference.load(odd_checkpoint, pooling_head=True, dtype=torch.float32)
    loaded.model.set_attn_implementation("eager")
    pair.reference = loaded.model
    message = (
        r"does not compute in float64 throughout \(tokens has rounding of .*e-0[678], expected"
    )
    with pytest.raises(ValueError, match=message):
        pair.compare()


def test_single_example_raises(pair: Pair) -> None:
    with pytest.raises(
        ValueError, match="inputs must hold at least two examples along the first axis"
    ):
        pair.compare(pixels(ODD)[:1])


def test_output_names_must_agree(pair: Pair) -> None:
    message = (
        r"outputs differently \(last_hidden_state, output, pooler_output\); pass call_reference"
    )
    with pytest.raises(ValueError, match=message):
        compare(pair.reference, pair.port, pixels(ODD).float())


def test_unknown_tap_raises(pair: Pair) -> None:
    message = r"tap 'post_layernorm': 'post_ln': the port has no module 'post_ln'"
    with pytest.raises(ValueError, match=message):
        compare(pair.reference, pair.port, pixels(ODD).float(), {"post_layernorm": "post_ln"})


def test_missing_output(odd_checkpoint: Path) -> None:
    pair = Pair(odd_checkpoint)
    pair.port = SigLipVisionModel.from_hf(odd_checkpoint, pooling_head=False)
    assert "pooled: the port does not return this output" in str(pair.compare_outputs())


def test_output_with_other_shape(pair: Pair) -> None:
    assert pair.port.pooling_head is not None
    pair.port.pooling_head.register_forward_hook(lambda _, inputs, output: output[:, :-1])
    comparison = pair.compare()
    assert not comparison.equal
    assert "[2, 71]" in str(comparison)


def without_modules(mlp: MLP, x: Tensor) -> Tensor:
    """Compute an MLP without calling its Linears."""
    hidden = mlp.activation(x @ mlp.fc1.weight.T + mlp.fc1.bias)
    return hidden @ mlp.fc2.weight.T + mlp.fc2.bias


def test_fused_modules_are_equal_and_listed_in_verdict(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MLP, "forward", without_modules)
    comparison = pair.compare()
    assert comparison.equal, comparison
    message = "compared at later taps only: encoder.layers.0.mlp.fc1, encoder.layers.0.mlp.fc2"
    assert message in comparison.verdict


def test_float32_step_differs_from_bug_of_its_size(pair: Pair) -> None:
    norm = pair.block().layer_norm1
    norm.register_forward_hook(lambda _, args, output: output.float().to(output.dtype))
    comparison = pair.compare()
    assert comparison.equal, comparison
    message = "float32 at every dtype, judged by the rounding gate: encoder.layers.5.layer_norm1"
    assert message in comparison.verdict
    norm.register_forward_hook(lambda _, args, output: output * (1 + 1e-7))  # a bug of that size
    assert not pair.compare().equal


def test_model_without_pooling_head(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint(SMALL)
    comparison = compare(
        reference.load(folder, pooling_head=False, dtype=torch.float32).model,
        SigLipVisionModel.from_hf(folder, pooling_head=False),
        pixels(SMALL).float(),
        siglip_taps(False),
        call_reference=reference.outputs,
        call_port=cases.port_outputs,
    )
    assert comparison.equal, comparison
