"""`compare` must pass what is equal, fail what is not, leave both sides as they were, and refuse what is no truth."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from siglip_port import MLP, EncoderBlock, SigLipVisionModel
from siglip_port.parity import Comparison, assert_parity, compare
from siglip_port.parity.results import GateResult, Section
from siglip_port.parity.siglip import cases as proof
from siglip_port.parity.siglip import reference as references
from siglip_port.parity.siglip.taps import siglip_taps
from tests.helpers.checkpoints import ODD, SMALL, MakeCheckpoint, pixels


def block(model: SigLipVisionModel, i: int = 5) -> EncoderBlock:
    part = model.transformer.encoder.encoder_blocks[i]
    assert isinstance(part, EncoderBlock)
    return part


def sides(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    reference = references.load(folder, pooling_head=True, dtype=dtype)
    return reference.model, SigLipVisionModel.from_hf(folder, dtype=dtype)


def compared(
    reference: nn.Module, port: nn.Module, inputs: Tensor, dtype: torch.dtype = torch.float32
) -> Comparison:
    return compare(
        reference,
        port,
        inputs.to(dtype),
        siglip_taps(True),
        call_reference=references.outputs,
        call_port=proof.port_outputs,
        weights=proof.tensors_by_reference_name,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    references.write_random_checkpoint(folder, ODD)
    return folder


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_no_false_alarm(tmp_path: Path, seed: int, dtype: torch.dtype, threads: int) -> None:
    references.write_random_checkpoint(tmp_path, ODD, seed)
    torch.set_num_threads(threads)
    try:
        found = compared(*sides(tmp_path, dtype), pixels(ODD, seed=seed), dtype)
    finally:
        torch.set_num_threads(1)
    assert found.equal, found
    names = ["environment", "weights", "liveness", "semantics"]
    assert [gate.name for gate in found.sections[0].gates] == names + (
        [f"rounding {str(dtype)[6:]}"] * (dtype != torch.float64)
    )


def test_both_sides_are_given_back_as_they_were(folder: Path) -> None:
    reference, port = sides(folder)
    port.requires_grad_(False)

    def looks() -> list[tuple[int, torch.dtype, bool]]:
        return [
            (t.data_ptr(), t.dtype, t.requires_grad)
            for side in (reference, port)
            for t in side.parameters()
        ]

    before = looks()
    inputs = pixels(ODD).float()
    kept, state = inputs.clone(), torch.get_rng_state()
    assert compared(reference, port, inputs).equal
    assert looks() == before
    assert torch.equal(inputs, kept)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in port.modules())


def test_a_difference_has_an_address_a_size_and_a_hint(folder: Path) -> None:
    reference, port = sides(folder)
    block(port).layer_norm2.eps = 3.7e-6
    found = compared(reference, port, pixels(ODD))
    assert not found.equal
    assert re.match(
        r"DIFFERENT \(weights as given\): semantics: encoder\.layers\.5\.layer_norm2 \(port: "
        r"transformer\.encoder\."
        r"encoder_blocks\.5\.layer_norm2\): differs in float64, bound 1e-10, relative error "
        r"[\d.]+e-0[678]; "
        r"looks like: eps 3.7e-06 instead of 1e-06",
        found.verdict,
    )
    assert [f.reference for _, gate, f in found.findings if gate.name == "semantics"] == [
        "encoder.layers.5.layer_norm2"
    ]
    with pytest.raises(AssertionError, match=re.escape(found.verdict)):
        assert_parity(
            reference,
            port,
            pixels(ODD).float(),
            siglip_taps(True),
            call_reference=references.outputs,
            call_port=proof.port_outputs,
            weights=proof.tensors_by_reference_name,
        )


def test_two_faults_have_two_addresses(folder: Path) -> None:
    reference, port = sides(folder)
    with torch.no_grad():
        block(port, 2).self_attn.out_proj.bias.zero_()
        block(port, 9).mlp.fc1.bias.zero_()
    named = [
        f.reference
        for _, gate, f in compared(reference, port, pixels(ODD)).findings
        if gate.name == "semantics"
    ]
    assert named == ["encoder.layers.2.self_attn.out_proj", "encoder.layers.9.mlp.fc1"]


def test_a_bias_of_the_keys_is_noticed_although_no_output_shows_it(folder: Path) -> None:
    reference, port = sides(folder)
    with torch.no_grad():
        block(port).self_attn.k_proj.bias.add_(1)
    inputs = pixels(ODD).float()
    assert compare(
        reference, port, inputs, call_reference=references.outputs, call_port=proof.port_outputs
    ).equal
    found = compared(reference, port, inputs)
    assert {f.reference for _, _, f in found.findings} == {
        "encoder.layers.5.self_attn.k_proj",
        "encoder.layers.5.self_attn.k_proj.bias",
    }


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_equal_to_nothing(folder: Path, value: float) -> None:
    reference, port = sides(folder)
    block(port).self_attn.register_forward_hook(lambda _, args, out: out * value)
    found = compared(reference, port, pixels(ODD))
    assert not found.equal
    assert found.findings[0][2].reference == "encoder.layers.5.self_attn"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reference_that_is_not_finite_is_no_reference(folder: Path, value: float) -> None:
    reference, port = sides(folder)
    with torch.no_grad():
        for side in (reference, port):
            next(iter(side.parameters())).fill_(value)
    with pytest.raises(
        ValueError,
        match=r"the reference's weights hold NaN or infinity in float32, .* with: [a-z_.]+$",
    ):
        compared(reference, port, pixels(ODD))


def test_overflow_in_a_narrow_dtype_is_no_verdict(folder: Path) -> None:
    """Both overflow: infinity is not inside an infinite bound."""
    reference, port = sides(folder, torch.float16)
    with torch.no_grad():
        for side in (reference, port.transformer):
            side.post_layernorm.weight.fill_(6e4)
    with pytest.raises(ValueError, match=r"NaN or infinity in float16 \(post_layernorm\)"):
        compared(reference, port, pixels(ODD), torch.float16)


def test_two_dead_models_are_not_equal(folder: Path) -> None:
    reference, port = sides(folder)
    with torch.no_grad():
        for parameter in [*port.parameters(), *reference.parameters()]:
            parameter.zero_()
    with pytest.raises(ValueError, match=r"nothing but zeros \(tokens\): two dead models would"):
        compared(reference, port, pixels(ODD))


def test_two_models_that_give_the_same_for_everything_are_not_equal(folder: Path) -> None:
    reference, port = sides(folder)
    with torch.no_grad():
        for side in (reference, port.transformer):
            side.embeddings.patch_embedding.weight.zero_()
    found = compared(reference, port, pixels(ODD))
    assert (
        "liveness: tokens: it is the same for every input, so that agreement proves nothing"
        in str(found)
    )


def test_a_truth_must_be_float64_throughout(folder: Path) -> None:
    reference, port = sides(folder)
    reference.set_attn_implementation("eager")
    with pytest.raises(
        ValueError, match=r"is not float64 throughout \(tokens is rough to .*e-0[678]\)"
    ):
        compared(reference, port, pixels(ODD))


def test_what_cannot_be_compared_is_said_so(folder: Path) -> None:
    reference, port = sides(folder)
    x = pixels(ODD).float()
    with pytest.raises(ValueError, match="inputs must hold at least two"):
        compared(reference, port, x[:1])
    with pytest.raises(
        ValueError, match=r"outputs differently \(last_hidden_state, output, pooler_output\)"
    ):
        compare(reference, port, x)
    with pytest.raises(
        ValueError, match=r"no module 'post_ln', which the tap 'post_layernorm': 'post_ln'"
    ):
        compare(reference, port, x, {"post_layernorm": "post_ln"})


def test_an_output_that_the_port_lacks_or_that_has_another_shape(folder: Path) -> None:
    reference, port = sides(folder)
    headless = SigLipVisionModel.from_hf(folder, pooling_head=False)
    found = compare(
        reference,
        headless,
        pixels(ODD).float(),
        call_reference=references.outputs,
        call_port=proof.port_outputs,
    )
    assert "pooled: the port does not return it" in str(found)
    assert port.pooling_head is not None
    port.pooling_head.register_forward_hook(lambda _, inputs, output: output[:, :-1])
    found = compared(reference, port, pixels(ODD))
    assert not found.equal
    assert "[2, 71]" in str(found)


def test_a_comparison_of_nothing_is_not_equal() -> None:
    assert not Comparison(()).equal
    assert Comparison(()).verdict == "DIFFERENT (weights as given): no gate was run"
    idle = Comparison((Section("a", "b", (GateResult("semantics", 0, ""),)),))
    assert not idle.equal
    assert idle.verdict == "DIFFERENT (weights as given): semantics: gate semantics checked nothing"


def without_modules(mlp: MLP, x: Tensor) -> Tensor:
    return mlp.activation(x @ mlp.fc1.weight.T + mlp.fc1.bias) @ mlp.fc2.weight.T + mlp.fc2.bias


def test_a_port_that_fuses_modules_is_equal_and_the_verdict_says_what_was_not_seen(
    folder: Path,
) -> None:
    reference, port = sides(folder)
    for part in port.transformer.encoder.encoder_blocks:
        mlp = part.mlp
        mlp.forward = lambda x, mlp=mlp: (
            mlp.activation(x @ mlp.fc1.weight.T + mlp.fc1.bias) @ mlp.fc2.weight.T + mlp.fc2.bias
        )
    found = compared(reference, port, pixels(ODD))
    assert found.equal, found
    assert (
        "seen only by what follows: encoder.layers.0.mlp.fc1, encoder.layers.0.mlp.fc2"
        in found.verdict
    )


def test_a_float32_step_inside_is_told_from_a_mistake_of_its_size(folder: Path) -> None:
    reference, port = sides(folder)
    norm = block(port).layer_norm1
    norm.register_forward_hook(lambda _, args, out: out.float().to(out.dtype))
    found = compared(reference, port, pixels(ODD))
    assert found.equal, found
    assert (
        "float32 inside whatever the dtype, so judged by its rounding: encoder.layers.5.layer_norm1"
        in found.verdict
    )
    norm.register_forward_hook(lambda _, args, out: out * (1 + 1e-7))  # as small, and a mistake
    assert not compared(reference, port, pixels(ODD)).equal


def test_taps_of_a_headless_tower(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint(SMALL)
    reference = references.load(folder, pooling_head=False, dtype=torch.float32)
    port = SigLipVisionModel.from_hf(folder, pooling_head=False)
    found = compare(
        reference.model,
        port,
        pixels(SMALL).float(),
        siglip_taps(False),
        call_reference=references.outputs,
        call_port=proof.port_outputs,
    )
    assert found.equal, found
