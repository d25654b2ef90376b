"""Runs one mutant through the gates."""

from __future__ import annotations

import contextlib
import functools
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from scripts.selftest.mutant import Mutant, is_expected_location
from siglip_port import SigLipVisionConfig, SigLipVisionModel
from siglip_port.checkpoint import default_preprocessor_config
from siglip_port.image_processing import ImageProcessor
from siglip_port.parity import bounds, gates
from siglip_port.parity.observe import run_reference
from siglip_port.parity.results import Finding, GateResult, Measurement
from siglip_port.parity.sides import Side
from siglip_port.parity.siglip import cases, reference, taps
from siglip_port.parity.siglip.cases import Case
from siglip_port.parity.siglip.pixels import check_pixels
from siglip_port.parity.siglip.sample_images import synthetic_image
from siglip_port.parity.taps import expand


@dataclass
class MutantResult:
    """Outcome of one mutant.

    Attributes:
        mutant: Mutant.
        detections: Gate -> first finding, for every gate that detected the mutant, in gate order.
        false_locations: Reported locations that are not the mutant's.
        error: Error of a port that could not run; empty if it ran.
    """

    mutant: Mutant
    detections: dict[str, Finding] = field(default_factory=dict)
    false_locations: list[str] = field(default_factory=list)
    error: str = ""

    @property
    def detected(self) -> bool:
        """Whether any gate detected it."""
        return bool(self.detections)

    @property
    def located(self) -> bool:
        """Whether it was detected, with no false location."""
        return self.detected and not self.false_locations

    @property
    def passed(self) -> bool:
        """Whether the outcome is as expected.

        An equivalent variant must pass all gates; a mutant must be located, and detected by its
        gate.
        """
        if self.mutant.is_equivalent:
            return not self.detected and not self.error
        return self.mutant.gate in self.detections and self.located

    def add(self, gate: GateResult) -> None:
        """Record a gate that failed."""
        name = gate.name.split()[0]
        self.detections.setdefault(name, gate.findings[0])

    def add_locations(self, gate: GateResult) -> None:
        """Record false locations of a gate. `sensitivity` may report any output."""
        if gate.name == "sensitivity":
            return
        for finding in gate.findings:
            location = finding.reference or finding.port
            if not is_expected_location(location, self.mutant.locations):
                self.false_locations.append(f"{gate.name}: {location}")

    def add_error(self, error: Exception) -> None:
        """Record a port that cannot run."""
        self.error = f"{type(error).__name__}: {error}"
        self.detections.setdefault("run", Finding(self.error))


def examine(
    mutant: Mutant, checkpoints: Iterable[Case], *, with_hints: bool = True
) -> MutantResult:
    """Run a mutant through the gates of several checkpoints.

    Args:
        mutant: Mutant with the subject `port`.
        checkpoints: Checkpoints, each with its reference.
        with_hints: Whether to look for known bugs that explain differences.
    """
    result = MutantResult(mutant)
    rounding = []
    with mutant.applied():
        for case in checkpoints:
            torch.manual_seed(0)  # for mutants that draw random numbers
            try:
                port = mutant.load(case.source, device=case.inputs.device)
                for gate in case.check(port, with_hints=with_hints):
                    if gate.passed:
                        continue
                    result.add(gate)
                    if gate.name.startswith("rounding"):
                        rounding.append(gate)
                    else:
                        result.add_locations(gate)
            except (RuntimeError, ValueError) as error:
                result.add_error(error)
    if rounding and "numerics" not in result.detections:  # numerics locates more precisely
        # Take the location from the dtype with the largest error. Where errors of many steps add up
        # to little more than the bound, the location depends on the machine.
        result.add_locations(max(rounding, key=largest_share))
    return result


def share_of_bound(measurement: Measurement) -> float:
    """Return an error in units of its rounding bound, over all elements or the worst vector."""
    return max(measurement.ratio / bounds.ROUNDING_FACTOR, measurement.worst)


