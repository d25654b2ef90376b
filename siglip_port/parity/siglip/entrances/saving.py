"""Entrances that save and copy: the same weights, configuration and results."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from siglip_port.config import SigLipVisionConfig
from siglip_port.model import SigLipVisionModel
from siglip_port.parity.results import Finding
from siglip_port.parity.sides import cast
from siglip_port.parity.siglip import reference, reference_features
from siglip_port.parity.siglip.cases import tensors_by_reference_name
from siglip_port.parity.siglip.entrances.subject import (
    Subject,
    compare_bits,
    compare_memory,
    compare_model,
)
from siglip_port.parity.siglip.pixels import compare_pixels
from siglip_port.parity.siglip.timm_names import to_timm


def check_save_hf(subject: Subject) -> Iterator[Finding]:
    """Read a saved folder back with transformers, and with the port."""
    folder = Path(subject.scratch, "saved")
    subject.port.save_hf(folder)
    saved = subject.expected.host.compute(reference_features.read_saved, str(folder), torch.float32)
    original = subject.expected.stored[torch.float32]
    yield from compare_bits("read by transformers", saved.tensors, original.tensors)
    yield from compare_configs("config.json", saved.config, original.config)
    yield from compare_saved_processor(subject, str(folder))
    again = SigLipVisionModel.from_hf(folder, interpolation=subject.expected.interpolation)
    yield from compare_loaded("read by from_hf", again, subject)
    if again.preprocessor_config != subject.port.preprocessor_config:
        yield Finding(
            f"read by from_hf: preprocessor_config is {again.preprocessor_config}, expected "
            f"{subject.port.preprocessor_config}"
        )
    yield from check_saved_dtype(subject)
    yield from check_saved_headless(subject)


def check_saved_headless(subject: Subject) -> Iterator[Finding]:
    """Save a model without its pooling head: transformers and the port load one without."""
    interpolation = subject.expected.interpolation
    model = SigLipVisionModel.from_hf(
        subject.expected.source, pooling_head=False, interpolation=interpolation
    )
    folder = Path(subject.scratch, "headless")
    model.save_hf(folder)
    saved = subject.expected.host.compute(reference_features.read_saved, str(folder), torch.float32)
    yield from compare_bits("without head", saved.tensors, tensors_by_reference_name(model))
    if SigLipVisionModel.from_hf(folder, interpolation=interpolation).config != model.config:
        yield Finding("without head: from_hf reads another configuration")


def check_saved_dtype(subject: Subject) -> Iterator[Finding]:
    """Save in float64: transformers reads that dtype from the configuration."""
    folder = Path(subject.scratch, "float64")
    with cast(subject.port, torch.float64):
        subject.port.save_hf(folder)
    saved = subject.expected.host.compute(reference_features.read_saved, str(folder), torch.float32)
    if saved.config.get("dtype") != "float64":
        yield Finding(f"in float64: dtype is {saved.config.get('dtype')!r} in config.json")


def check_save_timm(subject: Subject) -> Iterator[Finding]:
    """Save for timm, and load the port again."""
    if subject.port.config.layer_norm_eps != SigLipVisionConfig.layer_norm_eps:
        return  # timm's models have no other eps
    folder = Path(subject.scratch, "timm")
    subject.port.save_timm(folder)
    expected = to_timm(
        subject.expected.stored[torch.float32].tensors, naflex=subject.port.config.naflex
    )
    yield from compare_bits("timm's names", load_file(folder / "model.safetensors"), expected)
    again = SigLipVisionModel.from_hf(folder, interpolation=subject.expected.interpolation)
    yield from compare_loaded("read by from_hf", again, subject)


def compare_configs(
    label: str, config: Mapping[str, Any], expected: Mapping[str, Any]
) -> Iterator[Finding]:
    """Compare the fields of two configurations that describe the architecture."""
    ignored = {"_name_or_path", "transformers_version", "architectures", "dtype"}
    for name in sorted((config.keys() | expected.keys()) - ignored):
        value, other = config.get(name), expected.get(name)
        if value != other:
            yield Finding(f"{label}: {name} is {value!r}, expected {other!r}")


def compare_saved_processor(subject: Subject, folder: str) -> Iterator[Finding]:
    """Let transformers preprocess an image with the saved configuration."""
    images = subject.expected.samples[:1]
    pixels = subject.expected.host.compute(
        reference_features.process_images, reference.fields_of(subject.port.config), folder, images
    )
    for backend, expected in subject.expected.pixels.items():
        message = compare_pixels(pixels[backend][0], expected[0])
        if message:
            yield Finding(f"preprocessor_config.json, read by transformers, {backend}: {message}")


def compare_loaded(label: str, model: SigLipVisionModel, subject: Subject) -> Iterator[Finding]:
    """Compare weights, configuration, preprocessing and results of a loaded model."""
    port = subject.port
    yield from compare_bits(label, model.state_dict(), port.state_dict())
    if model.config != port.config:
        yield Finding(f"{label}: {model.config}, expected {port.config}")
    for name in ("resample", "image_mean", "image_std"):
        value = model.preprocessor_config.get(name)
        expected = port.preprocessor_config.get(name)
        if value != expected:
            yield Finding(f"{label}: {name} of preprocessing is {value!r}, expected {expected!r}")
    with cast(model, torch.float64):
        yield from compare_model(label, model, subject.expected.batches[0])


def pickled(port: SigLipVisionModel) -> SigLipVisionModel:
    """Return the model after pickling."""
    copied: SigLipVisionModel = pickle.loads(pickle.dumps(port))
    return copied


def saved_with_torch(port: SigLipVisionModel) -> SigLipVisionModel:
    """Return a new model with the state dict, saved and loaded by torch."""
    file = io.BytesIO()
    torch.save(port.state_dict(), file)
    file.seek(0)
    model = SigLipVisionModel(port.config).eval()
    model.load_state_dict(torch.load(file))
    model.preprocessor_config = port.preprocessor_config
    return model


def check_deepcopy(subject: Subject) -> Iterator[Finding]:
    """Copy the model."""
    yield from compare_copy(copy.deepcopy(subject.port), subject)


def check_pickle(subject: Subject) -> Iterator[Finding]:
    """Pickle the model."""
    yield from compare_copy(pickled(subject.port), subject)


def check_state_dict(subject: Subject) -> Iterator[Finding]:
    """Load the state dict into a new model."""
    yield from compare_copy(saved_with_torch(subject.port), subject)


def compare_copy(model: SigLipVisionModel, subject: Subject) -> Iterator[Finding]:
    """Compare weights and results of a copy, which must have memory of its own."""
    yield from compare_loaded("the copy", model, subject)
    yield from compare_memory("the copy", model, subject.port)
