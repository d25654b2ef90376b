"""The entrance `optimize`: engines that are built without compilation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from siglip_port.model import SigLipVisionModel
from siglip_port.parity import bounds
from siglip_port.parity.metrics import relative_error
from siglip_port.parity.results import Finding
from siglip_port.parity.siglip import reference_features
from siglip_port.parity.siglip.entrances.subject import FLOAT32_BOUND, Subject

ENGINES = ("eager", "prepacked", "prepacked-gelu")


def check_optimize(subject: Subject) -> Iterator[Finding]:
    """Compare tokens and embeddings of optimized models with the reference's, in float32."""
    from siglip_port.optimize import optimize, with_engine  # parity works without it

    folder = Path(subject.scratch, "engines")
    for engine in ENGINES:
        if engine != "eager" and not torch.backends.mkldnn.is_available():
            continue  # prepacked weights are oneDNN's
        model = with_engine(subject.port, engine, cache_dir=folder)
        yield from compare_rounding(f"engine {engine}", model, subject)
        yield from check_changed_weights(f"engine {engine}", model, subject)
        if model.preprocessor_config != subject.port.preprocessor_config:
            yield Finding(
                f"engine {engine}: preprocessor_config is {model.preprocessor_config}, expected "
                f"{subject.port.preprocessor_config}"
            )
    model = optimize(subject.port, engines=["prepacked"], cache_dir=folder)
    label = f"optimize(..., engines=['prepacked']), which chose {model.choice.engine}"
    yield from compare_rounding(label, model, subject)


def check_changed_weights(
    label: str, model: SigLipVisionModel, subject: Subject
) -> Iterator[Finding]:
    """Change the weights of an engine in place: it uses the new ones, and restores the old ones."""
    batch = subject.expected.batches[0]
    inputs = {**batch.inputs, "pixel_values": batch.inputs["pixel_values"].float()}
    original = {name: tensor.clone() for name, tensor in subject.port.state_dict().items()}
    changed = SigLipVisionModel(subject.port.config).eval()
    changed.load_state_dict({name: 1.1 * tensor for name, tensor in original.items()})
    model.load_state_dict(changed.state_dict())
    error = relative_error(model.embed(**inputs), changed.embed(**inputs))
    model.load_state_dict(original)
    if not error <= FLOAT32_BOUND:
        yield Finding(f"{label}: differs from the model with other weights", error=error)


def compare_rounding(label: str, model: SigLipVisionModel, subject: Subject) -> Iterator[Finding]:
    """Compare the rounding of a float32 model with the reference's own, for every batch."""
    host = subject.expected.host
    factor = bounds.WORST_FACTOR
    for batch in subject.expected.batches:
        inputs = {**batch.inputs, "pixel_values": batch.inputs["pixel_values"].float()}
        rounded = host.compute(reference_features.compute_outputs, inputs, torch.float32)
        outputs = {"tokens": model(**inputs), "pooled": model.embed(**inputs)}
        exact = {"tokens": batch.expected.tokens, "pooled": batch.expected.pooled}
        for name, value in outputs.items():
            expected = exact[name]
            noise = rounded[name]
            if name == "tokens":
                value, noise, expected = map(batch.valid, (value, noise, expected))
            if value.shape != expected.shape:
                shapes = f"shape {list(value.shape)}, expected {list(expected.shape)}"
                yield Finding(f"{label}, {batch.name}: {name} has {shapes}")
                continue
            error = relative_error(value, expected)
            if not error <= factor * relative_error(noise, expected):
                message = f"rounding error of {name} in float32 is over {factor:g}x the reference's"
                yield Finding(f"{label}, {batch.name}: {message}", error=error)