def largest_share(gate: GateResult) -> float:
    """Return the largest error of a gate in units of its bound."""
    return max(map(share_of_bound, gate.measurements), default=math.inf)


@contextlib.contextmanager
def make_cases(
    seed: int = 1234,
    device: str = "cpu",
    *,
    full: bool = False,
    config: SigLipVisionConfig = cases.ODD,
) -> Iterator[list[Case]]:
    """Yield the checkpoints for mutants: N1 for all gates except rounding.

    Rounding is judged on L7 in float32 and on S1 in bfloat16 and float16.

    Args:
        seed: Seed of the weights.
        device: Device of the models.
        full: Add L8.
        config: Architecture.
    """
    make = functools.partial(cases.random_case, config, seed=seed, device=device)
    contexts = [
        make("N1", gates=cases.ALL_GATES[:-1]),
        make("L7", gates=("rounding",)),
        make("S1", gates=("rounding",), dtypes=cases.LOW_DTYPES[1:]),
    ]
    if full:
        contexts.append(make("L8", gates=("rounding",)))
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(context) for context in contexts]


# --- other shapes, other images -------------------------------------------------------------------


def examine_shapes(mutant: Mutant) -> MutantResult:
    """Run a mutant on packed patches, or on images of another size than the checkpoint's."""
    assert mutant.subject in ("naflex", "resized")
    result = MutantResult(mutant)
    with tempfile.TemporaryDirectory(prefix="siglip_port-") as folder:
        side, inputs = reference.small_reference(mutant.subject, Path(folder))
        interpolation = None if mutant.subject == "naflex" else "hf"
        with mutant.applied():
            try:
                port = mutant.load(folder, interpolation=interpolation)
                results = [*check_shapes(mutant, port, side, inputs)]
            except (RuntimeError, ValueError) as error:
                result.add_error(error)
                return result
    for gate in results:
        if not gate.passed:
            result.add(gate)
            result.add_locations(gate)
    return result


def check_shapes(
    mutant: Mutant, port: SigLipVisionModel, other: Side, inputs: Mapping[str, Tensor]
) -> Iterator[GateResult]:
    """Run the gates that apply to other shapes."""
    # The taps inside the reference's nn.MultiheadAttention are recomputed without masks, and for
    # packed patches the port applies the convolution's weights without calling the module.
    skipped = ["head.attention:"]
    if mutant.subject == "naflex":
        skipped.append("embeddings.patch_embedding")
    points = {}
    for point, port_point in taps.siglip_taps(pooling_head=True).items():
        if not point.startswith(tuple(skipped)):
            points[point] = port_point
    pairs = expand(points, other.module, port)
    run = run_reference(other, inputs, [tap.reference for tap in pairs], torch.float32)
    side = Side(port, call_with_shapes)
    tensors = cases.tensors_by_reference_name(port)
    yield gates.check_weights(tensors, other.module.state_dict())
    yield gates.check_sensitivity(side, other, inputs)
    yield gates.check_numerics(side, run, pairs)


def call_with_shapes(port: SigLipVisionModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `tokens` and `pooled` for packed patches or images."""
    tokens = port(**inputs)
    return {"tokens": tokens, "pooled": port.pool(tokens, inputs.get("pixel_attention_mask"))}


def examine_images(mutant: Mutant) -> MutantResult:
    """Run a mutant on images of all modes, with SigLIP and NaFlex preprocessing."""
    result = MutantResult(mutant)
    for config in (
        SigLipVisionConfig(image_size=64),
        SigLipVisionConfig(image_size=64, naflex=True),
    ):
        processors = reference.image_processors(config)
        preprocessor = default_preprocessor_config(config)
        with mutant.applied():
            port = {
                backend: ImageProcessor.from_config(preprocessor, backend) for backend in processors
            }
            gate = check_pixels(port, processors, synthetic_image(), max_hints=0)
        if not gate.passed:
            result.add(gate)
            result.add_locations(gate)
    return result
