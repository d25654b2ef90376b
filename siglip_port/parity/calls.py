"""The situations of the gate `calls`, and the reference's outcomes in them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from siglip_port.parity.sides import (
    Inputs,
    ReferenceHost,
    Side,
    batch_size,
    cast_inputs,
    dtype_name,
    perturb,
)
from siglip_port.parity.situations import (
    Outcome,
    Situation,
    all_tensors,
    map_all_tensors,
    run_situation,
    run_situations,
    weight_moments,
)
from siglip_port.parity.taps import Recording, join, tap_hooks

BASE = "for contiguous inputs"
OTHER = "for other inputs of the same shape"
TRAINING = "in training mode"
CHANGED_WEIGHTS = "with other weights"
BATCH_SIZES = (1, 3, 5, 9)
"""Sizes beside the base of two examples."""

MEMORY_NAMES = {
    "transposed": "for inputs transposed in memory",
    "channels_last": "for channels-last inputs",
    "sliced": "for inputs sliced from a larger tensor",
    "expanded": "for expanded inputs (stride 0)",
}
"""Memory format -> name of its situation."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SPREAD = 0.1
"""Relative size of the noise by which examples of larger batches differ."""


@dataclass(frozen=True)
class ReferenceCalls:
    """What the reference does in a list of situations, and where to compute more.

    Attributes:
        host: Place of the reference.
        dtype: Dtype to which weights and inputs are rounded.
        situations: Situations by name.
        outcomes: The reference's outcomes by the name of the situation.
        moments: Moments of the reference's weights, see `weight_moments`.
    """

    host: ReferenceHost
    dtype: torch.dtype
    situations: dict[str, Situation]
    outcomes: dict[str, Outcome]
    moments: tuple[float, ...]


def run_calls(
    host: ReferenceHost, inputs: Inputs, dtype: torch.dtype, *, mixed_dtypes: bool = False
) -> ReferenceCalls:
    """Call the reference in all situations.

    Args:
        host: Reference in `eval()` mode.
        inputs: Inputs of any floating point dtype, at least two examples.
        dtype: Dtype to which weights and inputs are rounded.
        mixed_dtypes: Whether to include inputs of another dtype than the weights, which many right
            models refuse.
    """
    inputs = cast_inputs(inputs, dtype)
    situations = list_situations(inputs, dtype)
    if mixed_dtypes:
        situations += mixed_situations(make_batch(inputs, 2), dtype)
    outcomes = host.compute(run_situations, situations, dtype)
    moments = host.compute(weight_moments, dtype)
    by_name = {situation.name: situation for situation in situations}
    return ReferenceCalls(host, dtype, by_name, outcomes, moments)


def list_situations(inputs: Inputs, dtype: torch.dtype) -> list[Situation]:
    """List the situations in which both sides are called; the first one is `BASE`."""
    inputs = make_batch(inputs, 2)
    exact = cast_inputs(inputs, torch.float64)
    situations = [Situation(BASE, exact, torch.float64)]
    situations += batch_situations(exact, torch.float64, "")
    situations += memory_situations(exact, torch.float64, "")
    situations += mode_situations(exact)
    for low_dtype in dict.fromkeys((dtype, *DTYPES)):
        if low_dtype != torch.float64:
            situations.append(dtype_situation(inputs, low_dtype, has_values=low_dtype == dtype))
    if dtype != torch.float64:
        situations += batch_situations(inputs, dtype, f" in {dtype_name(dtype)}")
        situations += memory_situations(inputs, dtype, f" in {dtype_name(dtype)}")
    situations.append(Situation(OTHER, make_batch(exact, 2, seed=7), torch.float64))
    situations.append(Situation(CHANGED_WEIGHTS, exact, torch.float64, changed_weights=True))
    situations.append(Situation(TRAINING, exact, torch.float64, mode="no_grad", training=True))
    return situations


