"""Checkpoints as other libraries write them, with random weights.

Their code saves, ours loads, and both compute.

Every tower is compared in float32 (to 1e-5) and in float64 (to 1e-10), where nothing else is said.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from siglip_port import CheckpointError, SigLipVisionConfig, SigLipVisionModel
from siglip_port.checkpoint import layouts as key_map
from siglip_port.checkpoint.key_rules import Layout
from siglip_port.parity.metrics import relative_error
from siglip_port.parity.stress_weights import randomise
from tests.helpers.checkpoints import ODD, edit_config, edit_tensors, pixels
from tests.helpers.other_libraries import (
    VISION,
    build,
    flax,
    small_vision,
    timm_tower,
    write_npz,
)

load = SigLipVisionModel.from_hf


@torch.no_grad()
def assert_equal(
    folder: Path,
    theirs: nn.Module,
    run: Callable[[Tensor], dict[str, Tensor]],
    **how: Any,  # noqa: ANN401
) -> SigLipVisionModel:
    """Loads the port, and compares what both compute of noise in the port's shape."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        model = load(folder, dtype=dtype, **how)
        theirs.to(dtype).eval()
        pixel_values = pixels(model.config).to(dtype)
        expected = run(pixel_values)
        tokens = model(pixel_values)
        assert relative_error(tokens, expected["tokens"]) <= tolerance
        if "pooled" in expected:
            assert relative_error(model.pool(tokens), expected["pooled"]) <= tolerance
        else:
            assert model.pooling_head is None
    theirs.float()
    return load(folder, **how)


# --- timm and open_clip ---------------------------------------------------------------------------


def timm_outputs(tower: Any) -> Callable[[Tensor], dict[str, Tensor]]:  # noqa: ANN401
    return lambda x: {"tokens": tower.forward_features(x), "pooled": tower(x)}


EXACT, TANH = "gelu", "gelu_pytorch_tanh"


@pytest.mark.parametrize(
    ("name", "act"),
    [
        ("vit_base_patch16_siglip_224", EXACT),
        ("vit_base_patch32_siglip_256", TANH),
        ("vit_large_patch16_siglip_384", EXACT),
        ("vit_large_patch16_siglip_512", TANH),
        ("vit_so400m_patch14_siglip_378", EXACT),
        ("vit_so400m_patch16_siglip_512", TANH),
        ("vit_giantopt_patch16_siglip_256", TANH),
        ("vit_base_patch16_siglip_gap_224", EXACT),
        ("vit_so400m_patch16_siglip_gap_256", TANH),
    ],
)
def test_timm_towers(name: str, act: str, tmp_path: Path) -> None:
    tower = timm_tower(name)
    timm.models.save_for_hf(tower, str(tmp_path), safe_serialization=True)
    model = (
        assert_equal(tmp_path, tower, timm_outputs(tower)) if "gap" not in name else load(tmp_path)
    )
    assert model.config == replace(
        ODD, hidden_act=act, pooling_head="gap" not in name, mean_pooling="gap" in name
    )
    assert model.provenance is not None
    assert model.provenance.layout == "timm, no prefix"
    with torch.no_grad():
        x = pixels(ODD).float()
        assert relative_error(model.embed(x), tower.eval()(x)) <= 1e-5


def test_all_names_of_timm_are_known() -> None:
    """Activation, patch and pooling, for every SigLIP architecture that timm has, from its own code."""
    from siglip_port.checkpoint.registry import config_of_name

    names = [n for n in timm.list_models("*siglip*") if n.startswith(("vit_", "naflexvit_"))]
    assert len(names) > 30
    for name in names:
        config = config_of_name(name)
        assert config is not None
        with torch.device("meta"):
            tower: Any = timm.create_model(name)
        assert (config.hidden_act == TANH) == (
            type(tower.blocks[0].mlp.act).__name__ == "GELUTanh"
        ), name
        assert config.mean_pooling == (tower.global_pool == "avg")
        assert config.num_encoder_blocks == len(tower.blocks)
        assert config.num_attention_heads == tower.blocks[0].attn.num_heads
        assert (config.embed_dim, config.mlp_hidden_dim) == tower.blocks[0].mlp.fc1.weight.shape[
            ::-1
        ]
        assert tower.norm.eps == config.layer_norm_eps
        if not config.naflex:
            assert (config.patch_size, config.image_size) == (
                tower.patch_embed.patch_size[0],
                tower.patch_embed.img_size[0],
            )


