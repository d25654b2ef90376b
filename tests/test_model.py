"""The model against the reference, in float64 with random weights: each module, then the API."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import SiglipVisionModel as ReferenceModel

from siglip_port import (
    MLP,
    EncoderBlock,
    MultiheadAttention,
    OptimizedModel,
    PoolingHead,
    SigLipEncoder,
    SigLipVisionConfig,
    SigLipVisionModel,
    SigLipVisionTransformer,
    VisionEmbeddings,
    pack,
)
from siglip_port.checkpoint import layouts
from siglip_port.parity.metrics import relative_error
from siglip_port.parity.siglip import reference as references
from siglip_port.parity.siglip.reference import Reference
from siglip_port.parity.stress_weights import randomize
from tests.helpers.checkpoints import ODD, SMALL, MakeCheckpoint, pixels

# Rounding reaches 1e-15; the weakest mutant of scripts/selftest/catalog makes 6e-8.
EXACT = 1e-12

CONFIGS = {
    "odd": ODD,
    "exact GELU": replace(ODD, hidden_act="gelu"),
    "three heads": replace(SMALL, embed_dim=27, num_attention_heads=3),
    "heads 72 wide, patch 14, as so400m": replace(
        SMALL,
        embed_dim=144,
        num_attention_heads=2,
        image_size=40,
        patch_size=14,
        mlp_hidden_dim=538,
    ),
    "heads 96 wide, as giant-opt": replace(SMALL, embed_dim=192, num_attention_heads=2),
    "one patch, one head, one channel": replace(
        SMALL, image_size=8, num_attention_heads=1, num_channels=1, num_encoder_blocks=1
    ),
    "large eps": replace(SMALL, layer_norm_eps=1e-3),
}
architectures = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())

Pair = tuple[SigLipVisionModel, Reference]


@pytest.fixture
def pair(config: SigLipVisionConfig, checkpoint: MakeCheckpoint) -> Pair:
    """Port and reference in float64, loaded from the same checkpoint."""
    folder = checkpoint(config, dtype=torch.float64)
    reference = references.load(folder, pooling_head=True, dtype=torch.float64)
    return SigLipVisionModel.from_hf(folder), reference


def inputs_of(module: nn.Module, run: Callable[[], object]) -> Tensor:
    """Return the first input of `module` while `run` runs."""
    inputs: list[Tensor] = []
    hook = module.register_forward_pre_hook(
        lambda _, args, kwargs: inputs.append((*args, *kwargs.values())[0]), with_kwargs=True
    )
    run()
    hook.remove()
    return inputs[0]


@architectures
@torch.no_grad()
def test_parity_of_every_module(pair: Pair, config: SigLipVisionConfig) -> None:
    """Each module gets the reference's input of that module, so that errors do not propagate."""
    port, reference = pair
    x = pixels(config)
    reference_model = reference.model

    def check(module: str, output: Tensor, expected: Tensor) -> None:
        assert output.shape == expected.shape
        assert relative_error(output, expected) <= EXACT, module

    check("embeddings", port.transformer.embeddings(x), reference_model.embeddings(x))
    for i, layer in enumerate(reference_model.encoder.layers):
        block = port.transformer.encoder.encoder_blocks[i]
        assert isinstance(block, EncoderBlock)
        h = inputs_of(layer, lambda: reference_model(x))
        check(f"block {i}, attention", block.self_attn(h), layer.self_attn(h)[0])
        check(f"block {i}, mlp", block.mlp(h), layer.mlp(h))
        check(f"block {i}", block(h), layer(h, None))
    h = reference_model.embeddings(x)
    check(
        "encoder",
        port.transformer.encoder(h),
        reference_model.encoder(inputs_embeds=h).last_hidden_state,
    )
    expected = reference.side().run(x)
    check("tokens", port(x), expected["tokens"])
    assert port.pooling_head is not None
    check(
        "pooling head",
        port.pooling_head(expected["tokens"]),
        reference_model.head(expected["tokens"]),
    )
    check("pooled", port.embed(x), expected["pooled"])


