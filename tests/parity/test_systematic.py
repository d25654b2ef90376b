from __future__ import annotations

import torch

from siglip_port.parity.sides import Sample, Side, cast, cast_inputs
from siglip_port.parity.systematic import (
    can_be_perturbed,
    perturbed_samples,
    port_statistics,
    reference_statistics,
)
from tests.parity.toy_models import ToyEncoder, toy_images
from tests.parity.toy_transformer import ToyTransformer, toy_points, toy_run


def test_perturbed_samples_are_representable() -> None:
    samples = perturbed_samples({"x": toy_images(), "ids": torch.arange(3)}, 1e-4, 3, torch.float32)
    assert [sample.weight_scale for sample in samples] == [1, 1, 1]
    first, second, _ = [sample.inputs for sample in samples]
    assert first["x"].dtype == torch.float64
    assert torch.equal(first["x"], first["x"].float().double())
    assert 1e-5 < (first["x"] - second["x"]).norm() / first["x"].norm() < 1e-3
    assert torch.equal(first["ids"], torch.arange(3))


def test_perturbed_weights() -> None:
    samples = perturbed_samples(torch.arange(3), 1e-4, 3, torch.float32, with_weights=True)
    scales = [sample.weight_scale for sample in samples]
    assert len(set(scales)) == 3
    assert all(0 < abs(scale - 1) < 1e-3 for scale in scales)
    side = Side(ToyEncoder())
    weight = side.module.get_parameter("conv.weight")
    before = weight.detach().clone()
    with cast(side.module, torch.float64):
        samples[0].scale_weights(side.module)
        assert torch.equal(weight, before.double() * scales[0])
    assert torch.equal(weight, before)
    samples[0].scale_weights(torch.relu)


def test_can_be_perturbed() -> None:
    assert can_be_perturbed({"x": toy_images(), "ids": torch.arange(3)})
    assert not can_be_perturbed(torch.arange(3))


def test_rounding_of_both_sides_averages_out() -> None:
    run = toy_run(torch.bfloat16)
    samples = perturbed_samples(run.inputs, 2**-6, 8, torch.bfloat16)
    names = ["blocks.0.mlp", "tokens"]
    points = {point: point for point in toy_points()}
    dtypes = (torch.bfloat16,)
    port = Side(ToyTransformer())
    *_, own = port_statistics(port, run, samples, points, names, dtypes, forced=True)
    other = run.host.compute(reference_statistics, samples, list(points), names, dtypes, ("",))
    assert own == other
    for name in names:
        assert own[name].systematic < own[name].total / 2


def test_weights_are_restored() -> None:
    side = Side(ToyEncoder())
    before = side.module.get_parameter("conv.weight").detach().clone()
    samples = [Sample(cast_inputs(toy_images(), torch.float64), 1.5)] * 2
    reference_statistics(side, samples, ["conv"], ["conv"], (torch.float32, torch.bfloat16), ("",))
    assert torch.equal(side.module.get_parameter("conv.weight"), before)
