"""Packed patches (NaFlex), interpolated position embeddings, and NaViT's positions."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any, cast

import pytest
import timm
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import Siglip2VisionModel, SiglipVisionModel
from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

from siglip_port import SigLipVisionConfig, SigLipVisionModel, pack, patchify
from siglip_port.config import INTERPOLATIONS
from siglip_port.parity.metrics import relative_error
from siglip_port.parity.siglip.reference import hf_config
from siglip_port.parity.stress_weights import randomize
from siglip_port.patches import interpolate_positions
from tests.helpers.checkpoints import ODD, MakeCheckpoint, pixels

NAFLEX = replace(ODD, naflex=True, image_size=42, num_encoder_blocks=3)
FIXED = replace(ODD, image_size=42, num_encoder_blocks=3)
SHAPES = [
    (4, 9),
    (6, 6),
    (1, 36),
    (11, 2),
    (3, 3),
]  # in patches; the model's own grid is 6 x 6


def images(*shapes: tuple[int, int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 7 * h, 7 * w, generator=generator, dtype=dtype) for h, w in shapes]


@pytest.fixture
def pair(checkpoint: MakeCheckpoint) -> tuple[SigLipVisionModel, Any]:
    """NaFlex port and reference with the same weights, in float64."""
    folder = checkpoint(NAFLEX)
    reference = Siglip2VisionModel.from_pretrained(folder, dtype=torch.float64).eval()
    return SigLipVisionModel.from_hf(folder, dtype=torch.float64), reference


# --- NaFlex ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str
)
@torch.no_grad()
def test_packed_patches(
    pair: tuple[SigLipVisionModel, Any], dtype: torch.dtype, tolerance: float
) -> None:
    port, reference = (model.to(dtype) for model in pair)
    inputs = pack(images(*SHAPES, dtype=dtype), 7, num_patches=40)
    expected = reference(**inputs)
    tokens = port(**inputs)
    assert tokens.shape == (5, 40, 72)
    for i, (h, w) in enumerate(SHAPES):
        assert (
            relative_error(tokens[i, : h * w], expected.last_hidden_state[i, : h * w]) <= tolerance
        )
    assert (
        relative_error(port.pool(tokens, inputs["pixel_attention_mask"]), expected.pooler_output)
        <= tolerance
    )
    assert relative_error(port.embed(**inputs), expected.pooler_output) <= tolerance
    assert relative_error(port.embed(**inputs, normalize=True).norm(dim=-1), torch.ones(5)) <= 1e-6


@torch.no_grad()
def test_padding_invariance(pair: tuple[SigLipVisionModel, Any]) -> None:
    port, _ = pair
    batch = images(*SHAPES)
    packed = pack(batch, 7, num_patches=53)
    tokens = port(**packed)
    vectors = port.embed(**packed)
    for i, ((h, w), image) in enumerate(zip(SHAPES, batch, strict=True)):
        single = pack([image], 7)
        assert relative_error(tokens[i, : h * w], port(**single)[0]) <= 1e-12
        assert relative_error(vectors[i], port.embed(**single)[0]) <= 1e-12
        assert relative_error(vectors[i], port.embed(image[None])[0]) <= 1e-12  # unpacked
    # Without the mask, tokens attend to padding.
    full_mask = torch.ones_like(packed["pixel_attention_mask"])
    wrong = port(packed["pixel_values"], full_mask, packed["spatial_shapes"])
    assert relative_error(wrong[0, :36], tokens[0, :36]) > 1e-3


@torch.no_grad()
def test_missing_mask(
    pair: tuple[SigLipVisionModel, Any],
) -> None:
    port, _ = pair
    inputs = pack(images(*SHAPES), 7, num_patches=40)
    expected = port(**inputs)
    patches = inputs["pixel_values"]
    assert torch.equal(port(patches, spatial_shapes=inputs["spatial_shapes"]), expected)
    assert torch.equal(port(patches, spatial_shapes=SHAPES), expected)
    assert torch.equal(port(patches, spatial_shapes=inputs["spatial_shapes"].numpy()), expected)
    assert torch.equal(port(patches, inputs["pixel_attention_mask"].bool(), SHAPES), expected)
    assert torch.equal(port.embed(patches, spatial_shapes=SHAPES), port.embed(**inputs))


@torch.no_grad()
def test_naflex_equals_fixed() -> None:
    naflex = SigLipVisionModel(NAFLEX).double().eval()
    fixed = SigLipVisionModel(FIXED).double().eval()
    randomize(fixed)
    naflex.load_state_dict(fixed.state_dict())
    x = pixels(FIXED)
    for out in (naflex(x), naflex(**pack(list(x), 7)), fixed(**pack(list(x), 7))):
        assert relative_error(out, fixed(x)) <= 1e-12


def test_patchify() -> None:
    for image in images(*SHAPES):
        assert torch.equal(patchify(image, 7), convert_image_to_patches(image, 7))
    x = torch.stack(images((2, 3), (2, 3)))
    assert torch.equal(patchify(x, 7), torch.stack([patchify(p, 7) for p in x]))
    assert torch.equal(
        patchify(torch.nn.functional.pad(x, (0, 3, 0, 6)), 7), patchify(x, 7)
    )  # no whole patch more


def test_pack() -> None:
    packed = pack(images((2, 3), (1, 2)), 7, num_patches=9)
    assert {name: tuple(t.shape) for name, t in cast(dict[str, Tensor], packed).items()} == {
        "pixel_values": (2, 9, 147),
        "pixel_attention_mask": (2, 9),
        "spatial_shapes": (2, 2),
    }
    assert packed["spatial_shapes"].tolist() == [[2, 3], [1, 2]]
    assert packed["pixel_attention_mask"].tolist() == [[1] * 6 + [0] * 3, [1] * 2 + [0] * 7]
    assert not packed["pixel_values"][1, 2:].any()


def test_invalid_images_to_pack() -> None:
    with pytest.raises(
        ValueError, match=r"images must be one or more tensors of shape \[C, H, W\], got \[\]"
    ):
        pack([], 7)
    with pytest.raises(
        ValueError,
        match=r"images must be at least 7 x 7 pixels \(one patch\), got shape \[3, 6, 20\]",
    ):
        pack([torch.ones(3, 6, 20)], 7)
    with pytest.raises(ValueError, match=r"got \['list'\]"):
        pack([[1]], 7)  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"patch_size must be a positive integer, got 0"):
        pack(images((2, 3)), 0)
    with pytest.raises(
        ValueError, match=r"the same dtype, got 3 channels and torch.float32, torch.float64"
    ):
        pack([torch.ones(3, 9, 9), torch.ones(3, 9, 9).double()], 7)
    with pytest.raises(
        ValueError, match=r"an image has 6 patches, more than num_patches=5; resize it"
    ):
        pack(images((2, 3)), 7, num_patches=5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"spatial_shapes": None},
            r"got torch.float32 of shape \[2, 6, 147\]; packed patches require spatial_s",
        ),
        (
            {"spatial_shapes": None, "pixel_values": torch.ones(2, 3, 14, 21)},
            r"pixel_attention_mask requires spatial_shapes; pass both or neither",
        ),
        (
            {"pixel_values": torch.ones(2, 6, 146)},
            r"pixel_values must be .* \[B, N, 147\], got .*\[2, 6, 146\]",
        ),
        ({"pixel_values": torch.ones(2, 6, 147).int()}, r"got torch.int32"),
        ({"pixel_values": [1]}, r"\[B, N, 147\], got list"),
        (
            {"spatial_shapes": [(2, 3)]},
            r"spatial_shapes must be 2 pairs .* 1 <= height \* width <= 6, got \[\(2, 3\)\]",
        ),
        ({"spatial_shapes": [(2, 3), (2, 4)]}, r"got \[\(2, 3\), \(2, 4\)\]"),
        ({"spatial_shapes": [(2, 3), (0, 4)]}, r"spatial_shapes must be 2 pairs"),
        ({"spatial_shapes": [(2, 3), (1, 2.0)]}, r"spatial_shapes must be 2 pairs"),
        (
            {"spatial_shapes": torch.tensor([[2.4, 3.0], [1.0, 2.0]])},
            r"spatial_shapes must be 2 pairs",
        ),
        ({"spatial_shapes": [3, 4]}, r"spatial_shapes must be 2 pairs .*got \[3, 4\]"),
        ({"spatial_shapes": torch.tensor(3)}, r"spatial_shapes must be 2 pairs"),
        ({"spatial_shapes": 3}, r"spatial_shapes must be 2 pairs"),
        (
            {"pixel_attention_mask": [[1] * 6] * 2},
            r"pixel_attention_mask must be a tensor, got list",
        ),
        (
            {"pixel_attention_mask": torch.ones(2, 5)},
            r"pixel_attention_mask must have shape \[2, 6\] .* \[2, 5\]",
        ),
    ],
)
def test_invalid_packed_patches(change: dict[str, Any], message: str) -> None:
    inputs: dict[str, Any] = {**pack(images((2, 3), (1, 2), dtype=torch.float32), 7), **change}
    with pytest.raises(ValueError, match=message):
        SigLipVisionModel(NAFLEX).eval()(**inputs)


# --- interpolated position embeddings -------------------------------------------------------------


def with_rule(rule: str | None, config: SigLipVisionConfig = FIXED) -> SigLipVisionModel:
    model = SigLipVisionModel(replace(config, interpolation=rule)).double().eval()
    randomize(model)
    return model


@pytest.mark.parametrize("size", [(56, 84), (21, 70), (49, 49), (63, 28), (60, 50)])
@torch.no_grad()
def test_interpolation_hf(size: tuple[int, int], checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint(FIXED)
    reference = SiglipVisionModel.from_pretrained(folder).eval()
    port = SigLipVisionModel.from_hf(folder, interpolation="hf")
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        x = torch.randn(2, 3, *size, dtype=dtype)
        expected = reference.to(dtype)(x, interpolate_pos_encoding=True)
        assert relative_error(port.to(dtype)(x), expected.last_hidden_state) <= tolerance
        assert relative_error(port.embed(x), expected.pooler_output) <= tolerance


@pytest.mark.parametrize("size", [(8, 12), (3, 10), (7, 7), (2, 2)])
def test_interpolation_timm(size: tuple[int, int]) -> None:
    table = torch.randn(36, 24)
    expected = timm.layers.pos_embed.resample_abs_pos_embed(
        table[None], list(size), num_prefix_tokens=0
    )[0]
    assert relative_error(interpolate_positions(table, size, "timm"), expected) <= 1e-6


@pytest.mark.parametrize("size", [(8, 12), (3, 10), (7, 7), (2, 9)])
def test_interpolation_big_vision(size: tuple[int, int]) -> None:
    """big_vision's `resample_posemb` is `scipy.ndimage.zoom(grid, (H/h, W/w, 1), order=1)`."""
    from scipy.ndimage import zoom

    table = torch.randn(36, 24, dtype=torch.float64)
    expected = zoom(table.view(6, 6, 24).numpy(), (size[0] / 6, size[1] / 6, 1), order=1)
    assert (
        relative_error(
            interpolate_positions(table, size, "big_vision"),
            torch.from_numpy(expected).flatten(0, 1),
        )
        <= 1e-10
    )