def test_timm_classifiers_and_training_prefixes(tmp_path: Path) -> None:
    tower = timm_tower("vit_base_patch16_siglip_gap_224")
    timm.models.save_for_hf(tower, str(tmp_path), safe_serialization=True)
    edit_tensors(
        tmp_path,
        lambda t: {
            **{f"module.{k}": v for k, v in t.items()},
            "module.head.weight": torch.ones(5, 72),
        },
    )
    model = load(tmp_path)
    assert model.provenance is not None
    assert model.provenance.dropped == {"image classifier": 1}
    assert model.config.mean_pooling


def test_timm_naflex(tmp_path: Path) -> None:
    tower: Any = timm.create_model(
        "naflexvit_base_patch16_siglip",
        embed_dim=72,
        depth=3,
        num_heads=4,
        mlp_ratio=1.41,
        pos_embed_grid_size=(6, 6),
        num_classes=0,
    )
    randomise(tower)
    timm.models.save_for_hf(tower, str(tmp_path), safe_serialization=True)
    model = assert_equal(tmp_path, tower, timm_outputs(tower))
    assert model.config.naflex
    assert (model.config.grid_size, model.config.patch_size) == (6, 16)
    with torch.no_grad():  # another shape, which both resize bilinearly with antialiasing
        x = torch.randn(2, 3, 16 * 9, 16 * 4)
        assert relative_error(model.embed(x), tower.eval()(x)) <= 1e-5


def test_timm_without_its_config_is_refused_in_words(tmp_path: Path) -> None:
    timm.models.save_for_hf(
        timm_tower("vit_base_patch16_siglip_224"), str(tmp_path), safe_serialization=True
    )
    (tmp_path / "config.json").unlink()
    with pytest.raises(
        CheckpointError,
        match=r"tell the number of heads and the activation; put .* or pass config=",
    ):
        load(tmp_path)
    config = replace(ODD, hidden_act="gelu")
    assert load(tmp_path / "model.safetensors", config=config).config == config


def test_open_clip_files(tmp_path: Path) -> None:
    """As open_clip lays them out; `pytest -m versions` has open_clip itself write them."""
    tower = timm_tower("vit_so400m_patch16_siglip_256")
    names = {f"visual.trunk.{k}": v.contiguous() for k, v in tower.state_dict().items()}
    text = {
        "text.transformer.x": torch.ones(2),
        "logit_scale": torch.ones(()),
        "logit_bias": torch.ones(()),
    }
    save_file({**names, **text}, tmp_path / "open_clip_model.safetensors")
    vision = {
        "image_size": 45,
        "timm_model_name": "vit_so400m_patch16_siglip_256",
        "timm_pool": "map",
        "num_heads": 4,
    }
    preprocess = {
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
        "resize_mode": "squash",
    }
    content = {"model_cfg": {"embed_dim": 72, "vision_cfg": vision}, "preprocess_cfg": preprocess}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    model = assert_equal(tmp_path, tower, timm_outputs(tower))
    assert model.config == ODD
    assert model.provenance is not None
    assert model.provenance.layout == "timm, prefix visual.trunk"
    assert model.provenance.dropped == {
        "scale and bias of the image-text logits": 2,
        "text tower": 1,
    }
    assert model.preprocessor_config["resample"] == 3


