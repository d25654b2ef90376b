"""What the entrances are checked on: a port, its reference, batches and images."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from siglip_port.image_processing import Backend
from siglip_port.model import SigLipVisionModel
from siglip_port.parity import bounds
from siglip_port.parity.metrics import relative_error
from siglip_port.parity.results import Finding
from siglip_port.parity.roughness import STEP, perturbed_parameters
from siglip_port.parity.sides import Inputs, ReferenceHost, Side, cast, perturb
from siglip_port.parity.siglip.reference_features import Features, SavedModel
from siglip_port.parity.siglip.sample_images import Sample

FLOAT32_ROUNDING = 1e-5
"""Largest relative error of a float32 step inside the port, accepted only if it is rough."""

FLOAT32_BOUND = 1e-4
"""Largest relative error of a port in float32. Errors of bfloat16 are larger than 1e-3."""

tolerance: ContextVar[float] = ContextVar("tolerance", default=bounds.FLOAT64_BOUND)
"""Largest relative error of values, for the dtype of the port."""


@dataclass(frozen=True)
class Batch:
    """A batch for the port, with the reference's results.

    Attributes:
        name: Kind of batch, for messages.
        inputs: Keyword arguments of the port's `forward`, float64.
        expected: Results of the reference.
        grid: Height and width in patches; None for packed patches.
    """

    name: str
    inputs: Mapping[str, Any]
    expected: Features
    grid: tuple[int, int] | None = None

    @property
    def is_packed(self) -> bool:
        """Whether the batch holds packed patches."""
        return self.grid is None

    @property
    def mask(self) -> Tensor | None:
        """Padding mask, [B, N]; None for whole images."""
        return self.inputs.get("pixel_attention_mask")

    @property
    def packed_mask(self) -> Tensor:
        """Padding mask of packed patches, [B, N]."""
        mask: Tensor = self.inputs["pixel_attention_mask"]
        return mask

    def valid(self, tokens: Tensor) -> Tensor:
        """Return the tokens at patches, without padding: [B, N, ...] -> [sum of N, ...]."""
        if self.mask is None:
            return tokens.flatten(0, 1)
        if tokens.shape[:2] != self.mask.shape:
            return tokens
        return tokens[self.mask.bool()]


@dataclass(frozen=True)
class Expected:
    """A checkpoint, and the reference's results on batches and images.

    Attributes:
        host: Reference, loaded from `source`.
        source: Folder of the checkpoint, with a `preprocessor_config.json`.
        interpolation: Option of `from_hf` for images of other sizes; None for the checkpoint's.
        batches: Batches with the reference's results; the first suits the model as it is.
        images: Images of many kinds by name.
        pixels: Images as the reference preprocesses them, one batch each, by backend.
        embeddings: The reference's embeddings of the images, [B, D], float64, by backend.
        stored: The checkpoint as transformers loads it, by dtype.
    """

    host: ReferenceHost
    source: str
    interpolation: str | None
    batches: Sequence[Batch]
    images: Sequence[tuple[str, Sample]]
    pixels: Mapping[Backend, list[dict[str, Tensor]]]
    embeddings: Mapping[Backend, Tensor]
    stored: Mapping[torch.dtype, SavedModel]

    @property
    def samples(self) -> list[Sample]:
        """The images without their names."""
        return [image for _, image in self.images]


@dataclass(frozen=True)
class Subject:
    """A port, and what is expected of it.

    Attributes:
        port: Port, loaded in float32.
        expected: Results of the reference.
        scratch: Empty folder.
    """

    port: SigLipVisionModel
    expected: Expected
    scratch: Path

    @functools.cached_property
    def float64_bound(self) -> float:
        """Bound of values in float64, wider if the port has constants in float32.

        Those are computed from weights only, such as resized positions. In NaFlex models, the
        reference has the same ones.
        """
        if self.port.config.naflex:
            return bounds.FLOAT64_BOUND
        with cast(self.port, torch.float64):
            for batch in self.expected.batches:
                if has_large_second_difference(functools.partial(self._tokens_at, batch)):
                    return FLOAT32_ROUNDING
        return bounds.FLOAT64_BOUND

    def _tokens_at(self, batch: Batch, step: float) -> Tensor:
        """Return the tokens of a batch, one step away in the weights."""
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad(), perturbed_parameters(Side(self.port), step, generator):
            return batch.valid(self.port(**batch.inputs)).double()


@contextlib.contextmanager
def values_within(bound: float) -> Iterator[None]:
    """Compare values with another bound."""
    token = tolerance.set(bound)
    try:
        yield
    finally:
        tolerance.reset(token)


Compute = Callable[[Any], Tensor]
"""Function of inputs (a tensor or tensors by name) -> tensor of the port."""


def compare(label: str, compute: Compute, inputs: Inputs, exact: Tensor) -> Iterator[Finding]:
    """Compare a tensor of the port, which is in float64 or float32, with the exact one.

    A float32 step inside the port is no bug: errors up to `FLOAT32_ROUNDING` are accepted if they
    are rough, which those of a bug are not.

    Args:
        label: Arguments of the call, and the part of its result, for the message.
        compute: Function that calls the port.
        inputs: Inputs of `compute`.
        exact: Expected result.
    """
    yield from compare_value(label, compute(inputs), exact, compute, inputs)


def compare_all(
    names: Sequence[str],
    compute: Callable[[Any], Sequence[Tensor]],
    inputs: Inputs,
    exact: Sequence[Tensor],
) -> Iterator[Finding]:
    """Compare several tensors that the port computes in one call: see `compare`."""
    values = compute(inputs)
    if not isinstance(values, tuple) or len(values) != len(exact):
        kind = f"{type(values).__name__} of {len(values)}"
        yield Finding(f"{names[0]}: the result is a {kind}, expected a tuple of {len(exact)}")
        return
    for i, (name, value) in enumerate(zip(names, values, strict=True)):

        def compute_one(inputs: Inputs, i: int = i) -> Tensor:
            return compute(inputs)[i]

        yield from compare_value(name, value, exact[i], compute_one, inputs)


def compare_value(
    label: str, value: Tensor, exact: Tensor, compute: Compute, inputs: Inputs
) -> Iterator[Finding]:
    """Compare `value`, which is `compute(inputs)`, with the exact one: see `compare`."""
    if value.shape != exact.shape:
        yield Finding(f"{label}: shape {list(value.shape)}, expected {list(exact.shape)}")
        return
    error = relative_error(value, exact)
    bound = tolerance.get()
    if error <= bound:
        return
    if error <= FLOAT32_ROUNDING and is_rough(compute, inputs):
        return
    dtype = "float32" if bound == FLOAT32_BOUND else "float64"
    yield Finding(f"{label}: differs in {dtype}, bound {bound:g}", error=error)


def is_rough(compute: Compute, inputs: Inputs) -> bool:
    """Return whether a function rounds to float32 somewhere: its second differences are large."""

    def compute_at(step: float) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return compute(perturb(inputs, step, generator, torch.float64)).double()

    return has_large_second_difference(compute_at)


def has_large_second_difference(compute_at: Callable[[float], Tensor]) -> bool:
    """Return whether a function of a step is rough at 0."""
    value = compute_at(0.0)
    second_difference = compute_at(STEP) - 2 * value + compute_at(-STEP)
    return float(second_difference.norm() / value.norm()) > bounds.FLOAT64_BOUND


def compare_model(label: str, model: SigLipVisionModel, batch: Batch) -> Iterator[Finding]:
    """Compare tokens and embeddings of a model in float64 with the reference's."""

    def tokens(inputs: Mapping[str, Any]) -> Tensor:
        return batch.valid(model(**inputs))

    def pooled(inputs: Mapping[str, Any]) -> Tensor:
        return model.embed(**inputs)

    yield from compare(f"{label}: tokens", tokens, batch.inputs, batch.valid(batch.expected.tokens))
    if model.config.has_pooled_output:
        yield from compare(f"{label}: embeddings", pooled, batch.inputs, batch.expected.pooled)


def compare_memory(
    label: str, model: SigLipVisionModel, other: SigLipVisionModel
) -> Iterator[Finding]:
    """Check that two models share no memory; yield the first tensor that does."""
    addresses = {tensor.data_ptr() for tensor in other.state_dict().values()}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in addresses:
            yield Finding(f"{label}: {name} shares memory with the first model")
            return


def compare_bits(
    label: str, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> Iterator[Finding]:
    """Compare tensors by name, bit for bit; yield the first difference."""
    names = tensors.keys() ^ expected.keys()
    if names:
        name = min(names)
        side = "only in the port" if name in tensors else "missing"
        yield Finding(f"{label}: {name} is {side}")
        return
    for name, tensor in tensors.items():
        other = expected[name]
        if tensor.dtype != other.dtype or tensor.shape != other.shape:
            yield Finding(
                f"{label}: {name} is {tensor.dtype} {list(tensor.shape)}, expected {other.dtype} "
                f"{list(other.shape)}"
            )
            return
        if not torch.equal(tensor, other):
            error = relative_error(tensor, other)
            yield Finding(f"{label}: {name} differs bit for bit", error=error)
            return
