"""Replicas of the repositories that `pytest -m hub` needs, with small random weights."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from tests.helpers.hub_server import Hub, Repository

SIZES = {"google/siglip-base-patch16-224": 32, "google/siglip2-base-patch16-224": 32}
SIZES |= {f"google/siglip-base-patch16-{size}": size // 8 for size in (256, 384, 512)}
TEXTS = ["a photo of 2 cats", "a photo of 2 dogs"]


def serve(hub: Hub, folder: Path, *, xet: bool) -> Path:
    """Create the repositories and serve them.

    Args:
        hub: Hub on loopback.
        folder: Folder of the repositories.
        xet: Whether the weights are also in the Xet store.

    Returns:
        File with the expected numbers, computed by transformers: see
        `tests/test_real_checkpoint.py`.
    """
    images = folder / "nielsr" / "test-image"
    images.mkdir(parents=True)
    noise = torch.Generator().manual_seed(0)
    input_ids = torch.randint(4, 60, (2, 32), generator=noise)
    torch.save(input_ids, images / "siglip_input_ids.pt")
    image_path = folder / "cats.png"
    Image.effect_noise((48, 40), 90).convert("RGB").save(image_path)
    goldens: dict[str, Any] = {"two cats, address": image_path.as_uri()}
    for name, size in SIZES.items():
        model = random_model(folder / name, size)
        pixel_values = torch.randn(2, 3, size, size, generator=noise)
        suffix = name.rsplit("-", 1)[1]
        if "siglip2" not in name:
            file = (
                "siglip_pixel_values.pt" if suffix == "224" else f"siglip_pixel_values_{suffix}.pt"
            )
            torch.save(pixel_values, images / file)
            goldens[name] = logits(model, pixel_values, input_ids)
        if size == 32 and "siglip2" not in name:
            ids = AutoTokenizer.from_pretrained(folder / name)(
                TEXTS, padding="max_length", return_tensors="pt"
            )
            processor = AutoImageProcessor.from_pretrained(folder / name, backend="pil")
            with Image.open(image_path) as opened:
                pixels = processor(opened, return_tensors="pt")["pixel_values"]
            goldens["two cats"] = logits(model, pixels, ids["input_ids"])
        hub.repositories[name] = Repository(folder / name)
    hub.repositories["nielsr/test-image"] = Repository(images)
    if xet:
        hub.store_by_xet(folder / "xet", *(folder / name / "model.safetensors" for name in SIZES))
    path = folder / "goldens.json"
    path.write_text(json.dumps(goldens))
    return path


def random_model(folder: Path, size: int) -> SiglipModel:
    """Write a whole SigLIP with image processor and tokenizer, and return the model."""
    import sentencepiece

    vision = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    text = {**vision, "num_hidden_layers": 1, "vocab_size": 64, "max_position_embeddings": 32}
    text |= {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
    torch.manual_seed(size)
    config = SiglipConfig(
        text_config=text, vision_config={**vision, "image_size": size, "patch_size": 8}
    )
    model = SiglipModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(folder)
    SiglipImageProcessor(size={"height": size, "width": size}).save_pretrained(folder)
    vocabulary = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20),
        model_writer=vocabulary,
        vocab_size=30,
        hard_vocab_limit=False,
        minloglevel=2,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )
    (folder / "spiece.model").write_bytes(vocabulary.getvalue())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "SiglipTokenizer", "model_max_length": 32, "pad_token": "</s>"}
        )
    )
    return model


@torch.inference_mode()
def logits(
    model: SiglipModel, pixel_values: torch.Tensor, input_ids: torch.Tensor
) -> list[list[float]]:
    """Return the logits of the reference, [B, T]."""
    output = model(pixel_values=pixel_values, input_ids=input_ids)
    return [[float(value) for value in row] for row in output.logits_per_image]