# --- big_vision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("root", ["params/img/", "img/"])
@pytest.mark.parametrize("scanned", [False, True], ids=["indexed", "scanned"])
@pytest.mark.parametrize("naflex", [False, True], ids=["fixed", "naflex"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_big_vision(root: str, scanned: bool, naflex: bool, dtype: str, tmp_path: Path) -> None:
    config = replace(
        ODD, naflex=naflex, image_size=42
    )  # what shapes tell: six patches of seven pixels
    original = SigLipVisionModel(config)
    randomise(original)
    original = original.to(getattr(torch, dtype)).float()
    path = tmp_path / "tower.npz"
    write_npz(path, flax(config, original.state_dict(), scanned=scanned), root, dtype)
    model = load(path)
    assert model.config == config
    assert next(model.parameters()).dtype == getattr(torch, dtype)
    state = model.state_dict()
    assert all(torch.equal(state[name].float(), t) for name, t in original.state_dict().items())
    assert model.provenance is not None
    assert ("blocks stacked" in model.provenance.layout) == scanned
    assert model.provenance.dropped == {
        "scale and bias of the image-text logits": 1,
        "text tower": 1,
    }
    model.save_hf(tmp_path / "hf")
    assert all(torch.equal(t, state[n]) for n, t in load(tmp_path / "hf").state_dict().items())


@torch.no_grad()
def test_big_vision_as_timm_reads_it(tmp_path: Path) -> None:
    """An independent witness: timm's own reader of `.npz` files."""
    original = SigLipVisionModel(replace(ODD, image_size=42))
    randomise(original)
    write_npz(
        tmp_path / "tower.npz",
        flax(original.config, original.state_dict(), scanned=False),
        "params/img/",
    )
    tower: Any = timm_tower("vit_base_patch32_siglip_256", img_size=42).eval()
    tower.load_pretrained(str(tmp_path / "tower.npz"), prefix="params/img/")
    x = pixels(original.config).float()
    model = load(tmp_path / "tower.npz")
    assert relative_error(model(x), tower.forward_features(x)) <= 1e-5
    assert relative_error(model.embed(x), tower(x)) <= 1e-5
    assert torch.equal(model(x), original.eval()(x))


def test_paligemmas_own_file(tmp_path: Path) -> None:
    """No pooling head, and the projector under the tower's own prefix."""
    config = replace(ODD, pooling_head=False, image_size=42)
    original = SigLipVisionModel(config)
    randomise(original)
    arrays = flax(config, original.state_dict(), scanned=True)
    arrays |= {"head/kernel": np.ones((72, 16)), "head/bias": np.ones(16)}
    language = {"params/llm/layers/mlp/linear": np.ones(3, np.float32)}
    np.savez(
        tmp_path / "pt.npz",
        **{f"params/img/{k}": v.astype(np.float32) for k, v in arrays.items()},  # type: ignore[arg-type]
        **language,  # type: ignore[arg-type]
    )
    model = load(tmp_path / "pt.npz")
    assert model.config == config
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in original.state_dict().items())
    assert model.provenance is not None
    assert model.provenance.dropped == {"language model": 1, "projector": 2}


def test_the_size_of_a_published_picture_is_known(tmp_path: Path) -> None:
    """27 x 27 patches of 14 pixels and a width of 1152 are siglip-so400m-patch14-384, not a tower for 378 pixels."""
    config = SigLipVisionConfig(
        embed_dim=1152,
        num_attention_heads=16,
        num_encoder_blocks=1,
        mlp_hidden_dim=8,
        patch_size=14,
        image_size=384,
    )
    model = SigLipVisionModel(config)
    write_npz(tmp_path / "a.npz", flax(config, model.state_dict(), scanned=True), "img/")
    assert load(tmp_path / "a.npz").config == config


def test_arrays_that_are_pickles_are_not_read(tmp_path: Path) -> None:
    arrays = flax(replace(ODD, image_size=42), SigLipVisionModel(ODD).state_dict(), scanned=False)
    np.savez(
        tmp_path / "a.npz",
        **{f"img/{k}": v for k, v in arrays.items()},  # type: ignore[arg-type]
        evil=np.array([print], dtype=object),
    )
    assert (
        load(tmp_path / "a.npz").provenance is not None
    )  # beside the tower, it is not even looked at
    arrays["MAPHead_0/probe"] = np.array([print], dtype=object)
    np.savez(tmp_path / "a.npz", **{f"img/{k}": v for k, v in arrays.items()})  # type: ignore[arg-type]
    with pytest.raises(
        CheckpointError, match=r"dtype: expected one of F64, F32, F16, BF16, found a pickle"
    ):
        load(tmp_path / "a.npz")


def test_a_damaged_npz(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(CheckpointError, match=r"a.npz is not a whole npz file .* fetch it again"):
        load(tmp_path / "a.npz")


# --- towers inside vision-language models, written by transformers --------------------------------


FAMILIES = [
    "paligemma",
    "gemma3",
    "llava_onevision",
    "idefics2",
    "idefics3",
    "smolvlm",
    "lfm2_vl",
    "janus",
    "deepseek_vl",
    "colpali",
    "llava_next",
]


@pytest.mark.parametrize("kind", FAMILIES)
def test_towers_inside_vision_language_models(kind: str, tmp_path: Path) -> None:
    whole, tower_of = build(kind)
    randomise(whole)
    whole.save_pretrained(tmp_path)
    tower = tower_of(whole)

    def run(x: Tensor) -> dict[str, Tensor]:
        if kind != "lfm2_vl":
            return {"tokens": tower(x).last_hidden_state}
        from siglip_port.patches import pack

        return {"tokens": tower(**pack(list(x), 7)).last_hidden_state}

    model = assert_equal(tmp_path, tower, run)
    assert model.provenance is not None
    assert model.provenance.dropped
    assert model.provenance.tensors_read == 16 * 3 + 5
    assert model.config.hidden_act == ("gelu" if kind == "janus" else "gelu_pytorch_tanh")
    assert model.config.resize_rule == (
        "navit"
        if kind in ("idefics2", "idefics3", "smolvlm")
        else "naflex"
        if kind == "lfm2_vl"
        else None
    )


# --- names of other code, with a tower computed from the stored tensors as that code computes it --


def vit(
    x: Tensor,
    t: dict[str, Tensor],
    patches: Tensor,
    names: dict[str, str],
    blocks: int,
    eps: float,
    act: str,
) -> Tensor:
    """A ViT straight from stored tensors.

    `names` say how the parts are called, `q` None for a fused qkv.
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


HEADS, WIDTH, BLOCKS = 2, 144, 3  # heads of 72, which moondream and gemma_pytorch have
P = 7


def patches_channel_first(x: Tensor) -> Tensor:
    """Moondream's: [B, C, H, W] -> [B, N, C * P * P]."""
    b, c, h, w = x.shape
    cells = x.reshape(b, c, h // P, P, w // P, P).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(b, (h // P) * (w // P), c * P * P)


def made_of(
    names: dict[str, str], patch: tuple[str, tuple[int, ...]], prefix: str
) -> dict[str, Tensor]:
    """Random tensors under the names of the code in question, all in float64."""
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
    "pos": "pos_emb", "block": "blocks.{}", "norm1": "ln1", "qkv": "attn.qkv", "out": "attn.proj", "norm2": "ln2",
    "norm": "post_ln",
}  # fmt: skip
OLD_MOONDREAM = {
    **MOONDREAM,
    "pos": "pos_embed",
    "norm1": "norm1",
    "norm2": "norm2",
    "norm": "norm",
}
NANOVLM = {
    **MOONDREAM, "pos": "patch_embedding.position_embedding", "qkv": "attn.qkv_proj", "out": "attn.out_proj",
    "norm": "layer_norm",
}  # fmt: skip
GEMMA = {
    "pos": "position_embedding.weight", "block": "encoder_blocks.{}", "norm1": "layer_norm1", "attn": "self_attn",
    "out": "self_attn.o_proj", "norm2": "layer_norm2", "norm": "final_norm",
}  # fmt: skip


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
            {"model_type": "moondream1", "config": {}},
        ),
        ("Moondream", "vision.", MOONDREAM, "patch_emb", True, 1e-5, None),
        (
            "Moondream before 2025",
            "vision_encoder.encoder.model.visual.",
            OLD_MOONDREAM,
            "patch_embed.linear",
            True,
            1e-5,
            {"model_type": "moondream1"},
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
def test_names_of_other_code(
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
    tensors = made_of(names, (patch, shape), prefix)
    rest = {f"{prefix}proj_mlp.fc1.weight": torch.ones(2)} if title == "Moondream" else {}
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
        # The comparison tells: with the other epsilon, or the other GELU, it would not be equal.
        assert (
            relative_error(model(x), vit(x, bare, patches, names, BLOCKS, 2.2e-6, "tanh")) > 1e-10
        )
        assert relative_error(model(x), vit(x, bare, patches, names, BLOCKS, eps, "none")) > 1e-7


# --- towers of timm's names inside other models ---------------------------------------------------

EXACT_ODD = replace(ODD, hidden_act=EXACT)


def odd_heads(config: dict[str, Any]) -> dict[str, Any]:
    """These towers have the number of heads from a published name; our small one has to say it."""
    return {**config, "num_heads": 4, "img_size": 45}


@pytest.mark.parametrize(
    ("prefix", "content", "beside"),
    [
        (
            "vision_backbone.fused_featurizer.",
            {
                "model_type": "openvla",
                "vision_backbone_id": "dinosiglip-vit-so-224px",
                "timm_model_ids": [
                    "vit_large_patch14_reg4_dinov2.lvd142m",
                    "vit_so400m_patch14_siglip_224",
                ],
                "image_sizes": [224, 224],
            },
            (
                "vision_backbone.featurizer.",
                ("patch_embed.proj.weight", "blocks.0.norm1.weight", "cls_token"),
            ),
        ),
        (
            "vpm.",
            {
                "model_type": "minicpmv",
                "vision_encoder": "vit_so400m_patch14_siglip_384.webli",
                "hidden_size": 2304,
            },
            ("llm.", ("model.x",)),
        ),
        (
            "vision_model.vision_tower.",
            {
                "model_type": "multi_modality",
                "vision_config": {
                    "cls": "CLIPVisionTower",
                    "params": {"model_name": "siglip_large_patch16_384"},
                },
            },
            ("gen_vision_model.", ("encoder.conv_in.weight",)),
        ),
        (
            "vision_model.vision_tower_low.vision_tower.",
            {
                "vision_config": {
                    "params": {"low_res_cfg": {"model_name": "siglip_large_patch16_384"}}
                }
            },
            (
                "vision_model.vision_tower_high.vision_tower.",
                ("patch_embed.proj.weight", "blocks.0.norm1.weight", "blocks.0.attn.rel_pos_h"),
            ),
        ),
    ],
    ids=["OpenVLA", "MiniCPM-V 2.0", "Janus", "DeepSeek-VL 7b"],
)
@torch.no_grad()
def test_timm_towers_inside_other_models(
    prefix: str, content: dict[str, Any], beside: tuple[str, tuple[str, ...]], tmp_path: Path
) -> None:
    tower = timm_tower("vit_so400m_patch14_siglip_384").eval()
    tensors = {prefix + name: tensor for name, tensor in tower.state_dict().items()}
    tensors |= {beside[0] + name: torch.ones(2, 3, 4, 5) for name in beside[1]}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(odd_heads(content)))
    model = load(tmp_path)
    assert model.config == EXACT_ODD
    x = pixels(ODD).float()
    assert relative_error(model(x), tower.forward_features(x)) <= 1e-5  # type: ignore[operator]
    assert relative_error(load(tmp_path, pooling_head=False)(x), tower.forward_features(x)) <= 1e-5  # type: ignore[operator]


# --- transformers' names in files that transformers did not write ---------------------------------


def hf_tower(folder: Path, config: SigLipVisionConfig = ODD) -> dict[str, Tensor]:
    """The tensors of a tower as transformers writes it, without any prefix."""
    from siglip_port.parity.siglip.reference import write_random_checkpoint

    write_random_checkpoint(folder, config)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    "prefix",
    [
        "vision_tower.vision_model.",
        "model.vision_tower.vision_model.",
        "vision_tower.",
        "model.vision_tower.",
        "model.vision_tower.vision_tower.vision_model.",
        "model.vision_model.",
        "vpm.",
        "model.embed_tokens_extend.image_embed.img_processor.",
        "module.siglip2.vision_model.",
    ],
)
def test_prefixes(prefix: str, tmp_path: Path) -> None:
    tensors = hf_tower(tmp_path)
    save_file(
        {**{prefix + n: t for n, t in tensors.items()}, "lm_head.weight": torch.ones(3)},
        tmp_path / "model.safetensors",
    )
    model = load(tmp_path)
    assert model.provenance is not None
    assert model.provenance.layout == f"HuggingFace, prefix {prefix.rstrip('.')}"
    assert torch.equal(model.state_dict()["pooling_head.probe"], tensors["head.probe"])


def test_mlx(tmp_path: Path) -> None:
    """mlx-vlm, `sanitize`.

    `v.transpose(0, 2, 3, 1)` of the patch embedding, so that the channels come last.
    """
    tensors = {f"vision_tower.{name}": tensor for name, tensor in hf_tower(tmp_path).items()}
    expected = load(tmp_path).state_dict()
    patch = "vision_tower.embeddings.patch_embedding.weight"
    tensors[patch] = torch.from_numpy(
        np.ascontiguousarray(tensors[patch].numpy().transpose(0, 2, 3, 1))
    )
    save_file(tensors, tmp_path / "model.safetensors")
    model = load(tmp_path)
    assert model.provenance is not None
    assert model.provenance.layout == "mlx, prefix vision_tower"
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_patches_as_large_as_there_are_channels(tmp_path: Path) -> None:
    """Their shape, [D, 3, 3, 3], would fit the order of mlx too."""
    config = replace(ODD, patch_size=3, image_size=9)
    hf_tower(tmp_path, config)
    assert load(tmp_path).config == config


def test_llava_as_it_was_first_written(tmp_path: Path) -> None:
    """Its config.json describes the language model and names the tower.

    The last block of that one is not stored.
    """
    config = replace(
        ODD, embed_dim=1152, num_attention_heads=16, pooling_head=False, num_encoder_blocks=2
    )
    prefix = "model.vision_tower.vision_tower.vision_model."
    tensors = {prefix + n: t for n, t in hf_tower(tmp_path, config).items()}
    save_file({**tensors, "model.layers.0.x": torch.ones(3)}, tmp_path / "model.safetensors")
    content = {
        "model_type": "llava",
        "hidden_size": 3584,
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
    }
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert load(tmp_path).config == replace(config, image_size=42)


def test_phi_4(tmp_path: Path) -> None:
    """Its own files say nothing of the tower's sizes, which its code knows.

    Here with a tower of two blocks.
    """
    vision = {**small_vision("phi4_multimodal_vision"), "feature_layer": -2, "crop_size": 45}
    tower: Any = transformers.models.phi4_multimodal.modeling_phi4_multimodal.Phi4MultimodalVisionModel(
        transformers.models.phi4_multimodal.configuration_phi4_multimodal.Phi4MultimodalVisionConfig(
            **vision
        )
    )
    randomise(tower)
    for layer in tower.encoder.layers:
        # transformers 5.23 says True, and its sdpa then hides later patches wherever none is
        # padding; eager does not.
        layer.self_attn.is_causal = False
    prefix = "model.embed_tokens_extend.image_embed.img_processor."
    tensors = {prefix + name: tensor for name, tensor in tower.state_dict().items()}
    save_file(
        {**tensors, "model.embed_tokens_extend.image_embed.glb_GN": torch.ones(3)},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "phi4_multimodal", "vision_config": vision})
    )

    def run(x: Tensor) -> dict[str, Tensor]:
        output = tower(x)
        return {"tokens": output.last_hidden_state, "pooled": output.pooler_output}

    model = assert_equal(tmp_path, tower, run)
    assert model.config.resize_rule == "navit"
    known = SigLipVisionConfig.from_hf(
        {"model_type": "phi4mm", "hidden_size": 3072, "num_hidden_layers": 32}
    )
    assert (known.embed_dim, known.num_encoder_blocks, known.num_patches) == (1152, 27, 32 * 32)


