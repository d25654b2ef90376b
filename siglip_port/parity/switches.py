"""Global switches of torch that change results: read, compared, restored, set to full precision."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

MATMUL = "torch.get_float32_matmul_precision()"
CUDNN = "torch.backends.cudnn.allow_tf32"
ALL_BACKENDS = "torch.backends.fp32_precision"
ALL_CUDA = "torch.backends.cudnn.fp32_precision"

FULL_PRECISION = ("none", "ieee")
AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps", "mtia", "hpu", "xla", "maia", "ipu")

Values = dict[str, Any]
"""Values of switches by name."""


@dataclass(frozen=True)
class Switch:
    """A global switch.

    Attributes:
        name: Expression that reads it.
        read: Function that returns its value. It raises AttributeError if this release of torch
            lacks the switch, RuntimeError if it was set in two ways that contradict each other.
        write: Function that sets it.
        defaults: torch's default, and equivalent values.
        exact: Value for full precision; None if it is no matter of precision.
        set_by: Switches that set this one, too.
    """

    name: str
    read: Callable[[], object]
    write: Callable[[Any], object]
    defaults: tuple[object, ...]
    exact: object = None
    set_by: tuple[str, ...] = ()


def backend_switch(
    path: str, defaults: tuple[object, ...], exact: object, set_by: tuple[str, ...] = ()
) -> Switch:
    """Return the switch that is an attribute of `torch.backends`."""
    parent, _, attribute = f"backends.{path}".rpartition(".")

    def write(value: object) -> None:
        setattr(operator.attrgetter(parent)(torch), attribute, value)

    read = functools.partial(operator.attrgetter(f"{parent}.{attribute}"), torch)
    return Switch(f"torch.{parent}.{attribute}", read, write, defaults, exact, set_by)


def autocast_switch(device: str) -> Switch:
    """Return the switch of autocast on a type of device."""
    return Switch(
        f"torch.is_autocast_enabled({device!r})",
        functools.partial(torch.is_autocast_enabled, device),
        functools.partial(torch.set_autocast_enabled, device),
        (False,),
    )


def set_default_device(device: torch.device) -> None:
    """Set the default device; for the CPU, remove the context that overrides it."""
    torch.set_default_device(None if device == torch.device("cpu") else device)


def flushes_denormals() -> bool:
    """Return whether the CPU replaces denormal numbers by 0, for which torch has no function."""
    smallest = torch.tensor(1e-310, dtype=torch.float64, device="cpu")
    return not bool(smallest * 0.5)


def all_switches() -> list[Switch]:
    """Return all switches, each after those that set it."""
    precision = functools.partial(backend_switch, defaults=FULL_PRECISION, exact="ieee")
    cudnn = functools.partial(backend_switch, defaults=(*FULL_PRECISION, "tf32"), exact="ieee")
    return [
        *map(autocast_switch, AUTOCAST_DEVICES),
        Switch(
            MATMUL,
            torch.get_float32_matmul_precision,
            torch.set_float32_matmul_precision,
            ("highest",),
            "highest",
        ),
        backend_switch("cudnn.allow_tf32", (True, False), exact=False),
        precision("fp32_precision"),
        precision("cudnn.fp32_precision", set_by=(ALL_BACKENDS,)),
        precision("cuda.matmul.fp32_precision", set_by=(MATMUL, ALL_BACKENDS, ALL_CUDA)),
        cudnn("cudnn.conv.fp32_precision", set_by=(CUDNN, ALL_BACKENDS)),
        cudnn("cudnn.rnn.fp32_precision", set_by=(CUDNN, ALL_BACKENDS)),
        precision("mkldnn.fp32_precision", set_by=(ALL_BACKENDS,)),
        precision("mkldnn.matmul.fp32_precision", set_by=(MATMUL, ALL_BACKENDS)),
        precision("mkldnn.conv.fp32_precision", set_by=(ALL_BACKENDS,)),
        precision("mkldnn.rnn.fp32_precision", set_by=(ALL_BACKENDS,)),
        Switch(
            "torch.get_default_dtype()",
            torch.get_default_dtype,
            torch.set_default_dtype,
            (torch.float32,),
        ),
        Switch(
            "torch.get_default_device()",
            torch.get_default_device,
            set_default_device,
            (torch.device("cpu"),),
        ),
        Switch("denormal numbers are 0", flushes_denormals, torch.set_flush_denormal, (False,)),
        Switch(
            "torch.is_grad_enabled()",
            torch.is_grad_enabled,
            torch.set_grad_enabled,
            (True,),
        ),
    ]


SWITCHES = all_switches()


def read_switches() -> Values:
    """Read all switches that can be read."""
    values = {}
    for switch in SWITCHES:
        # An unreadable switch has parts of its own in the list.
        with contextlib.suppress(AttributeError, RuntimeError):
            values[switch.name] = switch.read()
    return values


def write_switches(values: Values) -> None:
    """Set all switches that have other values.

    A switch that others set is written after them.
    """
    for switch in SWITCHES:
        if switch.name in values and read_switches().get(switch.name) != values[switch.name]:
            switch.write(values[switch.name])


def not_default(values: Values) -> dict[str, object]:
    """Return the switches that differ from torch's defaults, with the default."""
    defaults = {}
    for switch in SWITCHES:
        if switch.name in values and values[switch.name] not in switch.defaults:
            defaults[switch.name] = switch.defaults[0]
    return without_implied(defaults)


def changed(before: Values, after: Values) -> list[str]:
    """Return the names of the switches whose value changed."""
    names: dict[str, object] = {}
    for name in before.keys() & after.keys():
        if before[name] != after[name]:
            names[name] = None
    return list(without_implied(names))


def without_implied(switches: dict[str, object]) -> dict[str, object]:
    """Leave out the switches that another one among them sets."""
    result = {}
    for switch in SWITCHES:
        if switch.name in switches and not set(switch.set_by) & switches.keys():
            result[switch.name] = switches[switch.name]
    return result


@contextlib.contextmanager
def restored_switches() -> Iterator[None]:
    """Restore all switches on exit."""
    before = read_switches()
    try:
        yield
    finally:
        write_switches(before)


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Set the switches that trade precision for speed to full precision; restore them on exit."""
    with restored_switches():
        set_full_precision()
        set_full_precision()  # those that could not be read before their parts agreed
        yield


def set_full_precision() -> None:
    """Set the switches that trade precision for speed, as far as they can be read."""
    for switch in SWITCHES:
        value = read_switches().get(switch.name)
        if switch.exact is not None and value not in (None, switch.exact, FULL_PRECISION[0]):
            switch.write(switch.exact)
