"""Runs one mutant through the gates."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from scripts.selftest.mutant import Mutant, is_expected_location
from siglip_port import SigLipVisionConfig
from siglip_port.parity import bounds
from siglip_port.parity.results import Finding, GateResult, Measurement
from siglip_port.parity.siglip import cases
from siglip_port.parity.siglip.cases import Case
from siglip_port.parity.siglip.entrances import models as entrance_models
from siglip_port.parity.siglip.entrances.subject import Expected
from siglip_port.parity.siglip.entrances.table import check_entrances
from siglip_port.parity.siglip.reference_process import IN_THIS_PROCESS
from siglip_port.parity.siglip.small_pixels import check_small_pixels

SUBJECT_MODELS = {
    "port": ("odd encoder",),
    "regime": ("small encoder", "outliers", "long encoder"),
    "naflex": ("NaFlex encoder",),
    "resized": ("resized encoder",),
}
"""Subject of a mutant -> first words of the names of the cases that it is written for."""


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

    def locate(self, failures: list[GateResult]) -> None:
        """Record the false locations of failed gates."""
        rounding = []
        for gate in failures:
            if gate.name.startswith("rounding"):
                rounding.append(gate)
            else:
                self.add_locations(gate)
        if rounding and "numerics" not in self.detections:  # numerics locates more precisely
            # Take the location from the dtype with the largest error. Where errors of many steps
            # add up to little more than the bound, the location depends on the machine.
            self.add_locations(max(rounding, key=largest_share))

    def add_locations(self, gate: GateResult) -> None:
        """Record false locations of a gate.

        `sensitivity` may report any output; what `interface` reports beside a gate that locates
        more precisely follows from the same bug.
        """
        is_symptom = gate.name == "interface" and self.mutant.gate != "interface"
        if gate.name == "sensitivity" or is_symptom:
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
    mutant: Mutant, models: Sequence[list[Case]], *, with_hints: bool = True, stops: bool = False
) -> MutantResult:
    """Run a mutant through the gates of the small models of the default command.

    Locations are those reported on the models that the mutant is assigned to; if its gate detects
    it on none of them, those reported on the others, up to the first where it does.

    Args:
        mutant: Mutant of the port.
        models: Cases of each model.
        with_hints: Whether to look for known bugs that explain differences.
        stops: Whether to skip models once the gate has detected the mutant.
    """
    result = MutantResult(mutant)
    locating = []
    with mutant.applied():
        for model_cases in models:
            if is_assigned(mutant, model_cases):
                locating += run_model(result, model_cases, with_hints)
        for model_cases in models:
            is_detected = mutant.gate in result.detections
            if is_assigned(mutant, model_cases) or (stops and is_detected):
                continue
            failures = run_model(result, model_cases, with_hints)
            if not is_detected:
                locating += failures
    result.locate(locating)
    return result


def is_assigned(mutant: Mutant, model_cases: list[Case]) -> bool:
    """Return whether a model is one that the mutant is written for."""
    first = model_cases[0]
    judges_rounding_only = first.gates == ("rounding",)
    is_subject = first.name.startswith(SUBJECT_MODELS[mutant.subject])
    return is_subject and judges_rounding_only == (mutant.gate == "rounding")


def run_model(result: MutantResult, model_cases: list[Case], with_hints: bool) -> list[GateResult]:
    """Run a mutant through the cases of one model, which share a port; return the failed gates."""
    torch.manual_seed(0)  # for mutants that draw random numbers
    first = model_cases[0]
    failures = []
    try:
        port = result.mutant.load(first.source, **first.load_options)
        for case in model_cases:
            for gate in case.check(port, with_hints=with_hints):
                if not gate.passed:
                    result.add(gate)
                    failures.append(gate)
    except (RuntimeError, ValueError) as error:
        result.add_error(error)
    return failures


def share_of_bound(measurement: Measurement) -> float:
    """Return an error in units of its rounding bound, over all elements or the worst vector."""
    return max(measurement.ratio / bounds.ROUNDING_FACTOR, measurement.worst)


def largest_share(gate: GateResult) -> float:
    """Return the largest error of a gate in units of its bound."""
    return max(map(share_of_bound, gate.measurements), default=math.inf)


@contextlib.contextmanager
def make_models(
    seed: int = 1234, device: str = "cpu", *, odd: SigLipVisionConfig = cases.ODD
) -> Iterator[list[list[Case]]]:
    """Yield the cases of every small model of the default command.

    Args:
        seed: Seed of the weights.
        device: Device of the models.
        odd: Architecture of the models on which weights and rounding are judged.
    """
    checkpoint = SigLipVisionConfig(pooling_head=True)
    models = [
        *cases.weight_models(checkpoint, seed, odd=odd),
        *cases.regime_models(checkpoint, seed),
    ]
    with contextlib.ExitStack() as stack:
        loaded = [model.load(device, ("sdpa", "eager")) for model in models]
        yield [stack.enter_context(context) for context in loaded]


def examine_images(mutant: Mutant) -> MutantResult:
    """Run a mutant on images of all modes, with SigLIP and NaFlex preprocessing."""
    result = MutantResult(mutant)
    with mutant.applied():
        gates = [check_small_pixels(naflex, max_hints=0) for naflex in (False, True)]
    failures = [gate for gate in gates if not gate.passed]
    for gate in failures:
        result.add(gate)
    result.locate(failures)
    return result


@contextlib.contextmanager
def make_entrance_models() -> Iterator[list[Expected]]:
    """Yield what the reference computes for the entrances of the small models."""
    with contextlib.ExitStack() as stack:
        contexts = [
            entrance_models.expectations(config, IN_THIS_PROCESS)
            for config in entrance_models.MODELS.values()
        ]
        yield [stack.enter_context(context) for context in contexts]


def examine_entrances(
    mutant: Mutant, models: Iterable[Expected], *, stops: bool = False
) -> MutantResult:
    """Run a mutant through every entrance; its locations are names of entrances.

    Args:
        mutant: Mutant with the subject `entrances`, or an equivalent variant.
        models: Return value of `make_entrance_models`.
        stops: Whether to skip models once the mutant is detected.
    """
    result = MutantResult(mutant)
    with mutant.applied():
        for expected in models:
            if stops and result.detected:
                break
            gate = check_entrances(expected, mutant.load)
            if not gate.passed:
                result.add(gate)
            for finding in gate.findings:
                if finding.port not in mutant.locations.split():
                    result.false_locations.append(f"{gate.name}: {finding.port}")
    return result