@pytest.mark.parametrize(("drop", "blocks"), [(True, 10), (False, 11), (..., 10)])
def test_minicpm(drop: object, blocks: int, tmp_path: Path) -> None:
    """Its config.json counts a last block that may not be stored, and does not name its kind of positions."""
    tensors = hf_tower(tmp_path, replace(ODD, num_encoder_blocks=blocks, pooling_head=False))
    save_file({f"vpm.{n}": t for n, t in tensors.items()}, tmp_path / "model.safetensors")
    edit_config(tmp_path, num_hidden_layers=11, model_type="siglip")
    vision = json.loads((tmp_path / "config.json").read_text())
    whole = {"model_type": "minicpmv", "vision_config": vision, "drop_vision_last_layer": drop}
    (tmp_path / "config.json").write_text(
        json.dumps({k: v for k, v in whole.items() if v is not ...})
    )
    config = load(tmp_path).config
    assert config == replace(
        ODD, num_encoder_blocks=blocks, pooling_head=False, interpolation="navit"
    )


def test_two_towers_in_one_file(tmp_path: Path) -> None:
    tensors = hf_tower(tmp_path)
    other = {f"b.{n}": t * 2 for n, t in tensors.items()}
    save_file(
        {**{f"a.{n}": t for n, t in tensors.items()}, **other}, tmp_path / "model.safetensors"
    )
    with pytest.raises(
        CheckpointError,
        match=r"more than one vision tower.*prefix='a\.'.*prefix='b\.'.*say which by",
    ):
        load(tmp_path)
    assert torch.equal(
        load(tmp_path, prefix="b.").state_dict()["pooling_head.probe"], other["b.head.probe"]
    )
    assert load(tmp_path, prefix="a.", layout="huggingface").provenance is not None
    with pytest.raises(CheckpointError, match=r"no SigLIP vision tower .* behind the prefix 'c.'"):
        load(tmp_path, prefix="c.")
    with pytest.raises(
        CheckpointError, match=r"layout: timm, prefix a\): a.patch_embed.proj.weight is missing"
    ):
        load(tmp_path, prefix="a.", layout="timm")
    with pytest.raises(
        ValueError, match=r"layout must be None or one of huggingface, .*, got 'hf'"
    ):
        load(tmp_path, layout="hf")