@pytest.mark.parametrize("config", [ODD])
def test_gradients(pair: Pair, config: SigLipVisionConfig) -> None:
    port, reference = pair
    x = pixels(config)
    port.embed(x).square().sum().backward()
    reference.model(x).pooler_output.square().sum().backward()
    port_grads = {name: p.grad for name, p in port.named_parameters() if p.grad is not None}
    assert len(port_grads) == len(list(port.parameters()))
    reference_parameters = dict(reference.model.named_parameters())
    rules = layouts.HUGGINGFACE_ENCODER + layouts.HUGGINGFACE_HEAD
    for name, grad in layouts.HUGGINGFACE.to_stored(
        port_grads, config.num_encoder_blocks, config.num_attention_heads, rules
    ).items():
        # A key bias shifts all scores of a query equally, so its gradient is zero up to rounding.
        assert (grad - reference_parameters[name].grad).norm() <= 1e-10 * max(
            grad.norm(), reference_parameters["head.probe"].grad.norm()
        ), name


def test_edge_pixels_ignored() -> None:
    config = replace(SMALL, image_size=384, patch_size=14, num_encoder_blocks=1)
    model = SigLipVisionModel(config).eval()
    x = torch.randn(1, 3, 384, 384)
    tokens = model(x)
    assert tokens.shape == (1, 27 * 27, 24)
    x[:, :, 378:, :] = 7
    x[:, :, :, 378:] = -7
    assert torch.equal(model(x), tokens)
    x[:, :, 377, 0] = 7
    assert not torch.equal(model(x), tokens)


@torch.no_grad()
def test_dropout() -> None:
    config = replace(SMALL, attention_dropout=0.5)
    model = SigLipVisionModel(config)
    randomize(model)
    plain = SigLipVisionModel(SMALL).eval()
    plain.load_state_dict(model.state_dict())
    x = pixels(SMALL).float()
    assert torch.equal(model.eval().embed(x), plain.embed(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    tokens = plain(x)
    assert torch.equal(
        model.pool(tokens), model.pool(tokens)
    )  # the reference's head has no dropout


@torch.no_grad()
def test_embed() -> None:
    model = SigLipVisionModel(SMALL).eval()
    randomize(model)
    x = pixels(SMALL).float()
    pooled = model.pool(model(x))
    assert torch.equal(model.embed(x), pooled)
    assert not torch.allclose(pooled.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(
        model.embed(x, normalize=True), pooled / pooled.norm(dim=-1, keepdim=True)
    )


@torch.no_grad()
def test_batch_invariance() -> None:
    model = SigLipVisionModel(ODD).double().eval()
    randomize(model)
    x = pixels(ODD, batch=3)
    one_by_one = torch.cat([model.embed(image[None]) for image in x])
    assert relative_error(model.embed(x), one_by_one) <= EXACT


def test_pixel_dtype() -> None:
    model = SigLipVisionModel(SMALL).eval().bfloat16()
    x = pixels(SMALL)
    assert model(x).dtype == torch.bfloat16
    assert torch.equal(model(x), model(x.bfloat16()))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 16, 16), r"got torch.float32 of shape \[3, 16, 16\]"),
        (torch.zeros(1, 4, 16, 16), r"got torch.float32 of shape \[1, 4, 16, 16\]"),
        (torch.zeros(1, 3, 16, 24), r"got torch.float32 of shape \[1, 3, 16, 24\]"),
        (
            torch.zeros(1, 3, 32, 8),
            r"got torch.float32 of shape \[1, 3, 32, 8\]",
        ),  # the right number of patches, but not square
        (torch.zeros(1, 1, 3, 16, 16), r"got torch.float32 of shape \[1, 1, 3, 16, 16\]"),
        (
            torch.zeros(1, 3, 16, 16, dtype=torch.uint8),
            r"got torch.uint8 of shape \[1, 3, 16, 16\]",
        ),
        ([[0.0]], "got list"),
    ],
)
def test_invalid_pixels(x: object, message: str) -> None:
    expected = r"^pixel_values must be a floating point tensor of shape \[B, 3, 16, 16\], "
    for module in (SigLipVisionModel(SMALL), VisionEmbeddings(SMALL)):
        with pytest.raises(ValueError, match=expected + message):
            module(x)


