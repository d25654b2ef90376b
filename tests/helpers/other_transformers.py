"""Save and load checkpoints with another release of transformers (see test_versions.py).

Writes one checkpoint of each class that the release supports to the folder, with random weights.
Then loads the folders `port` and `port-naflex`, which `save_hf` has written, as far as the release
supports their classes. Beside each checkpoint, `expected.safetensors` contains pixels and the
outputs in float32 and float64.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import (
    SiglipConfig,
    SiglipForImageClassification,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from siglip_port.parity.stress_weights import randomize

# 12 block indices sort differently as numbers and as text, the image is no multiple of the patch,
# and the number of heads is odd.
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
        text_config=SiglipTextConfig(**TEXT).to_dict(),
        vision_config=SiglipVisionConfig(**VISION).to_dict(),
    )
    both.num_labels = 3
    models = {
        "full": SiglipModel(both),
        "vision": SiglipVisionModel(SiglipVisionConfig(**VISION)),
        "headless": SiglipVisionModel(SiglipVisionConfig(**VISION, vision_use_head=False)),
        "classifier": SiglipForImageClassification(both),
    }
    if hasattr(transformers, "LlavaOnevisionForConditionalGeneration"):
        models |= vision_language_models()
    for seed, (name, model) in enumerate(models.items()):
        randomize(model.eval(), seed)
        model.save_pretrained(folder / name)
        write_expected(folder / name, encoder_of(model), seed)
    for name, kind in (("port", "SiglipVisionModel"), ("port-naflex", "Siglip2VisionModel")):
        if hasattr(transformers, kind):
            read = getattr(transformers, kind)
            model, info = read.from_pretrained(folder / name, output_loading_info=True)
            assert not any(
                info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
            ), info
            write_expected(folder / name, model.eval(), 0)


def vision_language_models() -> dict[str, Any]:
    """Build vision-language models with a SigLIP vision encoder."""
    vision = {**VISION, "vision_use_head": False, "model_type": "siglip_vision_model"}
    text = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    llava = transformers.LlavaOnevisionConfig(
        vision_config=vision, text_config={"model_type": "qwen2", **text}
    )
    gemma = {"model_type": "gemma", "head_dim": 8, **text}
    paligemma = transformers.PaliGemmaConfig(
        vision_config=vision, text_config=gemma, projection_dim=16, hidden_size=16
    )
    return {
        "llava": transformers.LlavaOnevisionForConditionalGeneration(llava),
        "paligemma": transformers.PaliGemmaForConditionalGeneration(paligemma),
    }


def encoder_of(model: Any) -> Any:  # noqa: ANN401
    """Return the vision encoder, whose attribute depends on the release."""
    for inner in (getattr(model, "model", None), model):
        for name in ("vision_tower", "vision_model"):
            if hasattr(inner, name):
                return getattr(inner, name)
    return model


def write_expected(folder: Path, reference: Any, seed: int) -> None:  # noqa: ANN401
    """Write random pixels and the outputs of this release."""
    naflex = type(reference).__name__ == "Siglip2VisionModel"
    generator = torch.Generator().manual_seed(seed)
    pixel_values = (
        torch.randn(2, 40, 147, generator=generator)
        if naflex
        else torch.randn(2, 3, 45, 45, generator=generator)
    )
    expected = {"pixel_values": pixel_values}
    inputs = {}
    if naflex:
        shapes = torch.tensor([[4, 9], [5, 8]])
        inputs = {
            "pixel_attention_mask": (torch.arange(40) < shapes.prod(1)[:, None]).long(),
            "spatial_shapes": shapes,
        }
    for dtype in (torch.float32, torch.float64):
        with torch.no_grad():
            output = reference.to(dtype)(pixel_values.to(dtype), **inputs)
        expected[f"tokens.{dtype}"] = output[0]
        if len(output) > 1 and output[1] is not None:
            expected[f"pooled.{dtype}"] = output[1]
    save_file(
        {k: v.contiguous() for k, v in {**expected, **inputs}.items()},
        folder / "expected.safetensors",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
