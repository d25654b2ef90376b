"""Compares the port with the reference, before and after the pooling head, and says how far apart is too far.

No bound is a number of absolute size. There are two questions, and a bound for each:

* *Do both compute the same thing?* Both run in float64 on the same weights, where rounding is 1e-15 to 3e-13 and the
  weakest mistake measured 6e-8 (the eps of a single LayerNorm). Between the two lies `FLOAT64_BOUND`.
* *Does the port round no worse?* In the dtype asked for, the port's distance from the float64 result may be
  `ROUNDING_FACTOR` times the reference's own. Correct variants (attention kernels, compilers, fused layers) measured at
  most 2.39 times.

All on random weights and on CPUs; docs/parity.md says where each figure comes from, and what escapes both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, Self

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from siglip_port import key_map
from siglip_port.model import SigLipVisionModel

FLOAT64_BOUND = 1e-10
ROUNDING_FACTOR = 3.0


@dataclass(frozen=True)
class Measurement:
    """How near the port is to the reference at one point, in one dtype.

    Attributes:
        point: `tokens`, before the pooling head, or `pooled`, after it.
        dtype: what both computed in.
        attention: the reference's implementation of attention.
        cosine_mean: cosine similarity of port and reference along the feature axis, mean over all tokens or pictures.
        cosine_min: the smallest of them.
        max_abs: largest absolute difference of an element between port and reference.
        error: relative error of the port, ||port - truth|| / ||truth||; the truth is the reference in float64.
        bound: what `error` may be at most.
        origin: where the bound comes from.
    """

    point: str
    dtype: str
    attention: str
    cosine_mean: float
    cosine_min: float
    max_abs: float
    error: float
    bound: float
    origin: str

    @property
    def equal(self) -> bool:
        """Whether the error is inside the bound. What is not finite is inside no bound."""
        return math.isfinite(self.error) and self.error <= self.bound


def cosine(port: Tensor, reference: Tensor) -> Tensor:
    """Cosine similarity along the feature axis, the last one, computed in float64: [..., D], [..., D] -> [...]."""
    return F.cosine_similarity(port.double(), reference.double(), dim=-1)


def relative_error(value: Tensor, truth: Tensor) -> float:
    """||value - truth|| / ||truth|| over all elements, in float64; NaN where the truth is all zero."""
    truth = truth.double()
    return float((value.double() - truth).norm() / truth.norm())


def measure(point: str, port: Tensor, reference: Tensor, truth: Tensor, attention: str = "sdpa") -> Measurement:
    """Measures one point.

    Args:
        point: its name.
        port: what the port computed.
        reference: what the reference computed, in the same dtype.
        truth: what the reference computed in float64 from the same weights and pixels; the same object as
            `reference` where that is what is compared.
        attention: the reference's implementation of attention.

    Raises:
        ValueError: the shapes or dtypes of port and reference differ.
    """
    if port.shape != reference.shape or port.dtype != reference.dtype:
        raise ValueError(
            f"{point}: the port gives {port.dtype} of shape {list(port.shape)}, the reference {reference.dtype} of "
            f"shape {list(reference.shape)}"
        )
    similarities = cosine(port, reference)
    if reference is truth:
        bound, origin = FLOAT64_BOUND, "rounding stays below 1e-12; the weakest mistake of our list makes 6e-8"
    else:
        bound = ROUNDING_FACTOR * relative_error(reference, truth)
        origin = f"{ROUNDING_FACTOR:g} x the reference's own distance from float64"
    return Measurement(
        point=point,
        dtype=str(port.dtype).removeprefix("torch."),
        attention=attention,
        cosine_mean=float(similarities.mean()),
        cosine_min=float(similarities.min()),
        max_abs=float((port.double() - reference.double()).abs().max()),
        error=relative_error(port, truth),
        bound=bound,
        origin=origin,
    )


def port_outputs(port: SigLipVisionModel, pixel_values: Tensor) -> dict[str, Tensor]:
    """Runs the port: `tokens` [B, N, D] and, where it has a head, `pooled` [B, D]."""
    with torch.inference_mode():
        tokens = port(pixel_values)
        return {"tokens": tokens} if port.pooling_head is None else {"tokens": tokens, "pooled": port.pool(tokens)}


class Reference(Protocol):
    """An implementation to compare with: see `siglip_port.parity.references`.

    Attributes:
        model: its module, whose tensors are named as in the flat HuggingFace layout.
    """

    model: nn.Module

    @property
    def attention(self) -> str:
        """Its implementation of attention, by name."""

    @property
    def is_exact(self) -> bool:
        """Whether it computes in float64 throughout."""

    def outputs(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Returns `tokens` [B, N, D] and, where it has a head, `pooled` [B, D]."""

    def to_float64(self) -> Self:
        """Turns it into the exact one, in place."""


