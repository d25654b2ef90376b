"""Causes of checkpoints that cannot be loaded: each by name, and first in the message."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from siglip_port import CheckpointError, SigLipVisionModel
from siglip_port.checkpoint.diagnosis import CAUSES
from siglip_port.checkpoint.source import CONFIG, INDEX, WEIGHTS
from siglip_port.checkpoint.weight_files import WeightFiles
from siglip_port.hub.local import LocalFolder
from tests.helpers.checkpoints import (
    adding,
    dropping,
    edit_config,
    edit_index,
    edit_tensors,
    renaming,
    shard,
)
from tests.helpers.damaged_files import assert_loads, assert_refused

load = SigLipVisionModel.from_hf
Tensors = dict[str, Tensor]
Edit = Callable[[Tensors], Tensors]

GENERAL = "check that the weights and config.json are complete"


def is_linear(name: str) -> bool:
    """Return whether a tensor is the weight of a linear layer in a block."""
    return "encoder.layers" in name and name.endswith(
        (
            "q_proj.weight",
            "k_proj.weight",
            "v_proj.weight",
            "out_proj.weight",
            "fc1.weight",
            "fc2.weight",
        )
    )


def replacing(change: Callable[[str, Tensor], Tensors]) -> Edit:
    """Return an edit that replaces the weights of the linear layers."""

    def edit(tensors: Tensors) -> Tensors:
        edited: Tensors = {}
        for name, tensor in tensors.items():
            edited |= change(name, tensor) if is_linear(name) else {name: tensor}
        return edited

    return edit


def four_bits(name: str, tensor: Tensor) -> Tensors:
    return {
        name: torch.zeros(tensor.numel() // 2, 1, dtype=torch.uint8),
        f"{name}.absmax": torch.zeros(4),
        f"{name}.quant_map": torch.zeros(16),
        f"{name}.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8),
    }


def eight_bits(name: str, tensor: Tensor) -> Tensors:
    scb = name.removesuffix("weight") + "SCB"
    return {name: torch.zeros(tensor.shape, dtype=torch.int8), scb: torch.ones(len(tensor))}


def float8(name: str, tensor: Tensor) -> Tensors:
    return {name: tensor.to(torch.float8_e4m3fn), f"{name}_scale": torch.ones(1)}


def float8_alone(name: str, tensor: Tensor) -> Tensors:
    return {name: tensor.to(torch.float8_e4m3fn)}


def gptq(name: str, tensor: Tensor) -> Tensors:
    stem = name.removesuffix("weight")
    return {
        f"{stem}qweight": torch.zeros(3, len(tensor), dtype=torch.int32),
        f"{stem}qzeros": torch.zeros(1, 3, dtype=torch.int32),
        f"{stem}scales": torch.ones(1, len(tensor)),
        f"{stem}g_idx": torch.zeros(24, dtype=torch.int32),
    }


def packed(name: str, tensor: Tensor) -> Tensors:
    return {f"{name}_packed": torch.zeros(3, 3, dtype=torch.int32), f"{name}_scale": torch.ones(1)}


def mlx(name: str, tensor: Tensor) -> Tensors:
    stem = name.removesuffix("weight")
    return {
        name: torch.zeros(len(tensor), 3, dtype=torch.uint32),
        f"{stem}scales": torch.ones(len(tensor), 1),
        f"{stem}biases": torch.ones(len(tensor), 1),
    }


def empty(name: str, tensor: Tensor) -> Tensors:
    return {name: torch.zeros(0)}


def lora(name: str, tensor: Tensor) -> Tensors:
    stem = name.removesuffix("weight")
    return {
        f"{stem}base_layer.weight": tensor,
        f"{stem}lora_A.default.weight": torch.zeros(2, tensor.shape[1]),
        f"{stem}lora_B.default.weight": torch.zeros(len(tensor), 2),
    }


def ia3(name: str, tensor: Tensor) -> Tensors:
    stem = name.removesuffix("weight")
    return {f"{stem}base_layer.weight": tensor, f"{stem}ia3_l.default": torch.ones(len(tensor), 1)}


def only(names: dict[str, tuple[int, ...]]) -> Edit:
    """Return an edit that replaces all tensors by these, of these shapes."""
    return lambda _: {name: torch.zeros(shape) for name, shape in names.items()}


A = "base_model.model.vision_model.encoder.layers.0.self_attn.q_proj."
V = "vision_tower."

EDITS: dict[str, tuple[Edit, str]] = {
    "4 bits": (replacing(four_bits), r"quantized by bitsandbytes, 4 bits .*\.weight is U8"),
    "8 bits": (replacing(eight_bits), r"quantized by bitsandbytes, 8 bits .*is I8.*\.SCB"),
    "float8": (replacing(float8), r"quantized to 8-bit floats .*F8_E4M3"),
    "float8 without scales": (replacing(float8_alone), r"weights are quantized \(.*F8_E4M3\)"),
    "GPTQ": (replacing(gptq), r"quantized by GPTQ or AWQ"),
    "compressed-tensors": (replacing(packed), r"quantized by compressed-tensors"),
    "mlx": (replacing(mlx), r"quantized by mlx .*is U32"),
    "ZeRO-3": (replacing(empty), r"\d+ tensors are empty .*gather them with zero_to_fp32.py"),
    "ZeRO-3, all": (
        lambda t: {name: torch.zeros(0) for name in t},
        "ZeRO-3 without gathering the weights",
    ),
    "FSDP": (only({"_fsdp_wrapped_module._flat_param": (99,)}), "flattened shards of FSDP"),
    "FSDP, blocks": (only({"vision_model.flat_param_0": (9,), "b": (9,)}), "flattened shards of"),
    "LoRA": (replacing(lora), r"adapter that is not merged .*call merge_and_unload\(\)"),
    "IA3": (replacing(ia3), "adapter that is not merged"),
    "adapter": (
        only({f"{A}lora_A.weight": (4, 24), f"{A}lora_B.weight": (24, 4)}),
        r"weights are only an adapter .*lora_A.*merge it with peft",
    ),
    "DoRA": (
        only({f"{A}lora_A.weight": (4, 24), f"{A}lora_magnitude_vector.weight": (24,)}),
        "weights are only an adapter",
    ),
    "prompts": (only({"prompt_embeddings": (4, 24)}), "adapter of learned prompts"),
    "no tensors": (lambda _: {}, "the weights file has no tensors"),
    "CLIP": (
        only(
            {
                "vision_model.embeddings.class_embedding": (9,),
                "vision_model.pre_layrnorm.weight": (9,),
            }
        ),
        r"another architecture, CLIP \(such as vision_model.pre_layrnorm",
    ),
    "open_clip": (
        only({"visual.class_embedding": (9,), "visual.transformer.resblocks.0.ln_1.weight": (9,)}),
        "another architecture, CLIP",
    ),
    "DINOv2": (
        only(
            {
                "blocks.0.ls1.gamma": (9,),
                "cls_token": (1, 1, 9),
                "patch_embed.proj.weight": (9, 3, 2, 2),
            }
        ),
        "another architecture, DINOv2",
    ),
    "Qwen2-VL": (
        only(
            {
                "visual.merger.mlp.0.weight": (9, 9),
                "visual.patch_embed.proj.weight": (9, 3, 2, 4, 4),
            }
        ),
        "another architecture, Qwen2-VL",
    ),
    "video": (
        only({"encoder.patch_embed.weight": (9, 3, 2, 4, 4), "encoder.x": (9,)}),
        "has five dimensions",
    ),
    "SAM": (
        only(
            {
                "image_encoder.blocks.0.attn.rel_pos_h": (9, 9),
                "image_encoder.neck.0.weight": (9, 9, 1, 1),
            }
        ),
        "another architecture, SAM",
    ),
    "InternViT": (
        only(
            {
                f"{V}embeddings.class_embedding": (1, 1, 9),
                f"{V}encoder.layers.0.ls1": (9,),
                f"{V}encoder.layers.0.attn.qkv.weight": (27, 9),
            }
        ),
        "another architecture, InternViT",
    ),
    "ConvNeXt": (
        only({"visual.trunk.stages.0.blocks.0.conv_dw.weight": (9, 1, 7, 7)}),
        "another architecture, ConvNeXt",
    ),
    "EVA": (
        only({"visual.blocks.0.attn.q_bias": (9,), "visual.patch_embed.proj.weight": (9, 3, 2, 2)}),
        "another architecture, EVA",
    ),
    "I-JEPA": (
        only(
            {
                "embeddings.patch_embeddings.projection.weight": (9, 3, 2, 2),
                "encoder.layer.0.attention.attention.query.weight": (9, 9),
            }
        ),
        "another architecture, ViT, I-JEPA or DINO of transformers",
    ),
    "V-JEPA": (
        only(
            {
                "encoder.embeddings.patch_embeddings.proj.weight": (9, 3, 2, 4, 4),
                "encoder.layer.0.attention.query.weight": (9, 9),
            }
        ),
        "another architecture, V-JEPA",
    ),
    "text encoder": (
        only(
            {
                "text_model.embeddings.token_embedding.weight": (9, 9),
                "text_model.head.weight": (9, 9),
            }
        ),
        "those of a text encoder, without a vision encoder",
    ),
    "flat text encoder": (
        only(
            {
                "embeddings.token_embedding.weight": (9, 9),
                "encoder.layers.0.self_attn.out_proj.weight": (9, 9),
            }
        ),
        "those of a text encoder, without a vision encoder",
    ),
    "language model": (
        only({"model.embed_tokens.weight": (9, 9), "model.layers.0.self_attn.q_norm.weight": (9,)}),
        "those of a language model, without a vision encoder",
    ),
    "quantized language model": (
        only({"model.embed_tokens.weight": (9, 9), "model.layers.0.mlp.up_proj.qweight": (9, 9)}),
        "those of a language model, without a vision encoder",
    ),
    "projector": (
        only({"model.mm_projector.0.weight": (9, 9), "model.mm_projector.0.bias": (9,)}),
        "those of a projector alone",
    ),
    "rotary positions": (
        adding({"vision_model.rotary_emb.inv_freq": torch.ones(3)}),
        "another architecture, a ViT with rotary positions",
    ),
    "LayerNorm before the blocks": (
        adding({"vision_model.pre_layernorm.weight": torch.ones(24)}),
        "another architecture, a ViT with a LayerNorm before its blocks",
    ),
    "Keye-VL": (
        adding({"vision_model.embeddings.packing_position_embedding.weight": torch.ones(3, 3)}),
        "another architecture, Keye-VL",
    ),
}


def other_image_size(folder: Path) -> None:
    edit_config(folder, image_size=24)


def other_depth(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=2)


def default_sizes(folder: Path) -> None:
    edit_config(
        folder,
        hidden_size=...,
        num_hidden_layers=...,
        intermediate_size=...,
        num_attention_heads=...,
    )


def unexpected_tensor(folder: Path) -> None:
    edit_tensors(folder, adding({"vision_model.extra": torch.ones(3)}))


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize(
    "second",
    [None, other_image_size, other_depth, unexpected_tensor],
    ids=lambda f: getattr(f, "__name__", "alone"),
)
def test_tensors(encoder_copy: Path, name: str, second: Callable[[Path], None] | None) -> None:
    """The cause is first, also if the configuration or another tensor is wrong, too."""
    edit, message = EDITS[name]
    edit_tensors(encoder_copy, edit)
    is_whole_file = edit({"x": torch.ones(2, 2)}).keys() != {"x"} or name == "no tensors"
    if second is not None and not (second is unexpected_tensor and is_whole_file):
        second(encoder_copy)
    assert_refused(encoder_copy, rf"(?s)^{encoder_copy}: [^\n]*{message}")
    with pytest.raises(CheckpointError) as error:
        load(encoder_copy)
    assert GENERAL not in str(error.value)
    assert "download" not in str(error.value)


@pytest.mark.parametrize("name", ["4 bits", "GPTQ", "ZeRO-3", "LoRA", "mlx"])
@pytest.mark.parametrize("prefix", ["vision_tower.vision_model.", "model.vision_tower."])
def test_language_model_does_not_matter(
    encoder_copy: Path, model: SigLipVisionModel, name: str, prefix: str
) -> None:
    """A model of which only the language part is quantized or adapted loads."""
    edit, message = EDITS[name]
    tensors = load_file(encoder_copy / WEIGHTS)
    language = {
        n.replace("vision_model.encoder.", "language_model.model."): t.clone()
        for n, t in edit(tensors).items()
        if "encoder" in n
    }
    plain = {n.replace("vision_model.", prefix): t for n, t in tensors.items()}
    save_file({**plain, **language}, encoder_copy / WEIGHTS, {"format": "pt"})
    edit_config(encoder_copy, quantization_config={"quant_method": "gptq"})
    assert_loads(encoder_copy, model)
    # Negative control: the same in the encoder.
    vision = {n.replace("vision_model.", prefix): t for n, t in edit(tensors).items()}
    save_file({**vision, **language}, encoder_copy / WEIGHTS, {"format": "pt"})
    assert_refused(encoder_copy, f": [^\n]*{message}")


POSITIONS = "vision_model.embeddings.position_embedding.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            other_image_size,
            r"config.json gives image_size 24 \(3 x 3 patches\), but the weights have 4 positions "
            r"\(2 x 2\), so image_size was edited or .*; set it back to 16, .* interpolation=",
        ),
        (
            lambda folder: edit_tensors(folder, lambda t: {**t, POSITIONS: torch.zeros(5, 24)}),
            "5 positions, one more than a square number: a model with a class token",
        ),
        (
            lambda folder: edit_tensors(folder, lambda t: {**t, POSITIONS: torch.zeros(6, 24)}),
            "6 positions, which is not a square number",
        ),
        (
            other_depth,
            r"config.json is not that of these weights \(num_hidden_layers is 2, but 3 in the",
        ),
        (
            lambda folder: edit_tensors(folder, dropping(r"layers\.2\.")),
            r"num_hidden_layers is 3, but 2 in the weights\).* or copy the weights again if they",
        ),
        (
            default_sizes,
            r"hidden_size is 768, but 24 in the weights; num_hidden_layers is 12, but 3 in the "
            r"weights; intermediate_size is 3072, but 40 in the weights",
        ),
        (
            lambda folder: edit_config(folder, patch_size=4, image_size=8),
            r"patch_size is 4, but 8 in the weights",
        ),
    ],
)
@pytest.mark.parametrize("has_second", [False, True], ids=["alone", "second problem"])
def test_other_configuration(
    encoder_copy: Path, edit: Callable[[Path], None], message: str, has_second: bool
) -> None:
    edit(encoder_copy)
    if has_second:
        edit_tensors(encoder_copy, dropping(r"layers\.0\.layer_norm1\.bias"))
        unexpected_tensor(encoder_copy)
    assert_refused(encoder_copy, rf"^{encoder_copy}: [^\n]*{message}")


@pytest.mark.parametrize(
    "edit",
    [
        dropping(r"layers\.1\.mlp\.fc1\.weight"),
        lambda t: {n: v.T if n.endswith("layers.0.mlp.fc1.weight") else v for n, v in t.items()},
        renaming(r"layers\.2\.", "layers.3."),
        adding({"vision_model.extra": torch.ones(3)}),
    ],
)
def test_no_cause(encoder_copy: Path, edit: Edit) -> None:
    """A damaged file does not look like another model; then the advice is general."""
    edit_tensors(encoder_copy, edit)
    with pytest.raises(CheckpointError) as error:
        load(encoder_copy)
    lines = str(error.value).splitlines()
    assert lines[0].endswith("does not match its configuration")
    assert lines[-1] == f"Nothing was loaded; {GENERAL} and belong together."


def test_missing_shards(encoder_copy: Path) -> None:
    shard(encoder_copy)
    (encoder_copy / "model-00002-of-00003.safetensors").unlink()
    message = "shards are missing or damaged: model-00002-of-00003.safetensors; copy or download"
    assert_refused(encoder_copy, f"^{encoder_copy}: {message}")
    other_depth(encoder_copy)
    assert_refused(encoder_copy, f"^{encoder_copy}: {message}")


def test_index_of_another_save(encoder_copy: Path) -> None:
    shard(encoder_copy)
    name = "vision_model.encoder.layers.1.mlp.fc2.bias"
    edit_index(
        encoder_copy,
        lambda index: {"weight_map": {k: v for k, v in index["weight_map"].items() if k != name}},
    )
    shards = json.loads((encoder_copy / INDEX).read_text())["weight_map"]
    assert name not in shards
    message = (
        f"the index is not that of these shards: model-0000.-of-00003.safetensors contains {name}"
    )
    assert_refused(encoder_copy, f"^{encoder_copy}: {message}")


def test_other_layouts(tmp_path: Path) -> None:
    """timm normalizes after a mean pooling with `fc_norm`, instead of before it."""
    tensors: dict[str, Any] = {
        "patch_embed.proj.weight": torch.ones(24, 3, 8, 8),
        "patch_embed.proj.bias": torch.ones(24),
        "pos_embed": torch.ones(1, 4, 24),
        "fc_norm.weight": torch.ones(24),
        "fc_norm.bias": torch.ones(24),
    }
    for name, width, inputs in (
        ("attn.qkv", 72, 24),
        ("attn.proj", 24, 24),
        ("mlp.fc1", 40, 24),
        ("mlp.fc2", 24, 40),
    ):
        tensors[f"blocks.0.{name}.weight"] = torch.ones(width, inputs)
        tensors[f"blocks.0.{name}.bias"] = torch.ones(width)
    for name in ("norm1", "norm2"):
        tensors |= {
            f"blocks.0.{name}.weight": torch.ones(24),
            f"blocks.0.{name}.bias": torch.ones(24),
        }
    save_file(tensors, tmp_path / WEIGHTS)
    args = {"num_heads": 2, "act_layer": "gelu", "global_pool": "avg"}
    (tmp_path / CONFIG).write_text(json.dumps({"model_args": args}))
    assert_refused(tmp_path, r": the model normalizes after its mean pooling \(fc_norm.weight\)")


def test_advice_for_the_hub(encoder_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what was downloaded can be downloaded again."""
    init = WeightFiles.__init__

    def with_commit(self: WeightFiles, source: LocalFolder) -> None:
        source.commit = "0" * 40
        init(self, source)

    monkeypatch.setattr(WeightFiles, "__init__", with_commit)
    edit_tensors(encoder_copy, adding({"vision_model.extra": torch.ones(3)}))
    with pytest.raises(CheckpointError, match=r"download the weights and config.json again, both"):
        load(encoder_copy)
    other_depth(encoder_copy)
    with pytest.raises(CheckpointError, match="num_hidden_layers is 2") as error:
        load(encoder_copy)
    assert "again" not in str(error.value)


def test_every_cause_is_tested() -> None:
    """Every cause of the table is named in a test of this module or of test_stored_names."""
    assert len(CAUSES) == len(set(CAUSES)) == 16


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "__0_0.distcp",
            r"the weights are sharded by torch.distributed.checkpoint: .*accelerate merge-weights",
        ),
        (
            "zero_to_fp32.py",
            r"the weights were saved under DeepSpeed ZeRO without gathering .*zero_to_fp32.py",
        ),
    ],
)
def test_folders_that_were_not_gathered(encoder_copy: Path, name: str, message: str) -> None:
    (encoder_copy / WEIGHTS).unlink()
    (encoder_copy / name).write_bytes(b"")
    assert_refused(encoder_copy, f"^{encoder_copy} contains neither .*; {message}")