@pytest.mark.parametrize("size", [(8, 12), (3, 10), (7, 7), (2, 2)])
def test_interpolation_naflex(size: tuple[int, int]) -> None:
    embeddings = Siglip2VisionModel(hf_config(NAFLEX)).embeddings
    table = torch.randn(36, 72)
    expected = embeddings.resize_positional_embeddings(
        table.view(6, 6, 72), torch.tensor([size]), size[0] * size[1]
    )
    assert torch.equal(interpolate_positions(table, size, "naflex"), expected[0])


def bicubic_weights(length: int, count: int, scale: float) -> Tensor:
    """Sampling weights [count, length] of a cubic kernel (a = -0.75), borders repeated."""
    weights = torch.zeros(count, length, dtype=torch.float64)
    for i in range(count):
        center = (i + 0.5) / scale - 0.5
        first = math.floor(center) - 1
        for j in range(first, first + 4):
            distance = abs(center - j)
            if distance <= 1:
                weight = 1.25 * distance**3 - 2.25 * distance**2 + 1
            else:
                weight = -0.75 * (distance**3 - 5 * distance**2 + 8 * distance - 4)
            weights[i, min(max(j, 0), length - 1)] += weight
    return weights


@pytest.mark.parametrize("size", [(8, 12), (3, 10), (7, 7), (2, 2)])
def test_interpolation_vila(size: tuple[int, int]) -> None:
    """VILA's `interpolate_pos_encoding`: sampling points are scaled by (H + 0.1) / h."""
    table = torch.randn(36, 24, dtype=torch.float64)
    rows = bicubic_weights(6, size[0], (size[0] + 0.1) / 6)
    columns = bicubic_weights(6, size[1], (size[1] + 0.1) / 6)
    expected = torch.einsum("ia,jb,abd->ijd", rows, columns, table.view(6, 6, 24)).flatten(0, 1)
    positions = interpolate_positions(table, size, "vila")
    assert relative_error(positions, expected) <= 1e-10
    assert relative_error(interpolate_positions(table, size, "hf"), expected) > 1e-3
    in_float32 = interpolate_positions(table.float(), size, "vila")
    assert relative_error(in_float32, expected) <= 1e-5


