"""Entrances of the configuration, field by field."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from siglip_port.config import SigLipVisionConfig
from siglip_port.parity.results import Finding
from siglip_port.parity.siglip import reference_features
from siglip_port.parity.siglip.entrances.subject import (
    Subject,
)


def check_config_to_hf(subject: Subject) -> Iterator[Finding]:
    """Compare every field that `to_hf` writes with the reference's configuration."""
    fields = subject.expected.host.compute(reference_features.describe_config)
    written = subject.port.config.to_hf()
    for name, reference_name in fields.names.items():
        value, expected = written.get(reference_name), fields.values[reference_name]
        if reference_name not in written or value != expected:
            yield Finding(f"{reference_name} ({name}) is {value!r}, expected {expected!r}")
    model_type = written.get("model_type")
    if model_type != fields.values["model_type"]:
        yield Finding(f"model_type is {model_type!r}, expected {fields.values['model_type']!r}")


def check_config_from_hf(subject: Subject) -> Iterator[Finding]:
    """Read the reference's configuration as it is, and with one field changed at a time."""
    fields = subject.expected.host.compute(reference_features.describe_config)
    own = SigLipVisionConfig.from_hf(fields.values)
    for name, reference_name in fields.names.items():
        if getattr(own, name) != fields.values[reference_name]:
            yield Finding(
                f"{name} is {getattr(own, name)!r}, expected {fields.values[reference_name]!r}"
            )
    yield from check_defaults(fields)
    averaging = replace(own, pooling_head=False, mean_pooling=True)
    if SigLipVisionConfig.from_hf(averaging.to_hf()) != averaging:
        yield Finding("from_hf(to_hf()) loses mean_pooling")
    for name, reference_name in fields.names.items():
        value = changed(fields.values[reference_name])
        read = SigLipVisionConfig.from_hf({**fields.values, reference_name: value})
        if name == "patch_size" and read.naflex:
            value = fields.values[reference_name] * 2
        if getattr(read, name) != value:
            yield Finding(
                f"{name} is {getattr(read, name)!r} for {reference_name}={value!r}, expected it"
            )
        again = SigLipVisionConfig.from_hf(read.to_hf())
        if again != read:
            yield Finding(f"from_hf(to_hf()) is {again}, expected {read}")


def check_defaults(fields: reference_features.ConfigFields) -> Iterator[Finding]:
    """Leave out one field of the configuration at a time, as published files do with many."""
    for name, reference_name in fields.names.items():
        others = {key: value for key, value in fields.values.items() if key != reference_name}
        default = fields.defaults[reference_name]
        try:
            read = SigLipVisionConfig.from_hf(others)
        except ValueError:  # it does not go with the other fields
            continue
        if getattr(read, name) != default:
            yield Finding(
                f"{name} is {getattr(read, name)!r} without {reference_name}, expected {default!r}"
            )


def changed(value: Any) -> Any:  # noqa: ANN401 (any field)
    """Return another valid value of a field."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return "gelu" if value != "gelu" else "gelu_pytorch_tanh"
    if isinstance(value, int):
        return value * 2
    return value / 2 + 1e-3
