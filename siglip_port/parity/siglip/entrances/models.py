"""The small models on which entrances are checked, and what the reference computes on them."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from siglip_port.config import SigLipVisionConfig
from siglip_port.parity.siglip import reference, reference_features
from siglip_port.parity.siglip.entrances.subject import Batch, Expected
from siglip_port.parity.siglip.reference_process import References
from siglip_port.parity.siglip.sample_images import entrance_images

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
    attention_dropout=0.2,
)
"""Model of fixed size. No value is a default: a lost one cannot be replaced by it."""

NAFLEX = replace(
    FIXED,
    naflex=True,
    image_size=30,
    layer_norm_eps=1e-6,
    num_encoder_blocks=2,
    attention_dropout=0.0,
)
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


MODELS = {"entrances": FIXED, "entrances, NaFlex": NAFLEX}
"""Models by name in reports."""

SEED = 1234
RECIPE = "N1"
WEIGHTS = f"{RECIPE}, seed {SEED}"


@contextlib.contextmanager
def expectations(config: SigLipVisionConfig, references: References) -> Iterator[Expected]:
    """Write a checkpoint, and compute the reference's results on batches and images.

    Args:
        config: `FIXED` or `NAFLEX`.
        references: Place of the reference.
    """
    fields = reference.fields_of(config)
    with tempfile.TemporaryDirectory(prefix="siglip_port-") as folder:
        references.call(reference.write_random_checkpoint, Path(folder), fields, SEED, RECIPE)
        content = json.dumps(preprocessor(config))
        Path(folder, "preprocessor_config.json").write_text(content, encoding="utf-8")
        handle = references.load(
            folder, pooling_head=True, dtype=torch.float32, naflex=config.naflex
        )
        host = handle.side()
        batches = []
        for name, inputs, grid in batch_inputs(config):
            features = host.compute(reference_features.compute_features, inputs)
            batches.append(Batch(name, inputs, features, grid))
        images = entrance_images()
        samples = [image for _, image in images]
        pixels = host.compute(reference_features.process_images, fields, folder, samples)
        embeddings = {}
        for backend, batches_of_one in pixels.items():
            embeddings[backend] = host.compute(reference_features.pool_pixels, batches_of_one)
        stored = {}
        for dtype in DTYPES:
            stored[dtype] = host.compute(reference_features.read_saved, folder, dtype)
        yield Expected(
            host=host,
            source=folder,
            interpolation=None if config.naflex else "hf",
            batches=batches,
            images=images,
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
        large = {
            "pixel_values": noise(2, 132, 3 * patch * patch),
            "pixel_attention_mask": (torch.arange(132)[None] < torch.tensor([[132], [6]])).long(),
            "spatial_shapes": torch.tensor([[12, 11], [2, 3]]),
        }
        yield "a large and a small image, packed", large, None