@pytest.mark.parametrize("size", [(6, 1), (3, 5), (2, 6)])
def test_interpolation_crop(size: tuple[int, int]) -> None:
    """BAGEL's position of a patch is row * side + column."""
    table = torch.randn(36, 24)
    ids = [6 * row + column for row in range(size[0]) for column in range(size[1])]
    assert torch.equal(interpolate_positions(table, size, "crop"), table[ids])


@pytest.mark.parametrize("size", [(7, 2), (2, 7), (9, 9)])
def test_crop_of_larger_images_refused(size: tuple[int, int]) -> None:
    message = rf"at most 6 x 6 patches, got {size[0]} x {size[1]}; pass smaller images, or another"
    with pytest.raises(ValueError, match=message):
        interpolate_positions(torch.randn(36, 2), size, "crop")


@given(side=st.integers(1, 9), rule=st.sampled_from(INTERPOLATIONS))
def test_interpolation_to_own_grid(side: int, rule: str) -> None:
    table = torch.randn(side**2, 3)
    assert interpolate_positions(table, (side, side), rule) is table


@given(height=st.integers(1, 12), width=st.integers(1, 12), rule=st.sampled_from(INTERPOLATIONS))
def test_interpolation_shapes(height: int, width: int, rule: str) -> None:
    if rule == "crop":
        height, width = min(height, 6), min(width, 6)
    ramp = torch.arange(6.0).repeat_interleave(6)[:, None].expand(-1, 2)  # increases by row
    fitted = interpolate_positions(ramp, (height, width), rule).view(height, width, 2)
    assert fitted.isfinite().all()
    assert torch.allclose(fitted, fitted[:, :1].expand(-1, width, -1), atol=1e-4)
    assert (fitted.diff(dim=0) >= -1e-4).all()


