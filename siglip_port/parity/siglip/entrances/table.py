"""The entrances of the port, and the gate that checks each of them."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from siglip_port.config import SigLipVisionConfig
from siglip_port.model import SigLipVisionModel
from siglip_port.parity.gates import MEANING
from siglip_port.parity.results import Finding, GateResult
from siglip_port.parity.sides import ReferenceHost, cast
from siglip_port.parity.siglip import reference, reference_features
from siglip_port.parity.siglip.entrances import features, images, optimized, saving
from siglip_port.parity.siglip.entrances.subject import Batch, Subject
from siglip_port.parity.siglip.sample_images import entrance_images

Check = Callable[[Subject], Iterator[Finding]]
"""Function that yields a finding per difference; those without a location get the entrance's."""


@dataclass(frozen=True)
class Entrance:
    """A public method, function or option of the port.

    Attributes:
        name: Its name, as it is called.
        reference: Counterpart in transformers.
        check: Function that compares the two.
        in_float64: Whether the port is cast to float64 for the check.
        needs: Names of the entrances that this one calls; if one of them differs, this one is not
            checked, because it would only repeat that.
    """

    name: str
    reference: str
    check: Check
    in_float64: bool = False
    needs: tuple[str, ...] = ()


RUN = "forward"  # what most entrances need
ENTRANCES = (
    Entrance("forward", "last_hidden_state", features.check_forward, in_float64=True),
    Entrance("pool", "pooler_output", features.check_pool, in_float64=True, needs=(RUN,)),
    Entrance("embed", "pooler_output", features.check_embed, in_float64=True, needs=(RUN, "pool")),
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
    Entrance("pack, patchify", "convert_image_to_patches", images.check_patches),
    Entrance("ImageProcessor", "image_processor", images.check_image_processor),
    Entrance(
        "embed_images",
        "pooler_output",
        images.check_embed_images,
        in_float64=True,
        needs=(RUN, "embed", "ImageProcessor"),
    ),
    Entrance("config.to_hf", "config", saving.check_config_to_hf),
    Entrance("SigLipVisionConfig.from_hf", "config", saving.check_config_from_hf),
    Entrance("from_hf", "from_pretrained", saving.check_from_hf),
    Entrance("from_hf(device=...)", "from_pretrained", saving.check_device),
    Entrance("from_hf(dtype=...)", "from_pretrained", saving.check_dtype),
    Entrance("from_hf(pooling_head=False)", "from_pretrained", saving.check_headless, needs=(RUN,)),
    Entrance("to(dtype)", "to", saving.check_cast),
    Entrance("save_hf", "save_pretrained", saving.check_save_hf, needs=(RUN, "ImageProcessor")),
    Entrance("save_timm", "save_pretrained", saving.check_save_timm, needs=(RUN,)),
    Entrance("copy, pickle, state_dict", "state_dict", saving.check_copies, needs=(RUN,)),
    Entrance(
        "gradient_checkpointing_enable",
        "gradient_checkpointing_enable",
        saving.check_checkpointing,
        needs=(RUN,),
    ),
    Entrance("get_input_embeddings", "get_input_embeddings", saving.check_input_embeddings),
    Entrance("optimize", "pooler_output", optimized.check_optimize, needs=(RUN, "embed")),
)
"""All entrances, in an order in which each follows those that it needs."""

FIXED = SigLipVisionConfig(
    embed_dim=40,
    image_size=32,
    patch_size=6,
    num_attention_heads=4,
    num_encoder_blocks=3,
    mlp_hidden_dim=56,
    pooling_head=True,
    layer_norm_eps=1e-5,
    hidden_act="gelu",
)
"""Model of fixed size. No value is a default: a lost one cannot be replaced by it."""

NAFLEX = replace(FIXED, naflex=True, image_size=30, layer_norm_eps=1e-6, num_encoder_blocks=2)
"""NaFlex model, with the eps that timm's models have."""

