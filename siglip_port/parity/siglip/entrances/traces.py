"""Traces of calls: what a call changes for another one, during it and after it."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from siglip_port.model import SigLipVisionModel
from siglip_port.parity.metrics import relative_error
from siglip_port.parity.results import Finding
from siglip_port.parity.siglip.entrances.subject import (
    FLOAT32_ROUNDING,
    Batch,
    Subject,
    tolerance,
)


def check_call_inside_call(subject: Subject) -> Iterator[Finding]:
    """Call the port in the middle of another call, as two threads do: neither changes the other."""
    for batch in subject.expected.batches:
        for other in subject.expected.batches:
            for moment in (0.3, 0.7):
                yield from compare_nested_calls(subject.port, batch, other, moment)


def compare_nested_calls(
    port: SigLipVisionModel, batch: Batch, other: Batch, moment: float, outer: str = "forward"
) -> Iterator[Finding]:
    """Compare the tokens of a call, and those of another one in the middle of it.

    Args:
        port: Port.
        batch: Inputs of the outer call.
        other: Inputs of the inner call.
        moment: Share of the outer call's modules that run before the inner call.
        outer: Method that is called; for others than `forward`, only the inner call is compared.
    """
    method = port if outer == "forward" else functools.partial(getattr(port, outer), layers=[0])
    inner: list[Tensor] = []
    with act_in_the_middle(
        port, lambda: method(**batch.inputs), moment, lambda: inner.append(port(**other.inputs))
    ):
        result = method(**batch.inputs)
    tokens = {f"{other.name}, called during {outer}": (other, inner[0])}
    if outer == "forward":
        tokens[f"{batch.name}, if {other.name} are run meanwhile"] = (batch, result)
    for label, (expected, actual) in tokens.items():
        error = relative_error(expected.valid(actual), expected.valid(expected.expected.tokens))
        if not error <= max(FLOAT32_ROUNDING, tolerance.get()):
            yield Finding(f"{label}: differs", error=error)


def check_call_after_error(subject: Subject) -> Iterator[Finding]:
    """Check that a call that raises leaves no trace: the modes, and the results of other calls."""
    yield from compare_after_errors(subject, subject.port.forward, "forward")


def compare_after_errors(
    subject: Subject, method: Callable[..., object], name: str
) -> Iterator[Finding]:
    """Let a method raise in the middle, and refuse its inputs; then compare modes and tokens."""
    batch = subject.expected.batches[0]
    port = subject.port
    for trainable in (True, False):
        with requires_grad(port, trainable), torch.enable_grad():
            interrupt(port, functools.partial(method, **batch.inputs))
            refuse(functools.partial(method, pixel_values=torch.zeros(())))
            if not torch.is_grad_enabled():
                yield Finding(f"gradients are disabled after {name} has raised")
                torch.set_grad_enabled(True)
        if port.training:
            yield Finding(f"the model is in training mode after {name} has raised")
        tokens = batch.valid(port(**batch.inputs))
        error = relative_error(tokens, batch.valid(batch.expected.tokens))
        if not error <= max(FLOAT32_ROUNDING, tolerance.get()):
            yield Finding(f"tokens differ after {name} has raised", error=error)
            return


def check_traces(subject: Subject, name: str) -> Iterator[Finding]:
    """Check calls of `forward` during another method, and after it has raised."""
    batch = subject.expected.batches[0]
    yield from compare_nested_calls(subject.port, batch, batch, 0.5, outer=name)
    method = functools.partial(getattr(subject.port, name), layers=[1])
    yield from compare_after_errors(subject, method, name)


def check_call_after_inference(subject: Subject) -> Iterator[Finding]:
    """Compute gradients of pixels after a call in inference mode, with and without trained weights.

    Tensors that are kept from inference mode have no gradients.
    """
    for batch in subject.expected.batches:
        for trainable in (True, False):
            if not has_gradients(copy.deepcopy(subject.port), batch):
                return  # the gate `gradients` reports it
            with requires_grad(subject.port, trainable):
                with torch.inference_mode():
                    subject.port(**batch.inputs)
                if not has_gradients(subject.port, batch):
                    kind = "trained" if trainable else "frozen"
                    yield Finding(f"{batch.name}, {kind} weights: no gradients of the pixels")


def has_gradients(port: SigLipVisionModel, batch: Batch) -> bool:
    """Whether gradients of the pixels can be computed; not by a port that works in place."""
    with torch.inference_mode(False), torch.enable_grad():
        pixels = batch.inputs["pixel_values"].clone().requires_grad_()
        try:
            embeddings = port.embed(**{**batch.inputs, "pixel_values": pixels})
            torch.autograd.grad(embeddings.sum(), pixels)
        except RuntimeError:
            return False
    return True


class InterruptionError(Exception):
    """Raised in the middle of a call."""


def interrupt(port: SigLipVisionModel, call: Callable[[], object]) -> None:
    """Raise an error in the middle of a call."""

    def fail() -> None:
        raise InterruptionError

    with act_in_the_middle(port, call, 0.5, fail), contextlib.suppress(InterruptionError):
        call()


def refuse(call: Callable[[], object]) -> None:
    """Call with invalid arguments."""
    with contextlib.suppress(ValueError, TypeError, RuntimeError):
        call()


@contextlib.contextmanager
def requires_grad(port: SigLipVisionModel, value: bool) -> Iterator[None]:
    """Let all parameters require gradients, or none."""
    before = {name: parameter.requires_grad for name, parameter in port.named_parameters()}
    port.requires_grad_(value)
    try:
        yield
    finally:
        for name, parameter in port.named_parameters():
            parameter.requires_grad_(before[name])


@contextlib.contextmanager
def act_in_the_middle(
    port: SigLipVisionModel, call: Callable[[], object], moment: float, act: Callable[[], object]
) -> Iterator[None]:
    """Act once during the next call of a port, after a share `moment` of its modules.

    Args:
        port: Port.
        call: The same call, to count its modules.
        moment: Share of the modules that run before.
        act: Function to call.
    """
    remaining = max(1, int(moment * count_module_calls(port, call)))

    def hook(*_: object) -> None:
        nonlocal remaining
        remaining -= 1
        if remaining == 0:
            act()

    handles = [module.register_forward_pre_hook(hook) for module in port.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def count_module_calls(port: SigLipVisionModel, call: Callable[[], object]) -> int:
    """Return how often modules are called during a call."""
    count = 0

    def hook(*_: object) -> None:
        nonlocal count
        count += 1

    handles = [module.register_forward_pre_hook(hook) for module in port.modules()]
    call()
    for handle in handles:
        handle.remove()
    return count