def test_clip_is_refused_by_name(tmp_path: Path) -> None:
    config = transformers.CLIPVisionConfig(**VISION)
    transformers.CLIPVisionModel(config).save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError,
        match=r"refused: .*HuggingFace.*: it has a class token, which SigLIP has not",
    ):
        load(tmp_path)


def test_only_the_tower_is_read(
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
    capfd: Any,  # noqa: ANN401
) -> None:
    """Whatever else the file holds.

    Neither its bytes, of types unknown here too, nor its other shards are needed.
    """
    tensors = {f"model.vision_tower.{n}": t for n, t in hf_tower(tmp_path).items()}
    rest = {
        f"model.language_model.layers.{i}.w": torch.ones(3, dtype=torch.int8) for i in range(5000)
    }
    save_file(tensors, tmp_path / "tower.safetensors")
    (tmp_path / "model.safetensors").unlink()
    weight_map = {
        **dict.fromkeys(tensors, "tower.safetensors"),
        **dict.fromkeys(rest, "absent.safetensors"),
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    model = load(tmp_path)
    assert model.provenance is not None
    assert model.provenance.dropped == {"language model": 5000}
    assert model.provenance.bytes_read == sum(t.nbytes for t in tensors.values())
    assert not recwarn.list
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("layout", key_map.LAYOUTS, ids=lambda layout: layout.name)
def test_any_layout_becomes_ours_and_comes_back(layout: Layout, tmp_path: Path) -> None:
    """Every layout that there is.

    Stored by its own table, read, exported, read again, bit for bit.
    """
    config = replace(ODD, pooling_head=bool(layout.head), naflex=layout.naflex, image_size=42)
    original = SigLipVisionModel(config)
    randomise(original)
    rows, sep = layout.rules(config.pooling_head), "/" if "big_vision" in layout.name else "."
    stored = layout.to_stored(
        original.state_dict(), 11, config.num_attention_heads, rows, f"some{sep}where{sep}"
    )
    save_file({n: t.contiguous() for n, t in stored.items()}, tmp_path / "tower.safetensors")
    model = load(tmp_path / "tower.safetensors", config=config)
    again = [model]
    model.save_hf(tmp_path / "hf")
    again.append(load(tmp_path / "hf"))
    model.save_timm(tmp_path / "timm")
    again.append(load(tmp_path / "timm"))
    for other in again:
        assert other.config == config
        assert all(torch.equal(t, other.state_dict()[n]) for n, t in original.state_dict().items())
        assert all(t.is_contiguous() for t in other.state_dict().values())


# --- what must not be believed --------------------------------------------------------------------


@pytest.mark.parametrize(
    "vision",
    [
        {"hidden_act": "quick_gelu"},
        {"layer_norm_eps": "1e-5"},
        {"vision_use_head": None},
        {"image_size": [45, 54]},
        {"model_type": "siglip2_navit"},
        {"model_type": "clip_vision_model"},
    ],
)
def test_a_configuration_that_is_refused_is_not_replaced_by_a_name(
    vision: dict[str, Any], tmp_path: Path
) -> None:
    """Most fine-tuned checkpoints name the published one that they began with."""
    hf_tower(tmp_path)
    own = json.loads((tmp_path / "config.json").read_text())
    content = {
        "_name_or_path": "google/siglip-base-patch16-224",
        "model_type": "x",
        "vision_config": {**own, **vision},
    }
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(
        CheckpointError,
        match=r"not the configuration of a SigLIP vision tower .* if it is wrong, pass",
    ):
        load(tmp_path)
    assert load(tmp_path, config=ODD).config == ODD
    (tmp_path / "config.json").write_text("{")
    assert load(tmp_path, config=ODD).config == ODD


def test_bagel_is_refused_whatever_it_names(tmp_path: Path) -> None:
    hf_tower(tmp_path, replace(ODD, naflex=True, image_size=42))
    content = {"model_type": "bagel", "vit_path": "google/siglip-so400m-patch14-384"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="'bagel' is refused"):
        load(tmp_path)


def test_heads_of_other_parts_are_not_the_towers(tmp_path: Path) -> None:
    config = replace(
        ODD, embed_dim=1152, num_attention_heads=16, pooling_head=False, num_encoder_blocks=1
    )
    hf_tower(tmp_path, config)
    content = {"model_type": "llava_qwen", "mm_vision_tower": "google/siglip-so400m-patch14-384"}
    (tmp_path / "config.json").write_text(json.dumps({**content, "audio_config": {"num_heads": 8}}))
    assert load(tmp_path).config.num_attention_heads == 16


def test_big_vision_beside_a_configuration_of_timm(tmp_path: Path) -> None:
    original = SigLipVisionModel(replace(ODD, image_size=42))
    write_npz(
        tmp_path / "tower.npz", flax(original.config, original.state_dict(), scanned=False), "img/"
    )
    (tmp_path / "config.json").write_text('{"architecture": "vit_base_patch16_siglip_224"}')
    assert (
        load(tmp_path / "tower.npz").config == original.config
    )  # the tanh form, whatever timm does
    with pytest.raises(CheckpointError, match=r"holds neither .*; pass the file tower.npz itself"):
        load(tmp_path)


def test_a_configuration_for_remote_code_beside_open_clips(tmp_path: Path) -> None:
    tower = timm_tower("vit_base_patch16_siglip_224")
    save_file(
        {f"visual.trunk.{k}": v for k, v in tower.state_dict().items()},
        tmp_path / "model.safetensors",
    )
    vision = {"image_size": 45, "timm_model_name": "vit_base_patch16_siglip_224", "num_heads": 4}
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {"vision_cfg": vision}})
    )
    (tmp_path / "config.json").write_text(
        '\ufeff{"model_type": "siglip", "auto_map": {"AutoModel": "code.Model"}}'
    )
    assert load(tmp_path).config == EXACT_ODD


