"""Layouts of repositories that are not packages, compared with a ViT on the stored tensors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from siglip_port import CheckpointError, SigLipVisionConfig, SigLipVisionModel
from siglip_port.checkpoint.inspect import find_all_matches
from siglip_port.checkpoint.reader import Checkpoint
from siglip_port.checkpoint.recognize import Match
from siglip_port.hub import find_source
from siglip_port.parity.metrics import relative_error
from tests.helpers.checkpoints import pixels

load = SigLipVisionModel.from_hf


HEADS = 2
WIDTH = 144  # head_dim 72, as in Moondream and gemma_pytorch
BLOCKS = 3


P = 7


def vit(
    x: Tensor,
    t: dict[str, Tensor],
    patches: Tensor,
    names: dict[str, str],
    blocks: int,
    eps: float,
    act: str,
) -> Tensor:
    """Compute a ViT from stored tensors, [B, N, D] -> [B, N, D].

    `names` gives the stored name of each part; `qkv` is present if q, k and v are fused.
    """

    def norm(x: Tensor, name: str) -> Tensor:
        return nn.functional.layer_norm(
            x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], eps
        )

    def linear(x: Tensor, name: str) -> Tensor:
        return nn.functional.linear(x, t[f"{name}.weight"], t[f"{name}.bias"])

    x = patches + t[names["pos"]].reshape(-1, patches.shape[-1])
    for i in range(blocks):
        block = names["block"].format(i)
        y = norm(x, f"{block}.{names['norm1']}")
        if "qkv" in names:
            q, k, v = linear(y, f"{block}.{names['qkv']}").chunk(3, dim=-1)
        else:
            q, k, v = (linear(y, f"{block}.{names['attn']}.{n}_proj") for n in "qkv")
        q, k, v = (z.view(*z.shape[:2], HEADS, -1).transpose(1, 2) for z in (q, k, v))
        context = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + linear(context.transpose(1, 2).flatten(2), f"{block}.{names['out']}")
        y = linear(norm(x, f"{block}.{names['norm2']}"), f"{block}.mlp.fc1")
        x = x + linear(nn.functional.gelu(y, approximate=act), f"{block}.mlp.fc2")
    return norm(x, names["norm"])


def patches_channel_first(x: Tensor) -> Tensor:
    """Cut patches as Moondream does: [B, C, H, W] -> [B, N, C * P * P]."""
    b, c, h, w = x.shape
    cells = x.reshape(b, c, h // P, P, w // P, P).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(b, (h // P) * (w // P), c * P * P)


def draw_tensors(
    names: dict[str, str], patch: tuple[str, tuple[int, ...]], prefix: str
) -> dict[str, Tensor]:
    """Draw random float64 tensors under the stored names."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        f"{patch[0]}.weight": patch[1],
        f"{patch[0]}.bias": (WIDTH,),
    }
    shapes[names["pos"]] = (36, WIDTH) if names["pos"].endswith("weight") else (1, 36, WIDTH)
    for i in range(BLOCKS):
        block = names["block"].format(i)
        linears = {"mlp.fc1": (101, WIDTH), "mlp.fc2": (WIDTH, 101), names["out"]: (WIDTH, WIDTH)}
        if "qkv" in names:
            linears[names["qkv"]] = (3 * WIDTH, WIDTH)
        else:
            linears |= {f"{names['attn']}.{n}_proj": (WIDTH, WIDTH) for n in "qkv"}
        for name, shape in linears.items():
            shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
        for norm in (names["norm1"], names["norm2"]):
            shapes |= {f"{block}.{norm}.weight": (WIDTH,), f"{block}.{norm}.bias": (WIDTH,)}
    shapes |= {f"{names['norm']}.weight": (WIDTH,), f"{names['norm']}.bias": (WIDTH,)}
    draw = {
        n: torch.randn(s, generator=generator, dtype=torch.float64) / s[-1] ** 0.5
        for n, s in shapes.items()
    }
    return {prefix + name: tensor for name, tensor in draw.items()}


MOONDREAM = {
    "pos": "pos_emb",
    "block": "blocks.{}",
    "norm1": "ln1",
    "qkv": "attn.qkv",
    "out": "attn.proj",
    "norm2": "ln2",
    "norm": "post_ln",
}


OLD_MOONDREAM = {
    **MOONDREAM,
    "pos": "pos_embed",
    "norm1": "norm1",
    "norm2": "norm2",
    "norm": "norm",
}


NANOVLM = {
    **MOONDREAM,
    "pos": "patch_embedding.position_embedding",
    "qkv": "attn.qkv_proj",
    "out": "attn.out_proj",
    "norm": "layer_norm",
}


GEMMA = {
    "pos": "position_embedding.weight",
    "block": "encoder_blocks.{}",
    "norm1": "layer_norm1",
    "attn": "self_attn",
    "out": "self_attn.o_proj",
    "norm2": "layer_norm2",
    "norm": "final_norm",
}


