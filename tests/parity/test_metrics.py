from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from siglip_port.parity.metrics import (
    ErrorMeter,
    SystematicErrorMeter,
    bits,
    cosine,
    is_finite,
    relative_error,
    sample_elements,
    tensors_equal,
)

EXACT = torch.tensor([[3.0, 4.0], [0.0, 5.0]], dtype=torch.float64)
VALUE = torch.tensor([[3.0, 4.1], [0.0, 5.0]])
ERROR = 0.1 / math.sqrt(50)


def test_relative_error() -> None:
    assert relative_error(VALUE, EXACT) == pytest.approx(ERROR, rel=1e-5)
    assert math.isnan(relative_error(torch.zeros(2, 2), torch.zeros(2, 2)))
    assert math.isnan(relative_error(VALUE * math.nan, EXACT))


def test_cosine_along_last_axis() -> None:
    a = torch.randn(2, 5, 7)
    b = torch.randn(2, 5, 7)
    expected = F.cosine_similarity(a[1, 2].double(), b[1, 2].double(), dim=0)
    assert cosine(a, b).shape == (2, 5)
    assert cosine(a, b)[1, 2] == pytest.approx(float(expected))


def test_bits_of_zeros_and_nans() -> None:
    nan = torch.tensor([math.nan])
    assert not tensors_equal(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert tensors_equal(nan, nan.clone())
    assert torch.equal(bits(nan), bits(nan.clone()))


def test_is_finite() -> None:
    assert is_finite(EXACT)
    assert not is_finite(EXACT * math.nan)
    assert not is_finite(EXACT / 0)


def test_error_meter() -> None:
    meter = ErrorMeter(EXACT)
    assert meter.add(VALUE) is not None
    error = meter.error()
    assert error.overall == pytest.approx(ERROR, rel=1e-5)
    assert error.worst == pytest.approx(0.1 / 5, rel=1e-5)  # both vectors have norm 5


def test_error_meter_with_parts_and_passes() -> None:
    meter = ErrorMeter(EXACT)
    for part in (*VALUE.split(1), *VALUE.split(1)):
        meter.add(part)
    assert meter.error().overall == pytest.approx(ERROR, rel=1e-5)
    meter.add(VALUE[:1])
    assert not meter.is_complete
    assert meter.error() == (math.inf, math.inf)


def test_error_meter_with_other_shape() -> None:
    meter = ErrorMeter(EXACT)
    assert meter.add(VALUE[:, :1]) is None
    assert meter.error() == (math.inf, math.inf)


def test_error_meter_with_nan() -> None:
    meter = ErrorMeter(EXACT)
    meter.add(VALUE * math.nan)
    assert math.isnan(meter.error().overall)
    assert math.isnan(meter.error().worst)


def test_error_meter_with_exact_zeros() -> None:
    meter = ErrorMeter(torch.zeros(2, 2))
    meter.add(VALUE)
    assert math.isnan(meter.error().overall)


def meter_errors(bias: float, noise: float) -> SystematicErrorMeter:
    meter = SystematicErrorMeter()
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        exact = torch.randn(4000, generator=generator, dtype=torch.float64)
        error = bias + noise * torch.randn(4000, generator=generator, dtype=torch.float64)
        meter.add(exact + error, exact)
    return meter


def test_systematic_error() -> None:
    rounding = meter_errors(bias=0.0, noise=0.1).statistics()
    assert rounding.total == pytest.approx(0.1, rel=0.05)
    assert rounding.systematic < 0.02
    bug = meter_errors(bias=0.1, noise=0.1).statistics()
    assert bug.systematic == pytest.approx(0.1, rel=0.1)
    assert bug.total == pytest.approx(0.1 * math.sqrt(2), rel=0.05)
    assert bug.varies


def test_systematic_error_of_a_constant() -> None:
    meter = SystematicErrorMeter()
    assert math.isnan(meter.statistics().total)
    for _ in range(3):
        meter.add(VALUE, EXACT)
    error = meter.statistics()
    assert error.systematic == pytest.approx(error.total) == pytest.approx(ERROR, rel=1e-5)
    assert not error.varies


@pytest.mark.parametrize(("change", "counts"), [(1e-5, False), (1e-2, True)])
def test_rounding_of_outliers_is_not_systematic(change: float, counts: bool) -> None:
    """The outlier has the same rounding error each time; what changes has none on average."""
    meter = SystematicErrorMeter()
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        exact = torch.randn(4000, generator=generator, dtype=torch.float64)
        exact[0] = 1000.3 * (1 + change * float(torch.rand((), generator=generator)))
        value = exact.half()
        value[0] = exact[0] + 0.3
        meter.add(value, exact)
    error = meter.statistics()
    assert (error.systematic > 0.5 * error.total) == counts


def test_large_tensors_are_sampled_at_fixed_elements() -> None:
    tensor = torch.arange(200000.0)
    sample = sample_elements(tensor)
    assert len(sample) == 65536
    assert torch.equal(sample, sample_elements(tensor))
    assert sample.max() > 190000


def test_undefined_positions_are_not_measured() -> None:
    exact = torch.ones(2, 3, 4)
    defined = torch.tensor([[True, True, False], [True, False, False]])
    value = exact.clone()
    value[~defined] = torch.nan
    value[1, 0] = 1.5
    meter = ErrorMeter(exact, defined)
    for i in range(2):
        part = meter.add(value[i : i + 1])
        assert part is not None
        compared = meter.last_defined(value[i : i + 1], part)
        assert torch.equal(compared[~defined[i : i + 1]], part[~defined[i : i + 1]])
        assert torch.equal(compared[defined[i : i + 1]], value[i : i + 1][defined[i : i + 1]])
    error = meter.error()
    assert error.overall == pytest.approx(0.5 / 3**0.5)
    assert error.worst == pytest.approx(0.5)


def test_positions_of_other_shapes_are_all_measured() -> None:
    meter = ErrorMeter(torch.ones(2, 1, 4), torch.zeros(2, 3, dtype=torch.bool))
    meter.add(torch.full((2, 1, 4), 2.0))
    assert meter.error().overall == 1
