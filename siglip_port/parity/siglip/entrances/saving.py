"""Entrances that load, save, copy and cast: the same weights, configuration and results."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from siglip_port.checkpoint import LoadOptions
from siglip_port.config import SigLipVisionConfig
from siglip_port.model import SigLipVisionModel
from siglip_port.parity.results import Finding
from siglip_port.parity.sides import cast, dtype_name
from siglip_port.parity.siglip import reference, reference_features
from siglip_port.parity.siglip.cases import tensors_by_reference_name
from siglip_port.parity.siglip.entrances.subject import (
    Batch,
    Subject,
    compare,
    compare_bits,
    compare_model,
)
from siglip_port.parity.siglip.pixels import compare_pixels

# --- saving ---------------------------------------------------------------------------------------


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


def check_save_timm(subject: Subject) -> Iterator[Finding]:
    """Save for timm, and load the port again."""
    if subject.port.config.layer_norm_eps != SigLipVisionConfig.layer_norm_eps:
        return  # timm's models have no other eps
    folder = Path(subject.scratch, "timm")
    subject.port.save_timm(folder)
    again = SigLipVisionModel.from_hf(folder, interpolation=subject.expected.interpolation)
    yield from compare_loaded("read by from_hf", again, subject)


def compare_configs(
    what: str, config: Mapping[str, Any], expected: Mapping[str, Any]
) -> Iterator[Finding]:
    """Compare the fields of two configurations that describe the architecture."""
    ignored = {"_name_or_path", "transformers_version", "architectures", "dtype"}
    for name in sorted((config.keys() | expected.keys()) - ignored):
        value, other = config.get(name), expected.get(name)
        if value != other:
            yield Finding(f"{what}: {name} is {value!r}, expected {other!r}")


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


def compare_loaded(what: str, model: SigLipVisionModel, subject: Subject) -> Iterator[Finding]:
    """Compare weights, configuration, preprocessing and results of a loaded model."""
    port = subject.port
    yield from compare_bits(what, model.state_dict(), port.state_dict())
    if model.config != port.config:
        yield Finding(f"{what}: {model.config}, expected {port.config}")
    for name in ("resample", "image_mean", "image_std"):
        value = model.preprocessor_config.get(name)
        expected = port.preprocessor_config.get(name)
        if value != expected:
            yield Finding(f"{what}: {name} of preprocessing is {value!r}, expected {expected!r}")
    with cast(model, torch.float64):
        yield from compare_model(what, model, subject.expected.batches[0])


# --- loading --------------------------------------------------------------------------------------


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
    for what, values in options.items():
        model = SigLipVisionModel.from_pretrained(subject.expected.source, **values)
        yield from compare_bits(what, model.state_dict(), tensors)
        yield from check_loaded_state(what, model)
        if model.config != default.config:
            yield Finding(f"{what}: {model.config}, expected {default.config}")
    from_file = SigLipVisionModel.from_hf(weights)
    yield from compare_bits("a weights file", from_file.state_dict(), tensors)


def check_loaded_state(what: str, model: SigLipVisionModel) -> Iterator[Finding]:
    """Check that a loaded model is in eval mode on the CPU, and can be trained."""
    if model.training:
        yield Finding(f"{what}: the model is in training mode, expected eval mode")
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu" or not parameter.requires_grad:
            yield Finding(
                f"{what}: {name} is on {parameter.device} with requires_grad="
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
        what = f"dtype={argument!r}"
        model = SigLipVisionModel.from_hf(subject.expected.source, dtype=argument)
        expected = subject.expected.stored[dtype].tensors
        yield from compare_bits(what, tensors_by_reference_name(model), expected)
        yield from compare_dtypes(what, model, subject.expected.batches[0], dtype)


def check_cast(subject: Subject) -> Iterator[Finding]:
    """Cast a copy of the model: weights are cast once, outputs have the dtype."""
    for dtype in subject.expected.stored:
        expected = subject.expected.stored[dtype].tensors
        model = copy.deepcopy(subject.port).to(dtype)
        what = f"to({dtype})"
        yield from compare_bits(what, tensors_by_reference_name(model), expected)
        yield from compare_dtypes(what, model, subject.expected.batches[0], dtype)
    halved = copy.deepcopy(subject.port).half()
    if halved.dtype != torch.float16:
        yield Finding(f"half(): {halved.dtype}, expected torch.float16")


def compare_dtypes(
    what: str, model: SigLipVisionModel, batch: Batch, dtype: torch.dtype
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
        for name, found in results.items():
            if found != dtype:
                yield Finding(f"{what}, inputs of {input_dtype}: {name} is {found}")


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


# --- configuration --------------------------------------------------------------------------------


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
    """Change the reference's configuration one field at a time, and read it."""
    fields = subject.expected.host.compute(reference_features.describe_config)
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