def test_interpolation_rules_differ() -> None:
    table = torch.randn(36, 8)
    rules = [rule for rule in INTERPOLATIONS if rule not in ("crop", "minicpm")]
    fitted = [interpolate_positions(table, (9, 4), rule) for rule in rules]
    assert all(relative_error(a, b) > 1e-3 for i, a in enumerate(fitted) for b in fitted[:i])


@pytest.mark.parametrize("size", [(28, 63), (63, 28), (49, 42), (42, 49), (35, 35)])
def test_other_sizes_refused(size: tuple[int, int]) -> None:
    """Even 28 x 63 pixels, which have as many patches (36) as 42 x 42."""
    with pytest.raises(
        ValueError,
        match=r'\[B, 3, 42, 42\], got .*; .*, or load .* from_hf\(\.\.\., interpolation="hf"\)$',
    ):
        with_rule(None)(torch.ones(1, 3, *size, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"must all be \(6, 6\) for this model, got \[\(4, 9\)\]"):
        with_rule(None)(**pack(images((4, 9)), 7))
    with pytest.raises(
        ValueError, match=r"\[B, 3, H, W\] with H and W at least 7, got .*\[1, 3, 42, 6\]"
    ):
        with_rule("hf")(torch.ones(1, 3, 42, 6, dtype=torch.float64))
    with pytest.raises(
        ValueError,
        match=r"\[3, 42, 42\]; add a batch dimension: pixel_values\[None\]",
    ):
        with_rule("hf")(torch.ones(3, 42, 42, dtype=torch.float64))
    with pytest.raises(
        ValueError, match=r"interpolation must be None or one of hf, timm, .*, got 'bicubic'"
    ):
        SigLipVisionModel.from_hf("anything", interpolation="bicubic")


# --- NaViT ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["idefics2", "idefics3", "smolvlm"])
@torch.no_grad()
def test_navit(kind: str) -> None:
    """Packed patches equal the padded images with a mask of transformers 5.23."""
    vision = {
        "hidden_size": 72,
        "intermediate_size": 101,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    name = {"idefics2": "Idefics2", "idefics3": "Idefics3", "smolvlm": "SmolVLM"}[kind]
    module = getattr(transformers.models, kind)
    model_class = vars(getattr(module, f"configuration_{kind}"))[f"{name}VisionConfig"]
    config = model_class(**vision, image_size=42, patch_size=7)
    reference = (
        vars(getattr(module, f"modeling_{kind}"))[f"{name}VisionTransformer"](config)
        .double()
        .eval()
    )
    randomize(reference)
    port = (
        SigLipVisionModel(replace(FIXED, pooling_head=False, interpolation="navit")).double().eval()
    )
    from siglip_port.checkpoint.layouts import HUGGINGFACE

    stored = reference.state_dict()
    mappings = HUGGINGFACE.mappings(3, HUGGINGFACE.encoder)
    port.load_state_dict({mapping.port[0]: stored[name] for name, mapping in mappings.items()})

    x = pixels(FIXED)
    assert (
        relative_error(port(x), reference(x).last_hidden_state) <= 1e-10
    )  # their own grid: the plain encoder
    shapes = [(3, 5), (6, 4), (2, 2)]
    padded = torch.zeros(3, 3, 42, 35, dtype=torch.float64)
    mask = torch.zeros(3, 6, 5, dtype=torch.bool)
    batch = images(*shapes)
    for i, (image, (h, w)) in enumerate(zip(batch, shapes, strict=True)):
        padded[i, :, : 7 * h, : 7 * w] = image
        mask[i, :h, :w] = True
    expected = reference(padded, patch_attention_mask=mask).last_hidden_state.view(3, 6, 5, 72)
    tokens = port(**pack(batch, 7))
    for i, (h, w) in enumerate(shapes):
        assert relative_error(tokens[i, : h * w], expected[i, :h, :w].flatten(0, 1)) <= 1e-10
        assert relative_error(port(batch[i][None])[0], tokens[i, : h * w]) <= 1e-10


@pytest.mark.parametrize("size", [(13, 40), (27, 7), (70, 19), (20, 21)])
@torch.no_grad()
def test_navit_large_images(size: tuple[int, int]) -> None:
    """The reference's embeddings of zero images without a bias are the positions."""
    module = transformers.models.idefics2
    config = module.configuration_idefics2.Idefics2VisionConfig(
        hidden_size=8, image_size=40, patch_size=2
    )
    embeddings = module.modeling_idefics2.Idefics2VisionEmbeddings(config)
    embeddings.patch_embedding.bias.zero_()
    mask = torch.ones(1, *size, dtype=torch.bool)
    expected = embeddings(torch.zeros(1, 3, 2 * size[0], 2 * size[1]), mask)[0]
    assert torch.equal(
        interpolate_positions(embeddings.position_embedding.weight, size, "navit"), expected
    )


def minicpm_ids(count: int, side: int) -> Tensor:
    """MiniCPM-V's `SiglipVisionEmbeddings`, one axis; counts are int32 tensors there."""
    boundaries = torch.arange(1 / side, 1.0, 1 / side)
    coordinates = torch.arange(0, 1 - 1e-6, (1 / torch.tensor(count, dtype=torch.int32)).item())
    return torch.bucketize(coordinates, boundaries, right=True)


def test_interpolation_minicpm() -> None:
    """All grids up to 70 x 70 of the published models, whose side is 70."""
    table = torch.arange(4900.0)[:, None]
    ids = {count: minicpm_ids(count, 70) for count in range(1, 71)}
    for height, width in itertools.product(range(1, 71), range(1, 71)):
        expected = (ids[height][:, None] * 70 + ids[width]).flatten()
        positions = interpolate_positions(table, (height, width), "minicpm")
        assert torch.equal(positions[:, 0], expected.float())


@pytest.mark.parametrize(
    ("side", "differing"),
    [
        (70, [49, 58, 77, 86, 98, 100, 110, 122, 135]),
        (32, [58, 86, 100, 110, 116, 122]),
        (27, [69, 75, 93, 108, 114, 135, 138]),
    ],
)
def test_minicpm_differs_from_navit(side: int, differing: list[int]) -> None:
    table = torch.arange(float(side**2))[:, None]
    counts = []
    for count in range(1, 141):
        rows = interpolate_positions(table, (count, 1), "minicpm")
        assert torch.equal(rows[:, 0], minicpm_ids(count, side).float() * side)
        if not torch.equal(rows, interpolate_positions(table, (count, 1), "navit")):
            counts.append(count)
    assert counts == differing