@pytest.mark.parametrize(
    ("title", "prefix", "names", "patch", "flat", "eps", "config"),
    [
        (
            "Moondream",
            "model.vision.",
            MOONDREAM,
            "patch_emb",
            True,
            1e-5,
            {"model_type": "moondream1", "config": {"vision": {"enc_n_heads": 2, "crop_size": 42}}},
        ),
        (
            "Moondream",
            "vision.",
            MOONDREAM,
            "patch_emb",
            True,
            1e-5,
            {"config": {"vision": {"enc_n_heads": 2}}},
        ),
        (
            "Moondream before 2025",
            "vision_encoder.encoder.model.visual.",
            OLD_MOONDREAM,
            "patch_embed.linear",
            True,
            1e-5,
            {"model_type": "moondream1", "num_heads": 2},
        ),
        (
            "nanoVLM",
            "vision_encoder.",
            NANOVLM,
            "patch_embedding.conv",
            False,
            1e-6,
            {
                "vit_n_heads": 2,
                "vit_img_size": 45,
                "vit_ln_eps": 1e-6,
                "lm_n_heads": 9,
                "vit_model_type": "google/siglip2-base-patch16-512",
            },
        ),
        ("gemma_pytorch", "siglip_vision_model.", GEMMA, "patch_embedding", False, 1e-6, None),
    ],
)
def test_stored_names(
    title: str,
    prefix: str,
    names: dict[str, str],
    patch: str,
    flat: bool,
    eps: float,
    config: dict[str, Any] | None,
    tmp_path: Path,
) -> None:
    shape = (WIDTH, 3 * P * P) if flat else (WIDTH, 3, P, P)
    tensors = draw_tensors(names, (patch, shape), prefix)
    rest = {
        "Moondream": {f"{prefix}proj_mlp.fc1.weight": torch.ones(2)},
        "Moondream before 2025": {
            "vision_encoder.projection.mlp.fc1.weight": torch.ones(2, 2 * WIDTH)
        },
    }.get(title, {})
    save_file({**tensors, **rest, "text_model.x": torch.ones(2)}, tmp_path / "model.safetensors")
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    model = load(tmp_path)
    assert model.provenance is not None
    assert model.provenance.layout == f"{title}, prefix {prefix.rstrip('.')}"
    assert model.config.layer_norm_eps == eps
    assert model.config.image_size == (45 if title == "nanoVLM" else 42)
    x = pixels(model.config)
    bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if flat:
        patches = nn.functional.linear(
            patches_channel_first(x), bare[f"{patch}.weight"], bare[f"{patch}.bias"]
        )
    else:
        patches = (
            nn.functional.conv2d(x, bare[f"{patch}.weight"], bare[f"{patch}.bias"], P).flatten(2).mT
        )
    with torch.no_grad():
        expected = vit(x, bare, patches, names, BLOCKS, eps, "tanh")
        assert relative_error(model(x), expected) <= 1e-10
        # The comparison is sensitive to the epsilon and to the form of GELU.
        assert (
            relative_error(model(x), vit(x, bare, patches, names, BLOCKS, 2.2e-6, "tanh")) > 1e-10
        )
        assert relative_error(model(x), vit(x, bare, patches, names, BLOCKS, eps, "none")) > 1e-7


