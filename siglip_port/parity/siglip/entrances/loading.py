"""Entrances that load and cast: weights are those of transformers, rounded once."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from siglip_port.checkpoint import LoadOptions
from siglip_port.model import SigLipVisionModel
from siglip_port.parity.results import Finding
from siglip_port.parity.sides import dtype_name
from siglip_port.parity.siglip import reference_features
from siglip_port.parity.siglip.big_vision_names import to_big_vision
from siglip_port.parity.siglip.cases import tensors_by_reference_name
from siglip_port.parity.siglip.entrances.subject import (
    Batch,
    Subject,
    compare,
    compare_bits,
    compare_memory,
    compare_model,
)
from siglip_port.parity.siglip.timm_names import to_timm


def check_from_hf(subject: Subject) -> Iterator[Finding]:
    """Load with options that change nothing."""
    weights = Path(subject.expected.source, "model.safetensors")
    tensors = subject.port.state_dict()
    default = SigLipVisionModel.from_hf(subject.expected.source)
    yield from compare_bits("from_hf(...)", default.state_dict(), tensors)
    options: dict[str, LoadOptions] = {
        "pooling_head=True": {"pooling_head": True},
        "config=": {"config": default.config},
        "dtype='auto'": {"dtype": "auto"},
        "device=torch.device('cpu')": {"device": torch.device("cpu")},
    }
    for label, values in options.items():
        model = SigLipVisionModel.from_pretrained(subject.expected.source, **values)
        yield from compare_bits(label, model.state_dict(), tensors)
        yield from check_loaded_state(label, model)
        if model.config != default.config:
            yield Finding(f"{label}: {model.config}, expected {default.config}")
    with torch.inference_mode():
        inferring = SigLipVisionModel.from_hf(subject.expected.source)
    if any(parameter.is_inference() for parameter in inferring.parameters()):
        yield Finding("in inference mode: the parameters could never be trained")
    from_file = SigLipVisionModel.from_hf(weights)
    yield from compare_bits("a weights file", from_file.state_dict(), tensors)
    yield from compare_memory("a model loaded again", from_file, subject.port)
    again = SigLipVisionModel.from_hf(subject.expected.source)
    yield from compare_memory("a model loaded again", again, default)
    yield from check_mixed_dtypes(subject)


def check_mixed_dtypes(subject: Subject) -> Iterator[Finding]:
    """Load files in which one tensor has more digits than all others: it keeps them."""
    weights = load_file(Path(subject.expected.source, "model.safetensors"))
    low = {name: tensor.bfloat16() for name, tensor in weights.items()}
    folder = Path(subject.scratch, "mixed")
    shutil.copytree(subject.expected.source, folder)
    for name in (min(weights), max(weights)):
        stored = {**low, name: weights[name]}
        save_file(stored, folder / "model.safetensors", {"format": "pt"})
        loaded = tensors_by_reference_name(SigLipVisionModel.from_hf(folder))
        expected = {key: tensor.float() for key, tensor in stored.items()}
        label = f"a file in bfloat16, but for {name} in float32"
        yield from compare_bits(label, loaded, expected)


def check_from_timm(subject: Subject) -> Iterator[Finding]:
    """Load the weights under timm's names."""
    config = subject.port.config
    tensors = to_timm(subject.expected.stored[torch.float32].tensors, naflex=config.naflex)
    path = Path(subject.scratch, "named-as-in-timm.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    model = SigLipVisionModel.from_hf(path, config=config)
    yield from compare_bits("timm's names", model.state_dict(), subject.port.state_dict())


def check_from_big_vision(subject: Subject) -> Iterator[Finding]:
    """Load the weights under big_vision's names."""
    config = subject.port.config
    arrays = to_big_vision(config, subject.port.state_dict())
    path = Path(subject.scratch, "named-as-in-big_vision.npz")
    stored = {f"params/img/{name}": array.astype(np.float32) for name, array in arrays.items()}
    np.savez(path, **stored)  # type: ignore[arg-type]
    model = SigLipVisionModel.from_hf(path, config=config)
    yield from compare_bits("big_vision's names", model.state_dict(), subject.port.state_dict())


def check_loaded_state(label: str, model: SigLipVisionModel) -> Iterator[Finding]:
    """Check that a loaded model is in eval mode on the CPU, and can be trained."""
    if model.training:
        yield Finding(f"{label}: the model is in training mode, expected eval mode")
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu" or not parameter.requires_grad:
            yield Finding(
                f"{label}: {name} is on {parameter.device} with requires_grad="
                f"{parameter.requires_grad}, expected cpu and True"
            )
            return


def check_device(subject: Subject) -> Iterator[Finding]:
    """Load to the device of the port and to others that exist: every tensor is there."""
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda:0")
    for device in devices:
        model = SigLipVisionModel.from_hf(subject.expected.source, device=device)
        places = {str(tensor.device) for tensor in model.state_dict().values()}
        if places != {device} or str(model.device) != device:
            yield Finding(f"device={device!r}: parameters are on {', '.join(sorted(places))}")
        state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
        yield from compare_bits(f"device={device!r}", state, subject.port.state_dict())


def check_dtype(subject: Subject) -> Iterator[Finding]:
    """Load in every dtype: weights are those that transformers loads, cast once."""
    for number, dtype in enumerate(subject.expected.stored):
        argument = dtype if number % 2 else dtype_name(dtype)
        label = f"dtype={argument!r}"
        model = SigLipVisionModel.from_hf(subject.expected.source, dtype=argument)
        expected = subject.expected.stored[dtype].tensors
        yield from compare_bits(label, tensors_by_reference_name(model), expected)
        yield from compare_dtypes(label, model, subject.expected.batches[0], dtype)


def check_cast(subject: Subject) -> Iterator[Finding]:
    """Cast a copy of the model: weights are cast once, outputs have the dtype."""
    for dtype in subject.expected.stored:
        expected = subject.expected.stored[dtype].tensors
        model = copy.deepcopy(subject.port).to(dtype)
        label = f"to({dtype})"
        yield from compare_bits(label, tensors_by_reference_name(model), expected)
        yield from compare_dtypes(label, model, subject.expected.batches[0], dtype)
    batch = subject.expected.batches[0]
    channels_last = copy.deepcopy(subject.port).double().to(memory_format=torch.channels_last)
    yield from compare_model("to(memory_format=torch.channels_last)", channels_last, batch)
    halved = copy.deepcopy(subject.port).half()
    if halved.dtype != torch.float16:
        yield Finding(f"half(): {halved.dtype}, expected torch.float16")


def compare_dtypes(
    label: str, model: SigLipVisionModel, batch: Batch, dtype: torch.dtype
) -> Iterator[Finding]:
    """Check that the model and its results have a dtype, for inputs of that dtype and others."""
    for input_dtype in {torch.float32, dtype}:
        inputs = {**batch.inputs, "pixel_values": batch.inputs["pixel_values"].to(input_dtype)}
        results = {
            "model.dtype": model.dtype,
            "tokens": model(**inputs).dtype,
            "embed": model.embed(**inputs).dtype,
            "embed(normalize=True)": model.embed(**inputs, normalize=True).dtype,
            "hidden_states": model.hidden_states(**inputs, layers=[0])[0].dtype,
        }
        for name, actual in results.items():
            if actual != dtype:
                yield Finding(f"{label}, inputs of {input_dtype}: {name} is {actual}")


def check_headless(subject: Subject) -> Iterator[Finding]:
    """Load without the pooling head: the same tokens, no head, and `pool` is refused."""
    batch = subject.expected.batches[0]
    interpolation = subject.port.config.interpolation
    model = SigLipVisionModel.from_hf(
        subject.expected.source, pooling_head=False, interpolation=interpolation
    ).double()
    expected = subject.expected.host.compute(
        reference_features.tokens_without_head, subject.expected.source, dict(batch.inputs)
    )
    yield from compare(
        "tokens", lambda x: batch.valid(model(**x)), batch.inputs, batch.valid(expected)
    )
    names = [name for name in model.state_dict() if "head" in name]
    if names or model.pooling_head is not None or model.config.pooling_head:
        yield Finding(f"the model has a pooling head, expected none ({len(names)} tensors)")
    try:
        model.pool(batch.expected.tokens)
    except ValueError:
        return
    yield Finding("pool() returned a result, expected ValueError without a pooling head")