def test_invalid_tokens() -> None:
    wrong: list[tuple[object, str]] = [
        (torch.zeros(4, 24), r"torch.float32 of shape \[4, 24\]"),
        (torch.zeros(1, 4, 25), r"torch.float32 of shape \[1, 4, 25\]"),
        (torch.zeros(1, 4, 24, dtype=torch.int64), r"torch.int64 of shape \[1, 4, 24\]"),
        ([0.0], "list"),
    ]
    for tokens, message in wrong:
        with pytest.raises(
            ValueError,
            match=rf"^tokens must be a floating .* of shape \[B, N, 24\], got {message}$",
        ):
            SigLipVisionModel(SMALL).pool(tokens)  # type: ignore[arg-type]
    headless = SigLipVisionModel(replace(SMALL, pooling_head=False))
    no_head = r"^this model has no pooling head; .*tokens.mean\(dim=1\)$"
    with pytest.raises(ValueError, match=no_head):
        headless.pool(torch.zeros(1, 4, 24))
    with pytest.raises(ValueError, match=no_head):
        headless.embed(pixels(SMALL).float())


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (255.0, r"values from -?\d.* to \d"),
        (-20.0, r"values from -\d.* to "),
        (torch.nan, "NaN or Inf"),
        (torch.inf, "NaN or Inf"),
    ],
)
@torch.no_grad()
def test_pixels_out_of_range(factor: float, message: str) -> None:
    """Pixels that were not normalized are refused in every method, and noise is not."""
    model = SigLipVisionModel(SMALL).eval()
    noise = pixels(SMALL, batch=64).float()
    assert noise.abs().max() > 4
    assert model(noise).isfinite().all()
    wrong = noise[:2] * factor
    calls: list[Callable[[Tensor], object]] = [
        model,
        model.embed,
        lambda x: model.hidden_states(x, [0]),
        lambda x: model.attention_maps(x, [0]),
        lambda x: model(**pack(list(x), SMALL.patch_size)),
    ]
    expected = rf"^pixel_values must be normalized to about \[-1, 1\], got {message}.*; pass images"
    for call in calls:
        call(noise[:2])
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            with pytest.raises(ValueError, match=expected):
                call(wrong.to(dtype))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # attention under vmap
def test_pixels_whose_range_is_not_checked() -> None:
    """Optimized pixels, transforms of `torch.func`, compilers and other devices."""
    model = SigLipVisionModel(SMALL).eval()
    wrong = pixels(SMALL).float() * 255
    with pytest.raises(ValueError, match="pixel_values must be normalized"):
        model(wrong)
    model(wrong.clone().requires_grad_())
    with torch.no_grad():
        torch.func.vmap(lambda image: model(image[None]))(wrong)
    torch.compile(model, backend="eager", fullgraph=True)(wrong)
    torch.export.export(model, (wrong,))
    copy.deepcopy(model).to("meta")(wrong.to("meta"))
    model(wrong[:0])
    model(pixels(SMALL).to(torch.float8_e4m3fn))


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("output_hidden_states", r"call hidden_states\(pixel_values, layers\)"),
        ("output_attentions", r"call attention_maps\(pixel_values, layers\)"),
        ("return_dict", "it returns the tokens .*; embed returns pooler_output"),
        ("interpolate_pos_encoding", r'load the model with from_hf\(..., interpolation="hf"\)'),
        ("labels", "omit it"),
    ],
)
def test_arguments_of_transformers(name: str, advice: str) -> None:
    arguments: dict[str, Any] = {name: True}
    message = rf"^model\(...\) has no argument {name}; {advice}$"
    with pytest.raises(TypeError, match=message):
        SigLipVisionModel(SMALL)(pixels(SMALL).float(), **arguments)


def test_names_of_transformers(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = checkpoint()
    model = SigLipVisionModel.from_pretrained(folder)
    assert type(model) is SigLipVisionModel
    assert type(OptimizedModel.from_pretrained(folder)) is OptimizedModel
    reference = ReferenceModel.from_pretrained(folder)
    assert model.device == reference.device
    assert model.dtype == reference.dtype
    weight = reference.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, weight)
    model.save_pretrained(tmp_path / "saved")
    state = SigLipVisionModel.from_hf(tmp_path / "saved").state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_token_dtype() -> None:
    model = SigLipVisionModel(SMALL).eval()
    tokens = torch.randn(2, 4, 24, dtype=torch.float64)
    assert torch.equal(model.pool(tokens), model.pool(tokens.float()))


def test_invalid_config() -> None:
    for config in ({"image_size": 224}, "google/siglip-base-patch16-224"):
        with pytest.raises(
            ValueError,
            match=r"^config must be a SigLipVisionConfig, got \w+; to load .* use .*from_hf$",
        ):
            SigLipVisionModel(config)  # type: ignore[arg-type]


