"""The gates: what must hold, in order, for a port to be the reference's equal.

Usable on any pair of modules.

No bound is a number of absolute size, and every bound says where it comes from. What is not finite,
not reached, of another shape or not checked at all is inside no bound.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from siglip_port.parity import hints
from siglip_port.parity.metrics import bits, relative_error
from siglip_port.parity.taps import Recording, Tap, listening, record
from siglip_port.text import fold_blocks

FLOAT64_BOUND = 1e-10
FLOAT64_ORIGIN = "float64 rounding was measured at up to 3e-13, the weakest mistake of the catalogue at 1e-8 at its tap"
ROUNDING_FACTOR, WORST_FACTOR = 3.0, 5.0
ROUNDING_ORIGIN = (
    f"{ROUNDING_FACTOR:g} x the reference's own distance from float64, measured in this run "
    f"({WORST_FACTOR:g} x for "
    "the worst vector); where the reference is exact, so must be the port"
)
ISLAND_BOUND, ISLAND_COSINE = 1e-6, 0.5
"""What float32 rounding inside one step can be.

And how much alike its errors can be on inputs moved by 1e-4.
"""

HINTS = 6
"""How many taps that differ are explained.

The others only name what follows from the same mistake.
"""

MIXING_ORIGIN = "as in semantics: one picture alone against the same one in a batch"

MEANING = {
    "pixels": (
        "pictures of all sizes and modes become the same pixel_values on both sides, by the "
        "reference's processors for "
        "Pillow and, where it is installed, torchvision; all other gates give both sides the same "
        "pixels",
        "equality of every bit",
    ),
    "environment": (
        "nothing outside the two modules bends the result: both in eval mode and of one dtype, no "
        "autocast, no TF32",
        "equality",
    ),
    "config": (
        "the same architecture, field by field: activation, eps, heads, sizes, head",
        "equality",
    ),
    "weights": (
        "every tensor of the one is a tensor of the other, none shares memory",
        "equality of every bit",
    ),
    "liveness": (
        "every picture, every pixel that counts and every parameter moves an output; two runs are "
        "alike to the bit; a "
        "batch is its pictures one by one; outputs are finite, and not the same for all",
        "equality; batches in float64: 1e-10",
    ),
    "semantics": (
        "both compute the same function: in float64, at every tap, free-running and given right "
        "inputs",
        f"relative error {FLOAT64_BOUND:g}, which is a cosine of 1 - 5e-21; {FLOAT64_ORIGIN}",
    ),
    "interface": (
        "the port's other entrances agree with the one that is proven: embed() is pool() of the "
        "tokens, and of unit "
        "length where that is asked for; of NaFlex towers, packed patches give the tokens of the "
        "pictures",
        "equality of every bit; lengths to four roundings of the dtype, packed patches to 1e-10 in "
        "float64",
    ),
    "rounding": (
        "the port rounds no worse than the reference does: in float32, bfloat16 and float16, at "
        "every tap",
        ROUNDING_ORIGIN,
    ),
}
"""What each gate means, and its bound. A gate is run whatever the ones before it found.

It only says where.
"""

Inputs = Any
"""What a module is called with.

A tensor, a tuple of positional arguments, or a dict of named ones.
"""

Call = Callable[[nn.Module, Inputs], Mapping[str, Tensor]]
Weights = Callable[[nn.Module], Mapping[str, Tensor]]


def call(module: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Calls a module and names what it returns.

    Its own names, `output` for a single tensor, else `output.0`, ...
    """
    if isinstance(inputs, Mapping):
        returned = module(**inputs)
    else:
        returned = module(*inputs) if isinstance(inputs, tuple) else module(inputs)
    if isinstance(returned, Tensor):
        return {"output": returned}
    items = (
        returned.items()
        if isinstance(returned, Mapping)
        else ((f"output.{i}", t) for i, t in enumerate(returned))
    )
    return {name: tensor for name, tensor in items if isinstance(tensor, Tensor)}


@dataclass(frozen=True)
class Side:
    """One of the two implementations.

    Attributes:
        module: in `eval()` mode.
        call: how it is run; both sides must name their outputs alike.
        attentions: the implementations of attention that it can be switched to; the first is exact
            in float64.
        attend: switches it.
    """

    module: nn.Module
    call: Call = call
    attentions: tuple[str, ...] = ("",)
    attend: Callable[[str], None] = lambda _: None

    def run(self, inputs: Inputs) -> dict[str, Tensor]:
        """Returns its outputs."""
        with torch.inference_mode():
            return dict(self.call(self.module, inputs))


