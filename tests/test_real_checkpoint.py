"""Published weights against published logits: `uv run pytest -m hub`.

Needs the Hugging Face Hub (0.8 GB per checkpoint, cached). The expected logits are those of
big_vision's JAX weights and of transformers' tests; the port's image embeddings are combined with
the reference's text encoder.

SIGLIP_PORT_GOLDENS is a JSON file with expected logits of another Hub, with other weights under the
same names.
"""

from __future__ import annotations

import io
import json
import os
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from huggingface_hub import hf_hub_download
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, SiglipModel

import compare_origin
from siglip_port import SigLipVisionModel
from siglip_port.image_processing import ImageProcessor
from siglip_port.parity.siglip.verify_options import DEFAULT_CHECKPOINT

pytestmark = pytest.mark.hub

NAMES = [f"google/siglip-base-patch16-{size}" for size in (224, 256, 384, 512)]

PUBLISHED: dict[str, Any] = {
    # transformers `models/siglip/convert_siglip_to_hf.py`: verified there against JAX, atol 1e-4.
    NAMES[0]: [[-2.9621, -2.1672], [-0.2713, 0.2910]],
    NAMES[1]: [[-3.1146, -1.9894], [-0.7312, 0.6387]],
    NAMES[2]: [[-2.8098, -2.1891], [-0.4242, 0.4102]],
    NAMES[3]: [[-2.7899, -2.2668], [-0.4295, -0.0735]],
    # transformers `tests/models/siglip/test_modeling_siglip.py`, rtol = atol = 1e-3.
    "two cats": [[-0.7567, -10.3354]],
    "two cats, address": "http://images.cocodataset.org/val2017/000000039769.jpg",
}
OTHERS = os.environ.get("SIGLIP_PORT_GOLDENS")
GOLDENS = json.loads(Path(OTHERS).read_text()) if OTHERS else PUBLISHED


def logits_per_image(name: str, pixel_values: Tensor, input_ids: Tensor) -> Tensor:
    """Return logits [B, T] of the port's image and the reference's text embeddings."""
    reference = SiglipModel.from_pretrained(name).eval()
    with torch.inference_mode():
        images = SigLipVisionModel.from_hf(name, pooling_head=True).embed(
            pixel_values, normalize=True
        )
        texts = F.normalize(reference.text_model(input_ids=input_ids).pooler_output, dim=-1)
        logits: Tensor = images @ texts.T * reference.logit_scale.exp() + reference.logit_bias
    return logits


@pytest.mark.parametrize("name", [DEFAULT_CHECKPOINT, "google/siglip2-base-patch16-224"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_comparison(name: str, dtype: str) -> None:
    assert compare_origin.main(["--weights", "hub", "--checkpoint", name, "--dtype", dtype]) == 0


def test_two_cats() -> None:
    with urllib.request.urlopen(GOLDENS["two cats, address"]) as response:
        image = Image.open(io.BytesIO(response.read()))
    name = DEFAULT_CHECKPOINT
    texts = AutoTokenizer.from_pretrained(name)(
        ["a photo of 2 cats", "a photo of 2 dogs"], padding="max_length", return_tensors="pt"
    )
    processor = ImageProcessor.from_config(SigLipVisionModel.from_hf(name).preprocessor_config)
    logits = logits_per_image(name, processor(image)["pixel_values"], texts["input_ids"])
    torch.testing.assert_close(logits, torch.tensor(GOLDENS["two cats"]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_big_vision_logits(name: str) -> None:
    size = name.rsplit("-", 1)[1]
    suffix = "" if size == "224" else f"_{size}"
    pixel_values, input_ids = (
        torch.load(
            hf_hub_download("nielsr/test-image", file, repo_type="dataset"), weights_only=True
        )
        for file in (f"siglip_pixel_values{suffix}.pt", "siglip_input_ids.pt")
    )
    logits = logits_per_image(name, pixel_values, input_ids)
    torch.testing.assert_close(logits, torch.tensor(GOLDENS[name]), rtol=1e-5, atol=1e-4)