def make_batch(inputs: Inputs, size: int, seed: int = 0) -> Inputs:
    """Return a batch of any size: the examples repeated, all different.

    Args:
        inputs: At least two examples along the first axis.
        size: Size of the batch; 2 for the first two examples as they are, if `seed` is 0.
        seed: Seed of the noise that is added.
    """
    count = batch_size(inputs)
    indices = torch.arange(size) % count
    batch = map_all_tensors(inputs, lambda tensor: tensor[indices.to(tensor.device)])
    if size == 2 and seed == 0:
        return batch
    generator = torch.Generator().manual_seed(100 * seed + size)
    return perturb(batch, SPREAD, generator)


def batch_situations(inputs: Inputs, dtype: torch.dtype, suffix: str) -> list[Situation]:
    """List batches of several sizes."""
    return [
        Situation(f"in a batch of {size}{suffix}", make_batch(inputs, size), dtype)
        for size in BATCH_SIZES
    ]


def memory_situations(inputs: Inputs, dtype: torch.dtype, suffix: str) -> list[Situation]:
    """List the memory formats of inputs."""
    situations = []
    for memory, name in MEMORY_NAMES.items():
        if memory == "channels_last" and not any(x.ndim == 4 for x in all_tensors(inputs)):
            continue
        situations.append(Situation(f"{name}{suffix}", inputs, dtype, memory))
    return situations


def mode_situations(inputs: Inputs) -> list[Situation]:
    """List gradient modes, with inputs that require gradients or that autograd refuses.

    The gate `gradients` compares the values of calls with gradients enabled.
    """
    exact = torch.float64
    return [
        Situation("under no_grad", inputs, exact, mode="no_grad"),
        Situation("for inference tensors", inputs, exact, "inference_tensor", "no_grad"),
        Situation(
            "under no_grad for inputs that require gradients", inputs, exact, "leaf", "no_grad"
        ),
        Situation("with gradients enabled", inputs, exact, mode="grad", has_values=False),
        Situation(
            "for inputs that require gradients", inputs, exact, "leaf", "grad", has_values=False
        ),
    ]


def dtype_situation(inputs: Inputs, dtype: torch.dtype, *, has_values: bool) -> Situation:
    """Return the situation of weights and inputs in another dtype."""
    inputs = cast_inputs(inputs, dtype)
    return Situation(f"in {dtype_name(dtype)}", inputs, dtype, has_values=has_values)


def mixed_situations(inputs: Inputs, dtype: torch.dtype) -> list[Situation]:
    """List inputs of another dtype than the weights."""
    situations = []
    for input_dtype in (*DTYPES, torch.float64):
        if input_dtype != dtype:
            name = f"for {dtype_name(input_dtype)} inputs of a {dtype_name(dtype)} model"
            situations.append(Situation(name, cast_inputs(inputs, input_dtype), dtype))
    return situations


# --- taps of one call -----------------------------------------------------------------------------


class CallTrace:
    """A side that records its taps; only those of the last call are kept.

    Args:
        side: Side to run.
        points: Points to record.
    """

    def __init__(self, side: Side, points: list[str]) -> None:
        self.points = points
        self._call = side.call
        self._parts: dict[str, list[Tensor]] = {}

    def call(self, module: torch.nn.Module, inputs: Inputs) -> dict[str, Tensor]:
        """Run the module and record its taps."""
        self._parts = {}
        if not self.points:
            return dict(self._call(module, inputs))
        with tap_hooks(module, self.points, self._save):
            return dict(self._call(module, inputs))

    def _save(self, point: str, tensor: Tensor) -> None:
        self._parts.setdefault(point, []).append(tensor.detach().clone())

    def taps(self) -> dict[str, Tensor]:
        """Return the tensors of the last call, in order of computation."""
        return {point: join(parts) for point, parts in self._parts.items()}


def trace_situation(
    side: Side, situation: Situation, points: list[str], dtype: torch.dtype
) -> Recording:
    """Call a side in one situation; return outputs and taps."""
    if side.attentions[0]:
        side.set_attention(side.attentions[0])
    trace = CallTrace(side, points)
    traced = Side(side.module, trace.call, side.attentions, side.set_attention)
    outcome = run_situation(traced, situation, dtype)
    return Recording(dict(outcome.outputs), trace.taps())
