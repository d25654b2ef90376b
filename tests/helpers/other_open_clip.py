"""Save SigLIP models with open_clip, in an environment of its own (see test_versions.py).

The vision encoders have full size and random weights, and the files are those that open_clip
uploads to the Hub. `expected.safetensors` contains pixels and the outputs of open_clip.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import open_clip
import torch
from open_clip.push_to_hf_hub import save_for_hf
from safetensors.torch import save_file

from siglip_port.parity.stress_weights import randomize


@torch.no_grad()
def main(folder: Path) -> None:
    # A real tokenizer would have to be downloaded.
    tokenizer = SimpleNamespace(save_pretrained=lambda _: None)
    for name in ("ViT-B-16-SigLIP", "ViT-B-32-SigLIP2-256"):
        config = open_clip.get_model_config(name)
        config["text_cfg"] |= {"layers": 1, "vocab_size": 50}
        model = open_clip.model.CustomTextCLIP(
            **{k: v for k, v in config.items() if k != "custom_text"}
        ).eval()
        randomize(model)
        open_clip.model.set_model_preprocess_cfg(
            model,
            {
                "mean": [0.5] * 3,
                "std": [0.5] * 3,
                "interpolation": "bicubic",
                "resize_mode": "squash",
            },
        )
        save_for_hf(model, tokenizer, config, str(folder / name), safe_serialization=True)
        size = config["vision_cfg"]["image_size"]
        x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
        expected = {"pixel_values": x}
        for dtype in (torch.float32, torch.float64):
            expected[f"pooled.{dtype}"] = model.to(dtype).encode_image(x.to(dtype))
        save_file(expected, folder / name / "expected.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
