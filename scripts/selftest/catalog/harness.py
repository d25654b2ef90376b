"""Mutants of the harness itself: with any of them, the self-test must fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from scripts.selftest.mutant import HarnessMutant, combine, replace, wrap
from siglip_port import SigLipVisionModel
from siglip_port.parity import bounds, gates, observe
from siglip_port.parity.gates import batches, environment, numerics, rounding, sensitivity, weights
from siglip_port.parity.gates.batches import BatchRuns
from siglip_port.parity.metrics import RelativeError
from siglip_port.parity.observe import ReferenceRun
from siglip_port.parity.results import GateResult, Measurement
from siglip_port.parity.sides import Inputs, Side, batch_size
from siglip_port.parity.siglip import cases, reference, taps
from siglip_port.parity.siglip.cases import Case
from siglip_port.parity.siglip.reference import Reference
from siglip_port.parity.taps import Tap


def run_reference_instead(
    run_both_ways: Callable[..., object], port: Side, run: ReferenceRun, pairs: list[Tap]
) -> object:
    """Run the reference instead of the port."""
    reference_taps = [Tap(tap.reference, tap.reference) for tap in pairs]
    return run_both_ways(run.host, run, reference_taps)


def bound_by_own_error(
    measure_rounding: Callable[..., Measurement],
    dtype: str,
    tap: Tap,
    error: RelativeError,
    noise: RelativeError,
) -> Measurement:
    """Bound the port's error by itself instead of the reference's."""
    return measure_rounding(dtype, tap, error, error)


def is_not_outside(measurement: Measurement) -> bool:
    """Whether an error is not larger than its bound; true for NaN."""
    return not measurement.error > measurement.bound


def stay_in_float32(cast: Callable[..., object], module: nn.Module, *dtypes: torch.dtype) -> object:
    """Cast a module to the first of some dtypes only."""
    return cast(module, dtypes[0])


def fill_with_zeros(fill: Callable[..., object], model: nn.Module, *args: object) -> None:
    """Draw weights, then set them to zero."""
    fill(model, *args)
    for parameter in model.parameters():
        parameter.data.zero_()


def compare_first_output(
    compare_outputs: Callable[..., object],
    outputs: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
) -> object:
    """Compare the first output only."""
    name = next(iter(exact))
    return compare_outputs(outputs, {name: exact[name]})


def check_with_shared_weights(
    check: Callable[..., Iterator[GateResult]],
    case: Case,
    port: SigLipVisionModel,
    **options: object,
) -> Iterator[GateResult]:
    """Load the port's tensors into the reference."""
    assert isinstance(case.reference, Reference)
    case.reference.model.load_state_dict(cases.tensors_by_reference_name(port))
    case.reference_runs.clear()
    return check(case, port, **options)


def passes_if_sensitivity(result: GateResult) -> bool:
    """Whether a gate passed or is `sensitivity`."""
    return result.name == "sensitivity" or (not result.findings and result.checked > 0)


def join_whole_batch(side: Side, inputs: Inputs) -> BatchRuns:
    """Return the outputs for the batch as those of its examples."""
    outputs = side.run(inputs)
    return BatchRuns(outputs, outputs, batch_size(inputs))


HARNESS = [
    HarnessMutant(
        "itself",
        "the reference compared with itself",
        ("ln_eps_once", "pooled_half"),
        wrap(numerics, "run_both_ways", run_reference_instead),
    ),
    HarnessMutant(
        "bound_wide",
        "the float64 bound set to 1e-2",
        ("ln_eps_once", "gelu_exact_head"),
        replace(bounds, "FLOAT64_BOUND", 1e-2),
    ),
    HarnessMutant(
        "factor_wide",
        "the rounding factor set to 3000",
        ("ln_fast_variance", "softmax_bf16"),
        combine(
            replace(bounds, "ROUNDING_FACTOR", 3000.0), replace(bounds, "WORST_FACTOR", 5000.0)
        ),
    ),
    HarnessMutant(
        "bound_of_port",
        "the rounding bound computed from the port's own error",
        ("ln_fast_variance",),
        wrap(rounding, "measure_rounding", bound_by_own_error),
    ),
    HarnessMutant(
        "nan_passes",
        "NaN is within every bound",
        ("nan_output",),
        combine(
            replace(Measurement, "passed", property(is_not_outside)),
            replace(bounds, "within_float64_bound", lambda error: not error > bounds.FLOAT64_BOUND),
            replace(sensitivity, "is_finite", lambda tensor: True),
            replace(BatchRuns, "is_constant", lambda *_: False),
        ),
    ),
    HarnessMutant(
        "weights_close",
        "weights compared with allclose",
        ("single_bit",),
        replace(weights, "tensors_equal", torch.allclose),
    ),
    HarnessMutant(
        "weights_skipped",
        "tensors missing on one side ignored",
        ("one_bias_removed",),
        replace(weights, "names_missing_on_one_side", lambda port, reference: set()),
    ),
    HarnessMutant(
        "no_forcing",
        "teacher forcing that substitutes nothing",
        ("ln_eps_once", "gelu_exact_once"),
        replace(observe, "substitute", lambda value, exact: None),
    ),
    HarnessMutant(
        "exact_in_float32",
        "the reference's float64 run computed in float32",
        ("as_it_is",),
        combine(
            wrap(observe, "cast", stay_in_float32),
            wrap(
                observe,
                "cast_inputs",
                lambda cast_inputs, inputs, dtype: cast_inputs(inputs, torch.float32),
            ),
        ),
    ),
    HarnessMutant(
        "exact_eager",
        "the reference's float64 run with a float32 softmax",
        ("as_it_is",),
        replace(Reference, "attentions", ("eager", "sdpa")),
    ),
    HarnessMutant(
        "dead_models",
        "zero weights on both sides",
        ("as_it_is",),
        wrap(reference, "fill", fill_with_zeros),
    ),
    HarnessMutant(
        "one_output",
        "only the first output compared",
        ("pooled_half",),
        wrap(observe, "compare_outputs", compare_first_output),
    ),
    HarnessMutant(
        "no_taps",
        "no taps",
        ("ln_eps_once",),
        replace(taps, "siglip_taps", lambda pooling_head: {}),
    ),
    HarnessMutant(
        "shared_memory",
        "both sides share their tensors, so a change of one changes both",
        ("one_bias_missing",),
        wrap(Case, "check", check_with_shared_weights),
    ),
    HarnessMutant(
        "sensitivity_off",
        "the gate sensitivity ignores its findings",
        ("k_bias_unused",),
        replace(GateResult, "passed", property(passes_if_sensitivity)),
    ),
    HarnessMutant(
        "environment_off",
        "the gate environment ignores its findings",
        ("left_in_training",),
        replace(environment, "training_modules", lambda module: []),
    ),
    HarnessMutant(
        "config_off",
        "the config compared with itself",
        ("eps_ignored",),
        wrap(gates, "check_config", lambda check_config, port, reference: check_config(port, port)),
    ),
    HarnessMutant(
        "batch_with_itself",
        "a batch compared with itself",
        ("batch_leak",),
        replace(batches, "join_runs", join_whole_batch),
    ),
]