def differing_weights(port: SigLipVisionModel, reference: nn.Module) -> list[str]:
    """Compares every tensor of port and reference bit for bit, through the key map.

    The outputs cannot vouch for all of them: a bias of the keys, for one, changes no attention.

    Returns:
        The reference's names of the tensors that differ or that one side lacks; none where all is well.
    """
    rows = key_map.TOWER + (key_map.HEAD if port.pooling_head is not None else ())
    ours = key_map.FLAT.to_stored(port.state_dict(), port.config.num_encoder_blocks, rows)
    theirs: Mapping[str, Tensor] = reference.state_dict()
    return [
        name
        for name in sorted(ours.keys() | theirs.keys())
        if name not in ours
        or name not in theirs
        or ours[name].dtype != theirs[name].dtype
        or not torch.equal(bits(ours[name]), bits(theirs[name]))
    ]


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor: 0 and -0 differ in them, and a NaN equals itself."""
    return tensor.contiguous().view(torch.uint8)


@dataclass(frozen=True)
class Comparison:
    """All that one comparison found.

    Attributes:
        port_shapes: of the port's output at every point, in the dtype asked for.
        reference_shapes: likewise of the reference.
        num_weights: number of tensors of the reference.
        differing_weights: names of those that are not bit for bit the port's.
        measurements: first those in float64, then those in the dtype asked for.
    """

    port_shapes: dict[str, torch.Size]
    reference_shapes: dict[str, torch.Size]
    num_weights: int
    differing_weights: list[str]
    measurements: tuple[Measurement, ...]

    @property
    def equal(self) -> bool:
        """Whether the port is the reference's equal: all weights the same, and every error inside its bound."""
        return not self.differing_weights and all(measurement.equal for measurement in self.measurements)


def compare(port: SigLipVisionModel, reference: Reference, pixel_values: Tensor) -> Comparison:
    """Compares port and reference in the dtype of their parameters and in float64.

    Weights and pixels are rounded to the dtype first, so that both dtypes see the same numbers. **Both models are
    used up**: they are float64 afterwards, which saves the memory of copies.

    Args:
        port: in `eval()` mode.
        reference: what to compare it with, on the same device.
        pixel_values: [B, C, S, S].

    Raises:
        ValueError: the outputs cannot be compared, since one side lacks one, the shapes differ, or the reference's
            own are not finite.
    """
    weight = next(port.parameters())
    pixel_values = pixel_values.to(weight.device, weight.dtype)
    attention = reference.attention
    differing = differing_weights(port, reference.model)
    num_weights = len(reference.model.state_dict())
    ours, theirs = port_outputs(port, pixel_values), reference.outputs(pixel_values)
    if ours.keys() != theirs.keys():
        raise ValueError(f"the port gives {', '.join(ours)}, but the reference gives {', '.join(theirs)}")

    ours_in_float64 = port_outputs(port.double(), pixel_values.double())
    truth = theirs if reference.is_exact else reference.to_float64().outputs(pixel_values.double())
    for point in truth:
        if not (theirs[point].isfinite().all() and truth[point].isfinite().all()):
            raise ValueError(
                f"the reference itself gives NaN or infinity ({point}), so there is nothing to compare with: the "
                "weights hold such numbers, or the dtype is too narrow for them"
            )
    measurements = [measure(point, ours_in_float64[point], truth[point], truth[point]) for point in truth]
    if truth is not theirs:
        measurements += [measure(point, ours[point], theirs[point], truth[point], attention) for point in truth]
    return Comparison(
        port_shapes={point: output.shape for point, output in ours.items()},
        reference_shapes={point: output.shape for point, output in theirs.items()},
        num_weights=num_weights,
        differing_weights=differing,
        measurements=tuple(measurements),
    )