@dataclass(frozen=True)
class Measurement:
    """How far the port was from the truth at one place, in one run, and how far it may be.

    Attributes:
        run: `float64, free-running`, `float64, teacher-forced`, or the dtype.
        reference: the point, or output, in the reference's names.
        port: the same in the port's.
        error: ||port - truth|| / ||truth||; the truth is the reference in float64 on the same
            numbers.
        bound: what `error` may be at most.
        noise: in a low dtype, the reference's own error; else 0.
        worst: of the worst vector, in units of its bound; at most 1. 0 where it is not bounded.
    """

    run: str
    reference: str
    port: str
    error: float
    bound: float
    noise: float = 0.0
    worst: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether it is inside its bounds. What is not finite is inside none."""
        return math.isfinite(self.error) and self.error <= self.bound and self.worst <= 1

    @property
    def ratio(self) -> float:
        """The error in units of the reference's own."""
        return self.error / self.noise if self.noise else (0.0 if self.error == 0 else math.inf)


@dataclass(frozen=True)
class Finding:
    """Something that is not as it must be, with its address.

    Attributes:
        what: what was found, and what was expected.
        reference: the module, tensor or output, in the reference's names; empty where there is
            none.
        port: the same in the port's names.
        error: its relative error there; for semantics, given right inputs.
        hint: what the error looks like; empty where it looks like nothing known.
    """

    what: str
    reference: str = ""
    port: str = ""
    error: float = math.nan
    hint: str = ""