def changed(value: Any) -> Any:  # noqa: ANN401 (any field)
    """Return another valid value of a field."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return "gelu" if value != "gelu" else "gelu_pytorch_tanh"
    if isinstance(value, int):
        return value * 2
    return value / 2 + 1e-3


# --- copies ---------------------------------------------------------------------------------------


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


COPIES: dict[str, Callable[[SigLipVisionModel], SigLipVisionModel]] = {
    "copy.deepcopy": copy.deepcopy,
    "pickle": pickled,
    "state_dict": saved_with_torch,
}


def check_copies(subject: Subject) -> Iterator[Finding]:
    """Copy the model: equal weights and results, in memory of its own."""
    addresses = {tensor.data_ptr() for tensor in subject.port.state_dict().values()}
    for what, make in COPIES.items():
        model = make(subject.port)
        yield from compare_loaded(what, model, subject)
        for name, tensor in model.state_dict().items():
            if tensor.data_ptr() in addresses:
                yield Finding(f"{what}: {name} shares memory with the original")
                break


# --- training -------------------------------------------------------------------------------------


def check_checkpointing(subject: Subject) -> Iterator[Finding]:
    """Recompute blocks in the backward pass: the same outputs and gradients."""
    batch = subject.expected.batches[0]
    model = copy.deepcopy(subject.port).double().train()
    plain = gradients(model, batch)
    for kwargs in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model.gradient_checkpointing_enable(kwargs)
        what = f"gradient_checkpointing_kwargs={kwargs}"
        if not model.is_gradient_checkpointing:
            yield Finding(f"{what}: is_gradient_checkpointing is False, expected True")
        recomputed = gradients(model, batch)
        if recomputed.keys() != plain.keys():
            yield Finding(f"{what}: {len(recomputed)} gradients, expected {len(plain)}")
            continue
        for name, gradient in recomputed.items():
            findings = [*compare(f"{what}: gradient of {name}", unchanged, gradient, plain[name])]
            yield from findings
            if findings:
                break
        yield from compare_model(what, model, batch)
    model.gradient_checkpointing_disable()
    if model.is_gradient_checkpointing:
        yield Finding("is_gradient_checkpointing is True after gradient_checkpointing_disable()")


def unchanged(tensor: Tensor) -> Tensor:
    """Return the tensor."""
    return tensor


def gradients(model: SigLipVisionModel, batch: Batch) -> dict[str, Tensor]:
    """Return the gradients of a sum of the embeddings, by parameter."""
    with torch.inference_mode(False), torch.enable_grad():
        inputs = {name: value.clone() for name, value in batch.inputs.items()}
        total = model.embed(**inputs).square().sum()
        parameters = dict(model.named_parameters())
        total.backward()
    values = {name: parameter.grad for name, parameter in parameters.items()}
    model.zero_grad(set_to_none=True)
    return {name: value for name, value in values.items() if value is not None}


def check_input_embeddings(subject: Subject) -> Iterator[Finding]:
    """Compare the weight of `get_input_embeddings()` with the reference's."""
    weight = subject.port.get_input_embeddings().weight.detach()
    expected = subject.expected.host.compute(reference_features.input_embeddings)
    if expected.ndim == 2:  # a linear layer over patches, channels last
        weight = weight.permute(0, 2, 3, 1).flatten(1)
    yield from compare_bits("its parameters", {"weight": weight}, {"weight": expected})
