"""Vision encoders inside vision-language models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from siglip_port import SigLipVisionConfig, SigLipVisionModel
from siglip_port.parity.metrics import relative_error
from siglip_port.parity.stress_weights import randomize
from tests.helpers.checkpoints import ODD, edit_config, pixels
from tests.helpers.other_libraries import assert_same_outputs, write_hf_encoder
from tests.helpers.vision_language_models import build, small_vision

load = SigLipVisionModel.from_hf


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
def test_saved_by_transformers(kind: str, tmp_path: Path) -> None:
    whole, encoder_of = build(kind)
    randomize(whole)
    whole.save_pretrained(tmp_path)
    reference = encoder_of(whole)

    def run(x: Tensor) -> dict[str, Tensor]:
        if kind != "lfm2_vl":
            return {"tokens": reference(x).last_hidden_state}
        from siglip_port.patches import pack

        return {"tokens": reference(**pack(list(x), 7)).last_hidden_state}

    model = assert_same_outputs(tmp_path, reference, run)
    assert model.provenance is not None
    assert model.provenance.ignored
    assert model.provenance.tensors_read == 16 * 3 + 5
    assert model.config.hidden_act == ("gelu" if kind == "janus" else "gelu_pytorch_tanh")
    assert model.config.resize_rule == (
        "navit"
        if kind in ("idefics2", "idefics3", "smolvlm")
        else "naflex"
        if kind == "lfm2_vl"
        else None
    )


def test_phi_4(tmp_path: Path) -> None:
    """Phi-4's own files omit the sizes of its vision encoder, which are in its code."""
    vision = {**small_vision("phi4_multimodal_vision"), "feature_layer": -2, "crop_size": 45}
    phi4 = transformers.models.phi4_multimodal
    config = phi4.configuration_phi4_multimodal.Phi4MultimodalVisionConfig(**vision)
    reference = phi4.modeling_phi4_multimodal.Phi4MultimodalVisionModel(config)
    randomize(reference)
    for layer in reference.encoder.layers:
        # True in transformers 5.23, where sdpa then masks later patches if there is no padding;
        # eager attention does not.
        layer.self_attn.is_causal = False
    prefix = "model.embed_tokens_extend.image_embed.img_processor."
    tensors = {prefix + name: tensor for name, tensor in reference.state_dict().items()}
    save_file(
        {**tensors, "model.embed_tokens_extend.image_embed.glb_GN": torch.ones(3)},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "phi4_multimodal", "vision_config": vision})
    )

    def run(x: Tensor) -> dict[str, Tensor]:
        output = reference(x)
        return {"tokens": output.last_hidden_state, "pooled": output.pooler_output}

    model = assert_same_outputs(tmp_path, reference, run)
    assert model.config.resize_rule == "navit"
    published = SigLipVisionConfig.from_hf(
        {"model_type": "phi4mm", "hidden_size": 3072, "num_hidden_layers": 32}
    )
    assert (published.embed_dim, published.num_encoder_blocks, published.num_patches) == (
        1152,
        27,
        32 * 32,
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_phi_4_attention_of_transformers(attention: str, tmp_path: Path) -> None:
    """docs/vlm.md: sdpa is causal without padding; eager and padded batches are not."""
    vision = small_vision("phi4_multimodal_vision")
    phi4 = transformers.models.phi4_multimodal
    config = phi4.configuration_phi4_multimodal.Phi4MultimodalVisionConfig(
        **vision, attn_implementation=attention
    )
    reference = phi4.modeling_phi4_multimodal.Phi4MultimodalVisionModel(config).double().eval()
    randomize(reference)
    prefix = "model.embed_tokens_extend.image_embed.img_processor."
    tensors = {prefix + name: tensor for name, tensor in reference.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "phi4_multimodal", "vision_config": vision})
    )
    port = load(tmp_path)
    x = pixels(port.config)
    error = relative_error(port(x), reference(x).last_hidden_state)
    if attention == "sdpa":
        assert error > 0.1
    else:
        assert error <= 1e-6  # its softmax is in float32
    mask = torch.ones(len(x), 6, 6, dtype=torch.bool)
    mask[-1, 4:] = False
    padded = reference(x, patch_attention_mask=mask).last_hidden_state
    assert relative_error(port(x)[0], padded[0]) <= 1e-6