MAX_NUM_PATCHES = 21

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes in which checkpoints are loaded."""


def preprocessor(config: SigLipVisionConfig) -> dict[str, Any]:
    """Return a `preprocessor_config.json` whose values are not the defaults."""
    common = {
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": [0.45, 0.5, 0.55],
        "image_std": [0.3, 0.25, 0.2],
        "rescale_factor": 1 / 256,
    }
    if config.naflex:
        sizes = {"patch_size": config.patch_size, "max_num_patches": MAX_NUM_PATCHES}
        return {**common, **sizes, "image_processor_type": "Siglip2ImageProcessor", "resample": 3}
    size = {"height": config.image_size, "width": config.image_size}
    return {**common, "size": size, "image_processor_type": "SiglipImageProcessor", "resample": 2}


def check_entrances(
    source: str, host: ReferenceHost, load: Callable[..., SigLipVisionModel]
) -> GateResult:
    """Check every entrance; one that raises is a finding, and the others still run.

    Args:
        source: Folder of a checkpoint of `FIXED` or `NAFLEX`; a `preprocessor_config.json` is
            written to it.
        host: Reference, loaded from it.
        load: `SigLipVisionModel.from_hf`.
    """
    findings: list[Finding] = []
    differing: set[str] = set()
    checked = 0
    with tempfile.TemporaryDirectory(prefix="siglip_port-") as scratch:
        try:
            subject = prepare(source, scratch, host, load)
        except Exception as error:  # any error: a port that cannot be loaded differs
            return result(1, [raised(error, "from_hf", "from_pretrained")])
        for entrance in ENTRANCES:
            if not differing.isdisjoint(entrance.needs):
                continue
            checked += 1
            found = check_entrance(entrance, subject)
            if found:
                differing.add(entrance.name)
                findings += found
    return result(checked, findings)


def result(checked: int, findings: list[Finding]) -> GateResult:
    """Return the result of the gate."""
    return GateResult("interface", checked, MEANING["interface"].bound, tuple(findings))


def check_entrance(entrance: Entrance, subject: Subject) -> list[Finding]:
    """Check one entrance; return findings at its location."""
    context: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if entrance.in_float64:
        context = cast(subject.port, torch.float64)
    findings = []
    try:
        with context, torch.no_grad():
            for finding in entrance.check(subject):
                if not finding.reference:
                    finding = replace(finding, reference=entrance.reference, port=entrance.name)
                findings.append(finding)
    except Exception as error:  # any error of the port: it raises where it should not
        findings.append(raised(error, entrance.name, entrance.reference))
    return findings


def raised(error: Exception, port: str, reference: str) -> Finding:
    """Return the finding for a port that raises."""
    return Finding(f"raises {type(error).__name__}: {error}", reference, port)


def prepare(
    source: str, scratch: str, host: ReferenceHost, load: Callable[..., SigLipVisionModel]
) -> Subject:
    """Load the port, and compute the reference's results for all batches and images."""
    described = host.compute(reference_features.describe_config)
    config = NAFLEX if "num_patches" in described.values else FIXED
    fields = reference.fields_of(config)
    path = Path(source, "preprocessor_config.json")
    path.write_text(json.dumps(preprocessor(config)), encoding="utf-8")
    port = load(source, interpolation=None if config.naflex else "hf")

    batches = []
    for name, inputs, grid in batch_inputs(config):
        expected = host.compute(reference_features.compute_features, inputs)
        batches.append(Batch(name, inputs, expected, grid))
    named_images = entrance_images()
    samples = [image for _, image in named_images]
    pixels = host.compute(reference_features.process_images, fields, source, samples)
    embeddings = {}
    for backend, pixels_of_backend in pixels.items():
        embeddings[backend] = host.compute(reference_features.pool_pixels, pixels_of_backend)
    stored = {}
    for dtype in DTYPES:
        stored[dtype] = host.compute(reference_features.read_saved, source, dtype)
    return Subject(
        port=port,
        host=host,
        source=source,
        scratch=scratch,
        batches=batches,
        images=named_images,
        pixels=pixels,
        embeddings=embeddings,
        stored=stored,
    )


BatchInputs = tuple[str, Mapping[str, Tensor], tuple[int, int] | None]


def batch_inputs(config: SigLipVisionConfig) -> Iterator[BatchInputs]:
    """Yield (name, inputs in float64, grid) of batches of all shapes."""
    generator = torch.Generator().manual_seed(0)
    patch = config.patch_size

    def noise(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1

    if not config.naflex:
        side = config.image_size
        grid = (config.grid_size, config.grid_size)
        yield "images of the model's size", {"pixel_values": noise(3, 3, side, side)}, grid
    pixel_values = noise(2, 3, 4 * patch + 1, 7 * patch + 2)
    yield "images of 4 x 7 patches", {"pixel_values": pixel_values}, (4, 7)
    if config.naflex:
        shapes = torch.tensor([[4, 6], [7, 3], [6, 4], [1, 5]])
        mask = torch.arange(26)[None] < shapes.prod(1)[:, None]
        packed = {
            "pixel_values": noise(4, 26, 3 * patch * patch),
            "pixel_attention_mask": mask.long(),
            "spatial_shapes": shapes,
        }
        yield "packed patches", packed, None
