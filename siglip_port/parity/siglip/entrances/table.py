"""The entrances of the port, and the gate that checks each of them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from siglip_port.model import SigLipVisionModel
from siglip_port.parity.gates import MEANING
from siglip_port.parity.guard import describe, is_out_of_memory
from siglip_port.parity.results import Finding, GateResult, Section
from siglip_port.parity.sides import PORT_ERRORS, cast
from siglip_port.parity.siglip.entrances import (
    features,
    images,
    loading,
    models,
    optimized,
    positions,
    refusals,
    saving,
    settings,
    traces,
    training,
)
from siglip_port.parity.siglip.entrances.subject import (
    FLOAT32_BOUND,
    Expected,
    Subject,
    compare_bits,
    values_within,
)
from siglip_port.parity.siglip.reference_process import References

Check = Callable[[Subject], Iterator[Finding]]
"""Function that yields a finding per difference; those without a location get the entrance's."""


@dataclass(frozen=True)
class Entrance:
    """A public method, function or option of the port.

    Attributes:
        name: Its name, as it is called.
        reference: Counterpart in transformers.
        check: Function that compares the two.
        in_float64: Whether the port is checked in float64 and in float32; only float32 shows
            autocast.
        needs: Names of the entrances that this one calls; if one of them differs, this one is not
            checked, because it would only repeat that.
    """

    name: str
    reference: str
    check: Check
    in_float64: bool = False
    needs: tuple[str, ...] = ()


RUN = "forward"
ENTRANCES = (
    Entrance("forward", "tokens", features.check_forward, in_float64=True),
    Entrance("pool", "pooled", features.check_pool, in_float64=True, needs=(RUN,)),
    Entrance("embed", "pooled", features.check_embed, in_float64=True, needs=("pool",)),
    Entrance(
        "forward(two_threads)",
        "tokens",
        traces.check_call_inside_call,
        in_float64=True,
        needs=(RUN,),
    ),
    Entrance(
        "forward(after_inference_mode)",
        "tokens",
        traces.check_call_after_inference,
        needs=(RUN,),
    ),
    Entrance("forward(after_error)", "tokens", traces.check_call_after_error, needs=(RUN,)),
    Entrance(
        "hidden_states",
        "hidden_states",
        features.check_hidden_states,
        in_float64=True,
        needs=(RUN,),
    ),
    Entrance(
        "attention_maps", "attentions", features.check_attention_maps, in_float64=True, needs=(RUN,)
    ),
    Entrance(
        "pooling_attention",
        "head.attention",
        features.check_pooling_attention,
        in_float64=True,
        needs=(RUN,),
    ),
    Entrance("interpolate_positions", "position_embedding", positions.check_interpolate_positions),
    Entrance("patchify", "convert_image_to_patches", images.check_patchify),
    Entrance("pack", "convert_image_to_patches", images.check_pack, needs=("patchify",)),
    Entrance("ImageProcessor", "image_processor", images.check_image_processor),
    Entrance("ImageProcessor(invalid)", "image_processor", refusals.check_refused_images),
    Entrance(
        "embed_images",
        "pooled",
        images.check_embed_images,
        in_float64=True,
        needs=("embed", "ImageProcessor"),
    ),
    Entrance("to_hf", "config", settings.check_config_to_hf),
    Entrance("config.from_hf", "config", settings.check_config_from_hf),
    Entrance("from_hf", "from_pretrained", loading.check_from_hf),
    Entrance("from_hf(timm)", "timm", loading.check_from_timm),
    Entrance("from_hf(big_vision)", "big_vision", loading.check_from_big_vision),
    Entrance("from_hf(device=...)", "from_pretrained", loading.check_device),
    Entrance("from_hf(dtype=...)", "from_pretrained", loading.check_dtype),
    Entrance(
        "from_hf(pooling_head=False)", "from_pretrained", loading.check_headless, needs=(RUN,)
    ),
    Entrance("deepcopy", "deepcopy", saving.check_deepcopy, needs=("embed",)),
    Entrance("to(dtype)", "to", loading.check_cast, needs=("deepcopy",)),
    Entrance("save_hf", "save_pretrained", saving.check_save_hf, needs=("embed", "ImageProcessor")),
    Entrance("save_timm", "save_pretrained", saving.check_save_timm, needs=("embed",)),
    Entrance("pickle", "pickle", saving.check_pickle, needs=("embed",)),
    Entrance("load_state_dict", "load_state_dict", saving.check_state_dict, needs=("embed",)),
    Entrance(
        "gradient_checkpointing_enable",
        "gradient_checkpointing_enable",
        training.check_checkpointing,
        needs=("deepcopy",),
    ),
    Entrance("get_input_embeddings", "get_input_embeddings", training.check_input_embeddings),
    Entrance("optimize", "pooled", optimized.check_optimize, needs=("embed",)),
)
"""All entrances, in an order in which each follows those that it needs."""