@pytest.mark.parametrize(
    ("name", "pool", "by_mean"),
    [("vit_base_patch16_siglip_224", "avg", True), ("vit_base_patch16_siglip_gap_224", "", False)],
)
def test_how_timm_pools_is_told_by_its_arguments(
    name: str, pool: str, by_mean: bool, tmp_path: Path
) -> None:
    tower = timm_tower(name, global_pool=pool, fc_norm=False)
    tensors = {k: v for k, v in tower.state_dict().items() if not k.startswith("attn_pool")}
    timm.models.save_for_hf(tower, str(tmp_path), safe_serialization=True)
    save_file(tensors, tmp_path / "model.safetensors")
    assert load(tmp_path).config.mean_pooling == by_mean
    assert not load(tmp_path, pooling_head=False).config.mean_pooling


@pytest.mark.parametrize("prefix", ["vision_tower.vision_model.", "vision_tower.vision_model"])
def test_a_prefix_may_be_given_as_messages_show_it(prefix: str, tmp_path: Path) -> None:
    tensors = hf_tower(tmp_path)
    save_file(
        {f"vision_tower.vision_model.{n}": t for n, t in tensors.items()},
        tmp_path / "model.safetensors",
    )
    assert load(tmp_path, prefix=prefix).config == ODD
    assert load(tmp_path, prefix=prefix, layout="huggingface").config == ODD
    with pytest.raises(
        CheckpointError, match=r"has the shape \[72, 3, 7, 7\], which it cannot have in the layout"
    ):
        load(tmp_path, prefix=prefix, layout="huggingface-naflex")
    with pytest.raises(CheckpointError, match=r"the architecture describes a NaFlex tower"):
        load(tmp_path, config=replace(ODD, naflex=True))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"config": {"hidden_size": 72}}, "config must be a SigLipVisionConfig, got a dict"),
        ({"prefix": 3}, "prefix must be a text, got 3"),
        ({"device": 1.5}, "device 1.5 cannot be used"),
    ],
)
def test_arguments_of_other_types(how: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path, **how)


@pytest.mark.parametrize("damage", ["data", "header", "before"])
def test_a_damaged_npz_member(damage: str, tmp_path: Path) -> None:
    config = replace(ODD, image_size=42, num_encoder_blocks=1)
    path = tmp_path / "a.npz"
    write_npz(path, flax(config, SigLipVisionModel(config).state_dict(), scanned=True), "img/")
    content = bytearray(path.read_bytes())
    at = content.index(b"Transformer/encoder_norm/scale.npy")
    if damage == "before":
        content[:0] = b"shell script"
        content[-200:] = bytes(200)
    else:
        at = content.index(b"NUMPY", at) + (200 if damage == "data" else -1)
        content[at] ^= 255
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a.npz.*(fetch it again|fetch the file again)"):
        load(path)