@dataclass(frozen=True)
class Gate:
    """The result of one gate.

    Attributes:
        name: of the gate.
        checked: number of things that were checked. A gate that checked nothing has not passed.
        bound: what was allowed, and where that comes from.
        findings: what was not as it must be.
        measurements: the figures, where the gate measures.
        unseen: points of the reference that the port computes without passing the module that is
            tapped there.
        islands: points whose float64 values the port rounds to float32; the rounding gate judges
            these.
    """

    name: str
    checked: int
    bound: str
    findings: tuple[Finding, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    unseen: tuple[str, ...] = ()
    islands: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether all was as it must be, and there was something to check."""
        return not self.findings and self.checked > 0


@dataclass
class Truth:
    """What the reference computes on some inputs: exactly, and with its own rounding.

    Attributes:
        dtype: in which weights and inputs are given; all runs see the same numbers.
        inputs: rounded to it.
        exact: outputs and taps in float64.
        noise: at every output and tap, the reference's own error in `dtype`, and that of its worst
            vector; the larger one of its attentions.
        outputs: what it returns in `dtype`, by attention.
    """

    dtype: torch.dtype
    inputs: Inputs
    exact: Recording
    noise: dict[str, tuple[float, float]] = field(default_factory=dict)
    outputs: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def observe(
    reference: Side,
    inputs: Inputs,
    points: list[str],
    dtype: torch.dtype,
    attentions: tuple[str, ...] | None = None,
    *,
    rounding: bool = True,
) -> Truth:
    """Runs the reference.

    Once in float64 and, if its rounding is wanted, once with each attention in `dtype`.

    Raises:
        ValueError: what it computes is no truth: not finite, or not float64 throughout; or its
            weights are not finite.
    """
    inputs = cast_inputs(inputs, dtype)
    reference.attend(reference.attentions[0])
    exact_inputs = cast_inputs(inputs, torch.float64)
    with cast(reference.module, dtype, torch.float64):
        _check_finite(reference.module, dtype)
        exact = record(reference.module, points, lambda: reference.run(exact_inputs))
        for name, tensor in {**exact.outputs, **exact.taps}.items():
            if not tensor.isfinite().all():
                raise ValueError(
                    f"the reference itself gives NaN or infinity ({name}), so there is nothing to "
                    "compare with: the "
                    "inputs hold such numbers, or the weights are so large that they make them"
                )
            if not tensor.any():
                raise ValueError(
                    f"the reference gives nothing but zeros ({name}): two dead models would agree; "
                    "give it weights "
                    "that matter, with `siglip_port.parity.randomise` for example"
                )
        _check_smooth(reference, exact_inputs, exact.outputs)
    truth = Truth(dtype, inputs, exact)
    for attention in (attentions or reference.attentions) if rounding else ():
        reference.attend(attention)
        with cast(reference.module, dtype):
            run = follow(reference, inputs, exact, {point: point for point in exact.taps})
        truth.outputs[attention] = run.outputs
        for name, (error, worst) in run.errors.items():
            if not math.isfinite(error):
                raise ValueError(
                    f"the reference itself gives NaN or infinity in {str(dtype)[6:]} ({name}), so "
                    "there is nothing to "
                    "compare with: the dtype is too narrow for these weights"
                )
            before = truth.noise.get(name, (0.0, 0.0))
            truth.noise[name] = (max(error, before[0]), max(worst, before[1]))
    reference.attend(reference.attentions[0])
    return truth


def _check_finite(reference: nn.Module, dtype: torch.dtype) -> None:
    """Refuses weights that are not finite: in what is NaN on both sides, no difference shows."""
    if bad := [
        name for name, weight in reference.named_parameters() if not weight.isfinite().all()
    ]:
        raise ValueError(
            f"the reference's weights hold NaN or infinity in {str(dtype)[6:]}, so there is "
            "nothing to compare with: "
            f"{', '.join(fold_blocks(bad))}"
        )


def _check_smooth(reference: Side, inputs: Inputs, outputs: Mapping[str, Tensor]) -> None:
    """Makes sure that the truth is computed in float64 throughout, by its second difference along a random direction.

    A smooth function of a step h = 1e-8 has second differences of about 1e-16; an island of float32
    inside, as the softmax of transformers' eager attention is, makes them 1e-8, since it rounds
    each of the three runs another way.
    """
    runs = []
    for step in (1e-8, -1e-8):
        generator = torch.Generator().manual_seed(0)

        def moved(
            tensor: Tensor, step: float = step, generator: torch.Generator = generator
        ) -> Tensor:
            return tensor * (
                1
                + step
                * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype).to(tensor)
            )

        runs.append(reference.run(map_tensors(inputs, moved)))
    for name, there in runs[0].items():
        back = runs[1][name]
        bend = float((there - 2 * outputs[name] + back).norm() / outputs[name].norm())
        if bend > FLOAT64_BOUND:
            raise ValueError(
                f"the float64 run of the reference is not float64 throughout ({name} is rough to "
                f"{bend:.0e}), so it "
                "is no truth; transformers' eager attention has a float32 softmax: use sdpa"
            )


@dataclass(frozen=True)
class Followed:
    """One run of a side, compared with the truth as it passed.

    Attributes:
        outputs: what it returned.
        errors: relative error, and that of the worst vector, at each output and tap, in the
            reference's names. An output of another shape has an infinite one.
        unseen: taps that cannot be compared, and why. That is no mistake in itself: a port may fuse
            modules, or call them in pieces.
        kept: what passed the taps that were to be kept.
    """

    outputs: dict[str, Tensor]
    errors: dict[str, tuple[float, float]]
    unseen: dict[str, str]
    kept: dict[str, Tensor]


class _Meter:
    """Compares what passes one tap.

    In one call, in several one after the other along the first axis, or repeatedly.
    """

    def __init__(self, truth: Tensor) -> None:
        self.truth = truth
        self.done, self.squares, self.worst, self.fits = 0, 0.0, 0.0, True

    def take(self, value: Tensor) -> Tensor | None:
        """Returns the truth for this value; None where there is none of its shape."""
        start = self.done % max(1, len(self.truth))
        truth = self.truth[start : start + len(value)]
        if truth.shape != value.shape:
            self.fits = False
            return None
        self.done += len(value)
        lengths = (value.double() - truth.double()).norm(dim=-1)
        self.squares += float(lengths.square().sum())
        self.worst = (
            max(self.worst, float(lengths.max())) if math.isfinite(self.squares) else math.nan
        )
        return truth

    @property
    def complete(self) -> bool:
        """Whether what passed can be laid beside the truth.

        The whole of it, once or several times.
        """
        return self.fits and self.done > 0 and self.done % max(1, len(self.truth)) == 0

    def errors(self) -> tuple[float, float]:
        if not self.complete:
            return math.inf, math.inf
        times = self.done // max(1, len(self.truth))
        size = float(self.truth.double().norm())
        if size == 0:
            return math.nan, math.nan
        vectors = self.truth.numel() / self.truth.shape[-1]
        return math.sqrt(self.squares / times) / size, self.worst / size * math.sqrt(vectors)


def follow(
    side: Side,
    inputs: Inputs,
    exact: Recording,
    points: Mapping[str, str],
    *,
    forced: bool = False,
    keep: frozenset[str] = frozenset(),
) -> Followed:
    """Runs a side beside the truth.

    Args:
        side: in the dtype in which it is to be run.
        inputs: in that dtype.
        exact: the truth.
        points: the side's points -> the truth's.
        forced: whether, after each tap, the truth goes on instead of the side's own: then each
            module is given right inputs, and its error is its own.
        keep: points of the truth at which the side's values are kept.
    """
    meters = {
        theirs: _Meter(exact.taps[theirs]) for theirs in points.values() if theirs in exact.taps
    }
    kept: dict[str, list[Tensor]] = {}
    misfits: dict[str, list[Tensor]] = {}
    reached: dict[str, None] = {}

    def visit(point: str, value: Tensor) -> Tensor | None:
        theirs = points[point]
        if theirs not in meters:
            return None
        reached[theirs] = None
        first = meters[theirs].done < len(meters[theirs].truth)
        truth = meters[theirs].take(value)
        if theirs in keep and first:
            (misfits if truth is None else kept).setdefault(theirs, []).append(value.clone())
        return (
            truth.to(value.dtype, copy=True) if forced and truth is not None else None
        )  # it may be written to

    with torch.inference_mode(), listening(side.module, list(points), visit):
        outputs = side.run(map_tensors(inputs, Tensor.clone))
    errors = {name: meters[name].errors() for name in meters if meters[name].complete}
    for name, truth in exact.outputs.items():
        if name in outputs:
            meter = _Meter(truth)
            meter.take(outputs[name])
            errors[name] = meter.errors()
    values = {name: tensors[0] for name, tensors in misfits.items()}
    values |= {
        name: tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        for name, tensors in kept.items()
    }
    unseen = {
        name: "the port calls this module with other shapes"
        for name in reached
        if name not in errors
    }
    unseen |= {name: "the port never calls this module" for name in meters if name not in reached}
    return Followed(
        outputs, errors, {name: unseen[name] for name in exact.taps if name in unseen}, values
    )


# --- gates ----------------------------------------------------------------------------------------


def environment(sides: Mapping[str, nn.Module]) -> Gate:
    """Nothing outside the modules may bend the result.

    Modes, dtypes, and torch's switches for speed.
    """
    findings = []
    for side, module in sides.items():
        if training := [name or "model" for name, part in module.named_modules() if part.training]:
            what = f"{len(training)} modules of the {side} are in training mode, first {training[0]}; call eval()"
            findings.append(Finding(what, port=training[0]))
        dtypes = {tensor.dtype for tensor in module.parameters() if tensor.is_floating_point()}
        if len(dtypes) > 1:
            findings.append(
                Finding(
                    f"the {side}'s parameters are of {len(dtypes)} dtypes: "
                    f"{sorted(map(str, dtypes))}"
                )
            )
    switches = {
        "autocast": (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"), False),
        "the float32 matmul precision": (torch.get_float32_matmul_precision(), "highest"),
        "TF32 in cuDNN": (torch.backends.cudnn.allow_tf32 and torch.cuda.is_available(), False),
        "the default dtype": (torch.get_default_dtype(), torch.float32),
    }
    for name, (found, expected) in switches.items():
        if found != expected:
            findings.append(Finding(f"{name} is {found}, expected {expected}"))
    return Gate("environment", 2 * len(sides) + len(switches), "equality", tuple(findings))


def config(port: Mapping[str, object], reference: Mapping[str, object]) -> Gate:
    """The same architecture, field by field."""
    findings = [
        Finding(
            f"config: {name} is {port.get(name)!r} in the port, {value!r} in the reference",
            name,
            name,
        )
        for name, value in reference.items()
        if port.get(name) != value
    ]
    return Gate("config", len(reference), "equality", tuple(findings))


def weights(port: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> Gate:
    """Every tensor of the one is, bit for bit, a tensor of the other.

    Both under the reference's names.

    The outputs cannot vouch for all of them: a bias of the keys, for one, changes no attention.
    """
    findings = []
    for name in sorted(port.keys() | reference.keys()):
        if name not in port or name not in reference:
            findings.append(
                Finding(f"only the {'port' if name in port else 'reference'} has it", name, name)
            )
            continue
        ours, theirs = port[name], reference[name]
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            found = f"{ours.dtype} {list(ours.shape)} in the port, {theirs.dtype} {list(theirs.shape)} in the reference"
            findings.append(Finding(found, name, name))
        elif not torch.equal(bits(ours), bits(theirs)):
            count = int((bits(ours) != bits(theirs)).view(ours.numel(), -1).any(dim=1).sum())
            what = f"{count} of {ours.numel()} elements differ"
            hint = hints.explain_weight(ours, name, reference)
            findings.append(Finding(what, name, name, relative_error(ours, theirs), hint))
    for group in _sharing_storage(port):
        findings.append(
            Finding(f"these share one memory: {', '.join(group[:4])}", group[0], group[0])
        )
    return Gate("weights", len(reference), "equality of every bit", tuple(findings))


def _sharing_storage(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    places: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            places.setdefault(tensor.data_ptr(), []).append(name)
    return [names for names in places.values() if len(names) > 1]


def liveness(port: Side, reference: Side, inputs: Inputs) -> Gate:
    """Every picture, patch and parameter matters; two runs are bit-equal; pictures do not mix.

    Gradients tell what matters: of a random sum of all outputs, with respect to inputs and
    parameters. What has none in the port must have none in the reference. Two dead models agree
    perfectly.

    Args:
        port: in `eval()` mode.
        reference: likewise.
        inputs: at least two of them, along the first axis.
    """
    findings: list[Finding] = []
    checked = 0
    first, second = port.run(inputs), port.run(inputs)
    for name, output in first.items():
        checked += 2
        if not output.isfinite().all():
            findings.append(Finding(f"{name} is not finite", name, name))
        elif not torch.equal(bits(output), bits(second[name])):
            findings.append(
                Finding(
                    f"{name} is another one each time (relative difference "
                    f"{relative_error(second[name], output):.1e})",
                    name,
                    name,
                )
            )
    with cast(port.module, torch.float64):
        wide = cast_inputs(inputs, torch.float64)
        batch = port.run(wide)
        alone = [port.run(picture(wide, i)) for i in range(batch_size(wide))]
        for name, output in batch.items():
            checked += 2
            if relative_error(output[:1].expand_as(output), output) < FLOAT64_BOUND:
                what = "it is the same for every input, so that agreement proves nothing"
                findings.append(Finding(what, name, name))
            together = torch.cat([one[name] for one in alone])
            error = relative_error(together, output) if together.shape == output.shape else math.inf
            if not error <= FLOAT64_BOUND:
                what = f"{name} of a batch is not that of its pictures one by one (relative difference {error:.1e})"
                findings.append(Finding(what, name, name, error, "pictures of one batch mix"))
    with cast(reference.module, torch.float32):
        alive = _what_matters(reference, cast_inputs(inputs, torch.float32), parameters=False)[0]
    with cast(port.module, torch.float32):
        narrow = cast_inputs(inputs, torch.float32)
        try:
            ours, dead = _what_matters(port, narrow, parameters=True)
        except RuntimeError:  # a port may work in place, or without gradients
            ours, dead = (
                [~mask for mask in alive],
                [name for name, _ in port.module.named_parameters()],
            )
        if dead or not all(torch.equal(*pair) for pair in zip(ours, alive, strict=True)):
            ours, dead = _confirmed(port, narrow, ours, dead, alive)
    for i, (mine, theirs) in enumerate(zip(ours, alive, strict=True)):
        checked += mine.numel()
        if not theirs.any():
            findings.append(
                Finding(f"nothing in input {i} matters to the reference", "inputs", "inputs")
            )
        if count := int((mine != theirs).sum()):
            what = f"{count} places of input {i} matter to one side and not to the other"
            findings.append(Finding(what, "inputs", "inputs"))
    checked += sum(1 for _ in port.module.parameters())
    findings += [
        Finding(
            "this parameter changes no output",
            hint="never used, or used up before it matters",
            port=name,
        )
        for name in dead
    ]
    return Gate(
        "liveness",
        checked,
        f"equality, and no gradient is zero; batches: {FLOAT64_BOUND:g} ({MIXING_ORIGIN})",
        tuple(findings),
    )


def _what_matters(
    side: Side, inputs: Inputs, *, parameters: bool
) -> tuple[list[Tensor], list[str]]:
    """Returns where inputs have a gradient, and the names of the parameters that have none."""
    named = dict(side.module.named_parameters()) if parameters else {}
    wanted = {name: parameter.requires_grad for name, parameter in named.items()}
    leaves: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        leaves.append(tensor.detach().clone().requires_grad_())
        return leaves[-1]

    try:
        with torch.enable_grad():
            for parameter in named.values():
                parameter.requires_grad_(True)
            outputs = side.call(side.module, map_tensors(inputs, leaf))
            total = torch.zeros((), device=leaves[0].device)
            for seed, output in enumerate(outputs.values()):
                noise = torch.randn(
                    output.shape, generator=torch.Generator().manual_seed(seed), dtype=output.dtype
                )
                total = total + (output * noise.to(output.device)).sum() / output.detach().norm()
            grads = torch.autograd.grad(total, [*leaves, *named.values()], allow_unused=True)
    finally:
        for name, parameter in named.items():
            parameter.requires_grad_(wanted[name])
    matters = [
        torch.zeros_like(x[:, 0], dtype=torch.bool) if g is None else (g != 0).any(dim=1)
        for x, g in zip(leaves, grads[: len(leaves)], strict=True)
    ]
    pairs = zip(named, grads[len(leaves) :], strict=True)
    return matters, [name for name, grad in pairs if grad is None or not grad.any()]


def _confirmed(
    side: Side, inputs: Inputs, ours: list[Tensor], dead: list[str], alive: list[Tensor]
) -> tuple[list[Tensor], list[str]]:
    """What gradients say against a port, confirmed without them.

    What is suspected is changed, bit by bit.

    Args:
        side: the port.
        inputs: of it.
        ours: where inputs matter to the port, as far as its gradients tell.
        dead: parameters that seem to matter nowhere.
        alive: where inputs matter to the reference.
    """
    generator = torch.Generator().manual_seed(0)
    leaves: list[Tensor] = []
    inputs = map_tensors(inputs, lambda tensor: leaves.append(tensor.clone()) or leaves[-1])  # type: ignore[func-returns-value]
    before = side.run(map_tensors(inputs, Tensor.clone))

    def matters(tensor: Tensor, places: Tensor | float = 1.0) -> bool:
        """Whether outputs move when `tensor` does, at some places."""
        original = tensor.clone()
        tensor += (
            torch.randn(tensor.shape, generator=generator).to(tensor)
            * original.abs().mean()
            * places
        )
        now = side.run(map_tensors(inputs, Tensor.clone))
        tensor.copy_(original)
        return any(
            not torch.equal(bits(now[name]), bits(output)) for name, output in before.items()
        )

    found = [mask.clone() for mask in ours]
    for leaf, masks, truths in zip(leaves, found, alive, strict=True):
        for example, mask, truth in zip(leaf, masks, truths, strict=True):
            for expected in (True, False):
                suspect = (mask != truth) & (truth == expected)
                for tile in itertools.product(
                    *([slice(i, None, 3) for i in range(3)] for _ in mask.shape)
                ):
                    places = torch.zeros_like(mask)
                    places[tile] = suspect[tile]
                    if places.any():
                        mask[places] = matters(example, places[None])
    with torch.no_grad():
        return found, [name for name in dead if not matters(side.module.get_parameter(name))]


def semantics(
    port: Side, reference: Side, truth: Truth, taps: list[Tap], *, explained: int = HINTS
) -> Gate:
    """In float64 both compute the same.

    At every tap free-running, and given right inputs (teacher-forced).

    Args:
        port: in `eval()` mode.
        reference: likewise.
        truth: what it computes.
        taps: where to compare.
        explained: how many of the taps that differ get a hint.
    """
    points = {tap.port: tap.reference for tap in taps}
    names = {tap.reference: tap.port for tap in taps}
    inputs = cast_inputs(truth.inputs, torch.float64)
    with cast(port.module, truth.dtype, torch.float64):
        free = follow(port, inputs, truth.exact, points)
        forced = follow(port, inputs, truth.exact, points, forced=True)
    order = [*truth.exact.taps, *truth.exact.outputs]
    wrong = [
        name for name in order if name in free.errors and not free.errors[name][0] <= FLOAT64_BOUND
    ]
    local = [
        name
        for name in order
        if name in forced.errors and not forced.errors[name][0] <= FLOAT64_BOUND
    ]
    islands = local if _are_islands(port, reference, truth, points, forced, local) else []
    if islands:
        wrong, local = [], []

    missing = [name for name in truth.exact.outputs if name not in free.outputs]
    findings = [Finding("the port does not return it", name, name) for name in missing]
    # A module that is not called is named once, not for its input too.
    modules = {tap.port for tap in taps if not tap.port.endswith(":input")}
    uncalled = {
        n
        for n in free.unseen
        if wrong and (names[n] in modules or names[n].removesuffix(":input") not in modules)
    }
    suspects = [name for name in order if name in local or name in uncalled]
    if wrong and not any(order.index(name) <= order.index(wrong[0]) for name in suspects):
        suspects.insert(0, wrong[0])
    shown = frozenset([name for name in suspects if name in truth.exact.taps][:explained])
    with cast(port.module, truth.dtype, torch.float64):
        kept = (
            follow(port, inputs, truth.exact, points, forced=True, keep=shown).kept if shown else {}
        )
    for name in suspects:
        if name in free.unseen:
            shape = (
                f", {list(kept[name].shape)} for {list(truth.exact.taps[name].shape)}"
                if name in kept
                else ""
            )
            findings.append(Finding(free.unseen[name] + shape, name, names[name], math.inf))
            continue
        hint = ""
        if name in kept:
            hint = explain(reference, truth, name, kept[name])
        elif name in truth.exact.outputs:
            hint = hints.explain_output(free.outputs[name], truth.exact.outputs[name])
        error = (forced if name in local else free).errors[name][0]
        findings.append(
            Finding(
                f"differs in float64, bound {FLOAT64_BOUND:g}",
                name,
                names.get(name, name),
                error,
                hint,
            )
        )

    measurements = [
        Measurement(
            f"float64, {run}",
            name,
            names.get(name, name),
            followed.errors[name][0],
            ROUNDING_FACTOR * truth.noise[name][0] if islands else FLOAT64_BOUND,
        )
        for run, followed in (("free-running", free), ("teacher-forced", forced))
        for name in order
        if name in followed.errors
    ]
    return Gate(
        "semantics",
        len(measurements),
        f"{FLOAT64_BOUND:g}: {FLOAT64_ORIGIN}",
        tuple(findings),
        tuple(measurements),
        tuple(() if findings else free.unseen),
        tuple(islands),
    )


def _are_islands(
    port: Side,
    reference: Side,
    truth: Truth,
    points: Mapping[str, str],
    forced: Followed,
    local: list[str],
) -> bool:
    """Whether all that differs is float32 rounding inside the port, in steps that it never does in float64.

    Such a step, a softmax that is always float32 say, is no mistake, and leaves errors of 1e-8. A
    mistake of that size is a smooth function of the inputs: moved by 1e-4, they leave it as it is.
    Rounding errors come out anew.
    """
    sizes = [forced.errors[name][0] for name in local]
    if not local or not truth.noise or not all(size <= ISLAND_BOUND for size in sizes):
        return False
    if not all(
        name in truth.exact.taps for name in local
    ):  # an output that is wrong although all before it is right
        return False
    inputs = cast_inputs(truth.inputs, torch.float64)
    generator = torch.Generator().manual_seed(0)
    fields: list[list[Tensor]] = []
    for size in (0.0, 1e-4, 1e-4, 1e-4):

        def moved(tensor: Tensor, size: float = size) -> Tensor:
            return tensor * (1 + size * torch.randn(tensor.shape, generator=generator).to(tensor))

        given = map_tensors(inputs, moved)
        with cast(reference.module, truth.dtype, torch.float64):
            exact = record(
                reference.module, list(truth.exact.taps), functools.partial(reference.run, given)
            )
        with cast(port.module, truth.dtype, torch.float64):
            kept = follow(port, given, exact, points, forced=True, keep=frozenset(local)).kept
        fields.append([kept[name] - exact.taps[name] for name in local])
    return all(
        min(abs(float((first * other).sum() / (first.norm() * other.norm()))) for other in others)
        < ISLAND_COSINE
        for first, *others in zip(*fields, strict=True)
    )


def explain(reference: Side, truth: Truth, point: str, value: Tensor) -> str:
    """The hint for a tap that differs.

    Mistakes are tried on what the reference's module is given there.
    """
    given: list[Tensor] = []
    module = dict(reference.module.named_modules())[point.partition(":")[0]]

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.extend(t.clone() for t in (*args, *kwargs.values()) if isinstance(t, Tensor))

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with cast(reference.module, truth.dtype, torch.float64):
            reference.run(cast_inputs(truth.inputs, torch.float64))
            return hints.explain(
                reference.module, point, given[0] if given else None, truth.exact.taps, value
            )
    finally:
        handle.remove()


def rounding(port: Side, truth: Truth, taps: list[Tap]) -> Gate:
    """In the truth's dtype, the port is no further from float64 than a small multiple of what the reference is."""
    names = {tap.reference: tap.port for tap in taps}
    with cast(port.module, truth.dtype):
        free = follow(port, truth.inputs, truth.exact, {tap.port: tap.reference for tap in taps})
    measurements = []
    for name in (*truth.exact.taps, *truth.exact.outputs):
        if name in free.errors:
            (error, worst), (noise, worst_noise) = free.errors[name], truth.noise[name]
            share = (
                worst / (WORST_FACTOR * worst_noise)
                if worst_noise
                else (0.0 if worst == 0 else math.inf)
            )
            bound = ROUNDING_FACTOR * noise
            measurements.append(
                Measurement(
                    str(truth.dtype)[6:], name, names.get(name, name), error, bound, noise, share
                )
            )
    first = next((m for m in measurements if not m.passed), None)
    findings = [
        Finding("the port does not return it", name, name)
        for name in truth.exact.outputs
        if name not in free.outputs
    ]
    if first is not None:
        coarse = max(first.ratio, WORST_FACTOR * first.worst)
        what = f"rounds {coarse:.1f} x as coarsely as the reference in {first.run}, bound {ROUNDING_FACTOR:g}"
        hint = "the first step that does: computed in a narrower dtype, or by another formula"
        findings.append(Finding(what, first.reference, first.port, first.error, hint))
    return Gate(
        f"rounding {str(truth.dtype)[6:]}",
        len(measurements),
        ROUNDING_ORIGIN,
        tuple(findings),
        tuple(measurements),
    )


# --- helpers --------------------------------------------------------------------------------------


@contextlib.contextmanager
def cast(module: nn.Module, *dtypes: torch.dtype) -> Iterator[None]:
    """Turns the module's floating point tensors into one dtype after the other, and afterwards into what they were."""
    tensors = [*module.parameters(), *module.buffers()]
    before = [tensor.data for tensor in tensors]
    try:
        for dtype in dtypes:
            module.to(dtype)
        yield
    finally:
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data = data


def map_tensors(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """Applies a function to every floating point tensor of some inputs.

    What else there is stays.
    """
    if isinstance(inputs, Mapping):
        return {name: map_tensors(value, change) for name, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(map_tensors(value, change) for value in inputs)
    return change(inputs) if isinstance(inputs, Tensor) and inputs.is_floating_point() else inputs


def cast_inputs(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Rounds inputs to a dtype."""
    return map_tensors(inputs, lambda tensor: tensor.to(dtype))


def picture(inputs: Inputs, i: int) -> Inputs:
    """The `i`th of a batch of inputs, as a batch of one."""
    if isinstance(inputs, Mapping):
        return {name: picture(value, i) for name, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(picture(value, i) for value in inputs)
    return inputs[i : i + 1] if isinstance(inputs, Tensor) else inputs


def batch_size(inputs: Inputs) -> int:
    """The length of the first axis of the first tensor."""
    if isinstance(inputs, Tensor):
        return len(inputs)
    return batch_size(next(iter(inputs.values() if isinstance(inputs, Mapping) else inputs)))