def check_entrance_models(references: References) -> Iterator[Section]:
    """Check every entrance on each of `models.MODELS`; yield a section per model."""
    for name, config in models.MODELS.items():
        with models.expectations(config, references) as expected:
            yield Section(name, models.WEIGHTS, (check_entrances(expected),))


def check_entrances(
    expected: Expected, load: Callable[..., SigLipVisionModel] = SigLipVisionModel.from_hf
) -> GateResult:
    """Check every entrance; one that raises is a finding, and the others still run.

    Args:
        expected: Checkpoint, with the reference's results.
        load: Function that loads the port.
    """
    findings: list[Finding] = []
    differing: set[str] = set()
    checked = 0
    with tempfile.TemporaryDirectory(prefix="siglip_port-") as scratch:
        try:
            port = load(expected.source, interpolation=expected.interpolation)
        except PORT_ERRORS as error:  # any error: a port that cannot be loaded differs
            return result(1, [raised(error, "from_hf", "from_pretrained")])
        subject = Subject(port, expected, Path(scratch))
        original = {name: tensor.clone() for name, tensor in port.state_dict().items()}
        for entrance in ENTRANCES:
            if not differing.isdisjoint(entrance.needs):
                differing.add(entrance.name)  # not checked, nor is what needs it
                continue
            checked += 1
            differences = check_entrance(entrance, subject)
            changed = list(compare_bits("the weights afterwards", port.state_dict(), original))
            if changed:
                differences += [place_at(entrance, finding) for finding in changed]
                port = load(expected.source, interpolation=expected.interpolation)
                subject = Subject(port, expected, Path(scratch))
            if differences:
                differing.add(entrance.name)
                findings += differences
    return result(checked, findings)


def result(checked: int, findings: list[Finding]) -> GateResult:
    """Return the result of the gate."""
    return GateResult("interface", checked, MEANING["interface"].bound, tuple(findings))


def check_entrance(entrance: Entrance, subject: Subject) -> list[Finding]:
    """Check one entrance; return its first difference, which counts the others."""
    findings: list[Finding] = []
    try:
        with torch.no_grad():
            for finding in differences(entrance, subject):
                findings.append(finding)
    except PORT_ERRORS as error:  # any error of the port: it raises where it should not
        if is_out_of_memory(error):
            raise
        findings.append(raised(error, entrance.name, entrance.reference))
    if not findings:
        return []
    first = place_at(entrance, findings[0])
    if len(findings) > 1:
        others = f"{first.message}; {len(findings) - 1} more checks of it fail"
        first = replace(first, message=others)
    return [first]


def place_at(entrance: Entrance, finding: Finding) -> Finding:
    """Return a finding with the location of an entrance, unless it has one."""
    if finding.reference:
        return finding
    return replace(finding, reference=entrance.reference, port=entrance.name)


def differences(entrance: Entrance, subject: Subject) -> Iterator[Finding]:
    """Yield a finding per difference, of those in float32 only without any in float64."""
    if not entrance.in_float64:
        yield from entrance.check(subject)
        return
    is_equal = True
    with cast(subject.port, torch.float64), values_within(subject.float64_bound):
        for finding in entrance.check(subject):
            is_equal = False
            yield finding
    if is_equal:
        with values_within(FLOAT32_BOUND):
            yield from entrance.check(subject)


def raised(error: BaseException, port: str, reference: str) -> Finding:
    """Return the finding for a port that raises."""
    return Finding(f"raises {describe(error)}", reference, port)