def patches_channel_last(x: Tensor) -> Tensor:
    """Cut patches as BAGEL and mlx-vlm do: [B, C, H, W] -> [B, N, P * P * C]."""
    b, c, h, w = x.shape
    cells = torch.einsum("bchpwq->bhwpqc", x.reshape(b, c, h // P, P, w // P, P))
    return cells.reshape(b, (h // P) * (w // P), P * P * c)


HUGGINGFACE_NAMES = {
    "pos": "embeddings.position_embedding.weight",
    "block": "encoder.layers.{}",
    "norm1": "layer_norm1",
    "attn": "self_attn",
    "out": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "norm": "post_layernorm",
}

MATRIX_CONFIG = SigLipVisionConfig(
    embed_dim=WIDTH,
    image_size=42,
    patch_size=P,
    num_attention_heads=HEADS,
    num_encoder_blocks=BLOCKS,
    mlp_hidden_dim=101,
)


@pytest.mark.parametrize(
    ("prefix", "content"),
    [
        ("vit_model.vision_model.", {"model_type": "bagel"}),
        ("model.vision_tower.vision_tower.", {"model_type": "phi4mm"}),
        ("vision_tower.", {"vision_config": {"model_type": "phi4_multimodal_vision"}}),
    ],
)
@torch.no_grad()
def test_patch_embedding_as_a_matrix(prefix: str, content: dict[str, Any], tmp_path: Path) -> None:
    """BAGEL's `convert_conv2d_to_linear` and mlx-vlm's phi4mm: `permute(0, 2, 3, 1)`, then flat."""
    patch = "embeddings.patch_embedding"
    tensors = draw_tensors(HUGGINGFACE_NAMES, (patch, (WIDTH, P * P * 3)), prefix)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(content))
    model = load(tmp_path, config=MATRIX_CONFIG)
    assert model.provenance is not None
    assert model.provenance.layout.startswith("HuggingFace, patch embedding as a matrix, prefix")
    inspected = {(encoder.layout.name, encoder.prefix) for encoder in find_all(tmp_path)}
    assert inspected == {("huggingface-matrix", prefix)}
    bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    weight, bias = bare[f"{patch}.weight"], bare[f"{patch}.bias"]
    x = pixels(model.config)
    expected = nn.functional.linear(patches_channel_last(x), weight, bias)
    expected = vit(x, bare, expected, HUGGINGFACE_NAMES, BLOCKS, 1e-6, "tanh")
    assert relative_error(model(x), expected) <= 1e-10
    # The comparison is sensitive to the order of channels.
    wrong = nn.functional.linear(patches_channel_first(x), weight, bias)
    wrong = vit(x, bare, wrong, HUGGINGFACE_NAMES, BLOCKS, 1e-6, "tanh")
    assert relative_error(model(x), wrong) > 1e-3
    # Without a name of such a model, the shape is that of a NaFlex model.
    (tmp_path / "config.json").write_text('{"model_type": "siglip_vision_model"}')
    with pytest.raises(CheckpointError, match=r"NaFlex .*pass layout='huggingface-matrix'"):
        load(tmp_path, config=MATRIX_CONFIG)
    chosen = load(tmp_path, config=MATRIX_CONFIG, layout="huggingface-matrix")
    assert torch.equal(chosen(x), model(x))


@pytest.mark.parametrize("blocks_in_config", [BLOCKS, BLOCKS + 1])
def test_bagel(blocks_in_config: int, tmp_path: Path) -> None:
    """Its code removes the last block of `vit_config`, and takes a corner of the positions."""
    prefix = "vit_model.vision_model."
    tensors = draw_tensors(
        HUGGINGFACE_NAMES, ("embeddings.patch_embedding", (WIDTH, P * P * 3)), prefix
    )
    save_file(tensors, tmp_path / "model.safetensors")
    vision = {**MATRIX_CONFIG.to_hf(), "num_hidden_layers": blocks_in_config, "rope": False}
    content = {"model_type": "bagel", "vit_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(content))
    expected = replace(MATRIX_CONFIG, interpolation="crop")
    assert load(tmp_path).config == expected
    vision["num_hidden_layers"] = BLOCKS + 2
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"missing tensors|blocks"):
        load(tmp_path)


def find_all(folder: Path) -> list[Match]:
    """Return the encoders that `inspect` lists."""
    return find_all_matches(Checkpoint(find_source(folder), config=MATRIX_CONFIG))


TIMM_NAMES = {**OLD_MOONDREAM, "pos": "pos_embed"}


@torch.no_grad()
def test_mlx_janus(tmp_path: Path) -> None:
    """mlx-vlm's `multi_modality`: timm's names, channels last, tanh GELU, epsilon 1e-5."""
    prefix = "vision_model.vision_tower."
    patch = "patch_embed.proj"
    tensors = draw_tensors(TIMM_NAMES, (patch, (WIDTH, P, P, 3)), prefix)
    save_file({**tensors, "aligner.layers.0.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    params = {"model_name": "siglip_large_patch16_384", "num_heads": HEADS}
    content = {
        "model_type": "multi_modality",
        "vision_config": {"model_type": "vision", "cls": "CLIPVisionTower", "params": params},
    }
    (tmp_path / "config.json").write_text(json.dumps(content))
    model = load(tmp_path)
    assert model.provenance is not None
    assert model.provenance.layout == "mlx (Janus), prefix vision_model.vision_tower"
    bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    x = pixels(model.config)
    # A convolution on images with channels last, written out as sums over a patch.
    cells = patches_channel_last(x).reshape(len(x), 36, P, P, 3)
    patches = torch.einsum("bnyxc,oyxc->bno", cells, bare[f"{patch}.weight"])
    patches = patches + bare[f"{patch}.bias"]
    expected = vit(x, bare, patches, TIMM_NAMES, BLOCKS, 1e-5, "tanh")
    assert relative_error(model(x), expected) <= 1e-10
    for eps, act in ((1e-6, "tanh"), (1e-5, "none")):
        wrong = vit(x, bare, patches, TIMM_NAMES, BLOCKS, eps, act)
        assert relative_error(model(x), wrong) > 1e-9
    (tmp_path / "config.json").write_text(json.dumps({**content, "model_type": "deepseek_vl_v2"}))
    message = r"model_type 'deepseek_vl_v2' in layout 'mlx-janus' is not supported: .*two epsilons"
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)