def test_standalone_modules() -> None:
    tokens = torch.randn(2, 4, 24)
    x = torch.randn(2, 3, 16, 16)
    for module in (MLP, MultiheadAttention, EncoderBlock, SigLipEncoder):
        assert module(SMALL)(tokens).shape == (2, 4, 24)
    assert MultiheadAttention(SMALL)(tokens, query=torch.randn(2, 1, 24)).shape == (2, 1, 24)
    for whole in (VisionEmbeddings, SigLipVisionTransformer, SigLipVisionModel):
        assert whole(SMALL)(x).shape == (2, 4, 24)
    assert PoolingHead(SMALL)(tokens).shape == (2, 24)


def test_output_shape() -> None:
    assert SigLipVisionModel(SigLipVisionConfig(num_encoder_blocks=4))(
        torch.randn(2, 3, 224, 224)
    ).shape == (
        2,
        196,
        768,
    )


def test_initialization() -> None:
    """Every tensor has the reference's mean, standard deviation, range and constants.

    At width 384, the standard deviation varies by about 1 % by chance.
    """
    torch.manual_seed(0)
    config = SigLipVisionConfig(
        embed_dim=384, num_attention_heads=6, num_encoder_blocks=1, pooling_head=True
    )
    rules = layouts.HUGGINGFACE_ENCODER + layouts.HUGGINGFACE_HEAD
    port_tensors = layouts.HUGGINGFACE.to_stored(
        SigLipVisionModel(config).state_dict(), 1, config.num_attention_heads, rules
    )
    reference_tensors = ReferenceModel(references.hf_config(config)).state_dict()
    for name, tensor in reference_tensors.items():
        if tensor.std() == 0:  # zeros and ones
            assert torch.equal(port_tensors[name], tensor), name
            continue
        port_tensor = port_tensors[name]
        chance = tensor.numel() ** -0.5
        assert abs(port_tensor.mean()) <= 5 * tensor.std() * chance, name
        assert abs(port_tensor.std() / tensor.std() - 1) <= 6 * chance, name
        # sqrt(3) for a uniform distribution, more for a normal one
        assert (port_tensor.abs().max() / port_tensor.std() < 2) == (
            tensor.abs().max() / tensor.std() < 2
        ), name


def test_initialization_of_components() -> None:
    torch.manual_seed(0)
    block = EncoderBlock(SMALL)
    assert block.self_attn.q_proj.bias.abs().max() == 0
    assert 0 < block.mlp.fc1.bias.abs().max() < 1e-5


@torch.no_grad()
def test_copies_and_pickles(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    model = SigLipVisionModel.from_hf(checkpoint())
    x = pixels(SMALL).float()
    torch.save(model.state_dict(), tmp_path / "state.pt")
    fresh = SigLipVisionModel(model.config).eval()
    fresh.load_state_dict(torch.load(tmp_path / "state.pt"))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh):
        assert torch.equal(other.embed(x), model.embed(x))


def test_print() -> None:
    assert str(SigLipVisionModel(SigLipVisionConfig())) == TREE


def test_pooling_head_modules() -> None:
    model = SigLipVisionModel(replace(SMALL, pooling_head=True))
    assert [name for name, _ in model.named_children()] == ["transformer", "pooling_head"]
    assert not [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]


TREE = """\
SigLipVisionModel(
  (transformer): SigLipVisionTransformer(
    (embeddings): VisionEmbeddings(
      (patch_embedding): Conv2d(3, 768, kernel_size=(16, 16), stride=(16, 16), padding=valid)
      (position_embedding): Embedding(196, 768)
    )
    (encoder): SigLipEncoder(
      (encoder_blocks): ModuleList(
        (0-11): 12 x EncoderBlock(
          (layer_norm1): LayerNorm((768,), eps=1e-06, elementwise_affine=True)
          (self_attn): MultiheadAttention(
            (k_proj): Linear(in_features=768, out_features=768, bias=True)
            (v_proj): Linear(in_features=768, out_features=768, bias=True)
            (q_proj): Linear(in_features=768, out_features=768, bias=True)
            (out_proj): Linear(in_features=768, out_features=768, bias=True)
          )
          (layer_norm2): LayerNorm((768,), eps=1e-06, elementwise_affine=True)
          (mlp): MLP(
            (fc1): Linear(in_features=768, out_features=3072, bias=True)
            (fc2): Linear(in_features=3072, out_features=768, bias=True)
          )
        )
      )
    )
    (post_layernorm): LayerNorm((768,), eps=1e-06, elementwise_affine=True)
  )
)"""
