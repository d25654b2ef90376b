"""Runs under another release of transformers, in an environment of its own (see test_versions.py).

Writes, into the folder given, one checkpoint of each class that release can save, with random weights, and beside
each the pixels and what that release makes of them: `expected.safetensors` with float32 and float64 outputs.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    SiglipConfig,
    SiglipForImageClassification,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from siglip_port.parity.weights import randomise

# 12 blocks, so that their order as numbers and as text differs; a picture that is no multiple of the patch; odd heads.
VISION = {
    "hidden_size": 54,
    "intermediate_size": 101,
    "num_hidden_layers": 12,
    "num_attention_heads": 3,
    "image_size": 45,
    "patch_size": 7,
}
TEXT = {
    "vocab_size": 50,
    "hidden_size": 54,
    "intermediate_size": 60,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 8,
}


def main(folder: Path) -> None:
    both = SiglipConfig(
        text_config=SiglipTextConfig(**TEXT).to_dict(), vision_config=SiglipVisionConfig(**VISION).to_dict()
    )
    both.num_labels = 3
    models = {
        "full": SiglipModel(both),
        "vision": SiglipVisionModel(SiglipVisionConfig(**VISION)),
        "headless": SiglipVisionModel(SiglipVisionConfig(**VISION, vision_use_head=False)),
        "classifier": SiglipForImageClassification(both),
    }
    for seed, (name, model) in enumerate(models.items()):
        randomise(model.eval(), seed)
        model.save_pretrained(folder / name)
        pixel_values = torch.randn(2, 3, 45, 45, generator=torch.Generator().manual_seed(seed))
        tower = getattr(model, "vision_model", model)
        expected = {"pixel_values": pixel_values}
        for dtype in (torch.float32, torch.float64):
            with torch.no_grad():
                output = tower.to(dtype)(pixel_values.to(dtype))
            expected[f"tokens.{dtype}"] = output[0]
            if len(output) > 1 and output[1] is not None:
                expected[f"pooled.{dtype}"] = output[1]
        save_file({k: v.contiguous() for k, v in expected.items()}, folder / name / "expected.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