@pytest.mark.parametrize(("drop", "blocks"), [(True, 10), (False, 11), (..., 10)])
def test_minicpm(drop: object, blocks: int, tmp_path: Path) -> None:
    """Its config.json counts a last block that may not be stored."""
    tensors = write_hf_encoder(
        tmp_path, replace(ODD, num_encoder_blocks=blocks, pooling_head=False)
    )
    save_file({f"vpm.{n}": t for n, t in tensors.items()}, tmp_path / "model.safetensors")
    edit_config(tmp_path, num_hidden_layers=11, model_type="siglip")
    vision = json.loads((tmp_path / "config.json").read_text())
    whole = {"model_type": "minicpmv", "vision_config": vision, "drop_vision_last_layer": drop}
    (tmp_path / "config.json").write_text(
        json.dumps({k: v for k, v in whole.items() if v is not ...})
    )
    config = load(tmp_path).config
    assert config == replace(
        ODD, num_encoder_blocks=blocks, pooling_head=False, interpolation="minicpm"
    )


@pytest.mark.parametrize("count", [58, 69, 75])
@torch.no_grad()
def test_minicpm_positions(count: int, tmp_path: Path) -> None:
    """An image has the positions of MiniCPM-V's own code, also where "navit" differs."""
    config = replace(ODD, num_encoder_blocks=1, pooling_head=False)
    tensors = write_hf_encoder(tmp_path, config)
    save_file({f"vpm.{n}": t for n, t in tensors.items()}, tmp_path / "model.safetensors")
    edit_config(tmp_path, num_hidden_layers=2, model_type="siglip")
    vision = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "minicpmv", "vision_config": vision})
    )
    model = load(tmp_path)
    side = config.grid_size
    boundaries = torch.arange(1 / side, 1.0, 1 / side)
    coordinates = torch.arange(0, 1 - 1e-6, (1 / torch.tensor(count, dtype=torch.int32)).item())
    rows = torch.bucketize(coordinates, boundaries, right=True)
    embeddings = model.transformer.embeddings
    image = torch.zeros(1, 3, config.patch_size * count, config.patch_size, dtype=torch.float64)
    expected = embeddings.position_embedding.weight[rows * side] + embeddings.patch_embedding.bias
    assert relative_error(embeddings(image)[0], expected) <= 1e-10
    other = load(tmp_path, interpolation="navit").transformer.embeddings
    assert relative_error(other(image)[0], expected) > 1e-3


@pytest.mark.parametrize(
    "kind", ["llava_onevision", "paligemma", "gemma3", "idefics2", "idefics3", "smolvlm"]
)
@torch.no_grad()
def test_features_for_language_model(kind: str, tmp_path: Path) -> None:
    """The table of docs/checkpoints.md: features equal the input of the model's projector."""
    whole, _ = build(kind)
    randomize(whole)
    whole = whole.double().eval()
    whole.save_pretrained(tmp_path)
    port = load(tmp_path)
    features_in: list[Tensor] = []
    vision_path = whole.model
    projector: nn.Module = (
        vision_path.connector
        if hasattr(vision_path, "connector")
        else vision_path.multi_modal_projector
    )
    projector.register_forward_pre_hook(
        lambda _, args, kwargs: features_in.append(
            args[0] if args else kwargs["image_hidden_states"]
        ),
        with_kwargs=True,
    )
    x = pixels(port.config)
    if kind in ("paligemma", "gemma3"):
        vision_path.get_image_features(x)
    elif kind == "llava_onevision":
        size = port.config.image_size
        vision_path.get_image_features(x[None], image_sizes=torch.tensor([[size, size]]))
    else:
        vision_path.get_image_features(x[None])
    expected = features_in[0].flatten(0, -3)
    if kind == "llava_onevision":
        (features,) = port.hidden_states(x, [-1])
        assert relative_error(port(x), expected) > 1e-2  # not the tokens after post_layernorm
    else:
        features = port(x)
    assert relative_error(features, expected) <= 1e-10
