"""Preprocessing equals transformers' image processors bit for bit."""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps
from transformers import Siglip2ImageProcessor, SiglipImageProcessor, SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import (
    Siglip2ImageProcessorPil,
    get_image_size_for_max_num_patches,
)

from siglip_port import SigLipVisionConfig, image_processing
from siglip_port.checkpoint import default_preprocessor_config
from siglip_port.extras import MissingExtraError
from siglip_port.image_processing import (
    Backend,
    ImageError,
    ImageInput,
    ImageProcessor,
    naflex_size,
    to_rgb,
)
from siglip_port.image_reading import MAX_FILE_BYTES
from siglip_port.parity.metrics import bits
from siglip_port.parity.siglip.verify_options import SAMPLE_IMAGE
from tests.helpers.checkpoints import SMALL
from tests.helpers.models import random_model

FIXED = {
    "image_processor_type": "SiglipImageProcessor",
    "size": {"height": 48, "width": 32},
    "resample": 3,
}
NAFLEX = {
    "image_processor_type": "Siglip2ImageProcessor",
    "patch_size": 16,
    "max_num_patches": 20,
    "resample": 2,
}


def noisy_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return the sample image with noise: edges, flat regions, and all values from 0 to 255."""
    with Image.open(SAMPLE_IMAGE) as image:
        resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(resized).astype(int)
    noise = np.random.default_rng(seed).integers(-40, 40, pixels.shape)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def with_alpha(image: Image.Image, mode: str) -> Image.Image:
    alpha = np.random.default_rng(1).integers(0, 256, image.size[::-1]).astype(np.uint8)
    image.putalpha(Image.fromarray(alpha))
    return image.convert(mode)


def transparent_palette() -> Image.Image:
    image = noisy_image(60, 50).quantize(16)
    image.info["transparency"] = 3
    return image


def sixteen_bits() -> Image.Image:
    return Image.fromarray(np.arange(60 * 50, dtype=np.uint16).reshape(50, 60) * 20)


MODES: dict[str, Callable[[], Image.Image]] = {
    "RGB": lambda: noisy_image(97, 61),
    "tall": lambda: noisy_image(31, 200),
    "1 pixel": lambda: noisy_image(1, 1),
    "1 pixel wide": lambda: noisy_image(1, 90),
    "3 pixels high": lambda: noisy_image(70, 3),
    "target size": lambda: noisy_image(32, 48),
    "much larger": lambda: noisy_image(1500, 900),
    "smaller": lambda: noisy_image(9, 7),
    "L": lambda: noisy_image(60, 50).convert("L"),
    "1": lambda: noisy_image(60, 50).convert("1"),
    "LA": lambda: with_alpha(noisy_image(60, 50), "LA"),
    "RGBA": lambda: with_alpha(noisy_image(60, 50), "RGBA"),
    "P": lambda: noisy_image(60, 50).quantize(16),
    "P, transparent": transparent_palette,
    "CMYK": lambda: noisy_image(60, 50).convert("CMYK"),
    "YCbCr": lambda: noisy_image(60, 50).convert("YCbCr"),
    "HSV": lambda: noisy_image(60, 50).convert("HSV"),
    "LAB": lambda: Image.fromarray(np.asarray(noisy_image(60, 50)), "LAB"),
    "I;16": sixteen_bits,
    "I": lambda: sixteen_bits().convert("I"),
    "F": lambda: noisy_image(60, 50).convert("F"),
}


def assert_same_bits(port: Mapping[str, Any], reference: Mapping[str, Any]) -> None:
    """Assert equal keys and bits; integer dtypes may differ."""
    assert port.keys() == dict(reference).keys()
    for name, output in port.items():
        expected = reference[name]
        assert output.shape == expected.shape
        if output.is_floating_point():
            assert output.dtype == expected.dtype
            assert torch.equal(bits(output), bits(expected))
        else:
            assert torch.equal(output, expected.to(output.dtype))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("resample", [0, 1, 2, 3])
def test_fixed_size_equals_reference(mode: str, resample: int) -> None:
    image = MODES[mode]()
    config = {**FIXED, "resample": resample}
    expected = SiglipImageProcessorPil(**config)(images=image, return_tensors="pt")
    assert_same_bits(ImageProcessor.from_config(config)(image), expected)


@pytest.mark.parametrize("mode", MODES)
def test_naflex_equals_reference(mode: str) -> None:
    image = MODES[mode]()
    reference = Siglip2ImageProcessorPil(**NAFLEX, do_convert_rgb=True)
    expected = reference(images=image, return_tensors="pt")
    assert_same_bits(ImageProcessor.from_config(NAFLEX)(image), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("resample", [0, 1, 2, 3])
def test_torchvision_equals_reference(mode: str, resample: int) -> None:
    image = MODES[mode]()
    fixed = {**FIXED, "resample": resample}
    expected = SiglipImageProcessor(**fixed)(images=image, return_tensors="pt")
    assert_same_bits(ImageProcessor.from_config(fixed, "torchvision")(image), expected)
    naflex = {**NAFLEX, "resample": resample}
    reference = Siglip2ImageProcessor(**naflex, do_convert_rgb=True)
    expected = reference(images=image, return_tensors="pt")
    assert_same_bits(ImageProcessor.from_config(naflex, "torchvision")(image), expected)


OPTIONS: list[dict[str, Any]] = [
    {"image_mean": [0.1, 0.5, 0.9], "image_std": [0.3, 1.0, 0.25]},
    {"image_mean": 0.4, "image_std": 0.2},
    {"do_normalize": False},
    {"do_rescale": False},
    {"rescale_factor": 1 / 127.5, "do_normalize": False},
    {"do_resize": False},
    {"do_normalize": None},
    {"do_rescale": None},
    {"do_resize": None},
    {"size": [40, 24]},
]


@pytest.mark.parametrize("option", OPTIONS)
def test_configuration_options(option: dict[str, Any]) -> None:
    images = [noisy_image(64, 32), noisy_image(64, 32, seed=1)]
    references: list[tuple[Backend, dict[str, Any], Any]] = [
        ("pil", FIXED, SiglipImageProcessorPil),
        ("pil", NAFLEX, Siglip2ImageProcessorPil),
        ("torchvision", FIXED, SiglipImageProcessor),
        ("torchvision", NAFLEX, Siglip2ImageProcessor),
    ]
    for backend, base, reference in references:
        config = {**base, **option}
        expected = reference(**config)(images=images, return_tensors="pt")
        assert_same_bits(ImageProcessor.from_config(config, backend)(images), expected)


@pytest.mark.parametrize(
    "shape", [(50, 60, 3), (3, 50, 60), (1, 50, 60), (50, 60, 4), (4, 50, 60), (3, 9, 3)]
)
def test_arrays_and_tensors(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    references: list[tuple[Backend, Any]] = [
        ("pil", SiglipImageProcessorPil),
        ("torchvision", SiglipImageProcessor),
    ]
    for backend, reference in references:
        expected = reference(**FIXED)(images=array, return_tensors="pt")
        processor = ImageProcessor.from_config(FIXED, backend)
        assert_same_bits(processor(array), expected)
        assert_same_bits(processor(torch.from_numpy(array)), expected)
        twice = {"pixel_values": expected["pixel_values"].repeat(2, 1, 1, 1)}
        assert_same_bits(processor([array, array]), twice)


def test_transparent_array_rounding_of_each_backend() -> None:
    array = np.full((5, 5, 4), (8, 8, 8, 250), np.uint8)
    assert (to_rgb(array) == 13).all()
    assert (to_rgb(array, "torchvision") == 12).all()


def test_array_without_channels_is_gray() -> None:
    """transformers rejects such arrays."""
    array = np.arange(3000, dtype=np.uint16).reshape(50, 60).astype(np.uint8)
    processor = ImageProcessor.from_config(FIXED)
    assert_same_bits(processor(array), processor(Image.fromarray(array)))


@given(
    st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([4, 14, 16]), st.integers(1, 1024)
)
def test_naflex_size(height: int, width: int, patch: int, max_patches: int) -> None:
    expected = get_image_size_for_max_num_patches(height, width, patch, max_patches)
    assert naflex_size(height, width, patch, max_patches) == expected


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int, tmp_path: Path) -> None:
    """Files are rotated, as in transformers; PIL images are not."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "rotated.jpg"
    path.write_bytes(encode(noisy_image(60, 40), "JPEG", exif=exif))
    processor = ImageProcessor.from_config(FIXED)
    reference = SiglipImageProcessorPil(**FIXED)
    expected = reference(images=ImageOps.exif_transpose(Image.open(path)), return_tensors="pt")
    fetched = reference(images=reference.fetch_images(str(path)), return_tensors="pt")
    assert_same_bits(processor(path), fetched)
    assert_same_bits(processor(path), expected)
    assert_same_bits(processor(str(path)), expected)
    assert_same_bits(processor(path.read_bytes()), expected)
    unrotated = reference(images=Image.open(path), return_tensors="pt")
    assert_same_bits(processor(Image.open(path)), unrotated)
    assert to_rgb(path).shape == ((3, 60, 40) if orientation > 4 else (3, 40, 60))


def test_transparency_becomes_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    (tmp_path / "a.png").write_bytes(encode(image))
    for source in (image, tmp_path / "a.png", np.asarray(image)):
        assert (to_rgb(source) == 255).all()


@pytest.mark.parametrize("kind", ["webp", "png", "gif"])
def test_first_frame_of_animation(kind: str, tmp_path: Path) -> None:
    frames = [noisy_image(20, 20).quantize(64), noisy_image(20, 20, seed=5).rotate(90).quantize(64)]
    if kind != "gif":
        frames = [frame.convert("RGB") for frame in frames]
    options = {"lossless": True} if kind == "webp" else {}
    file = tmp_path / f"a.{kind}"
    frames[0].save(file, None, save_all=True, append_images=frames[1:], **options)
    expected = np.moveaxis(np.asarray(frames[0].convert("RGB")), -1, 0)
    assert np.array_equal(to_rgb(file), expected)


def encode_16_bit_png(values: NDArray[np.uint16]) -> bytes:
    """Encode [H, W, C], C of 1 or 3; Pillow cannot write 16-bit color files."""
    height, width, channels = values.shape

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


def test_16_bit_file() -> None:
    """Pillow reads the upper 8 bits of color files, and clips gray values at 255."""
    values = np.random.default_rng(0).integers(0, 65536, (9, 7, 3)).astype(np.uint16)
    assert np.array_equal(to_rgb(encode_16_bit_png(values)), np.moveaxis(values >> 8, -1, 0))
    gray = to_rgb(encode_16_bit_png(values[..., :1]))
    assert np.array_equal(gray, np.repeat(np.minimum(values[..., 0], 255)[None], 3, axis=0))
    processor = ImageProcessor.from_config(FIXED)
    reference = SiglipImageProcessorPil(**FIXED)
    for content in (encode_16_bit_png(values), encode_16_bit_png(values[..., :1])):
        image = Image.open(io.BytesIO(content))
        assert_same_bits(processor(content), reference(images=image, return_tensors="pt"))


def test_unsupported_files(tmp_path: Path) -> None:
    """Too large, a pipe, a link to itself, or EPS."""
    with (tmp_path / "a.jpg").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)  # sparse: nothing is written
    os.mkfifo(tmp_path / "b.jpg")
    (tmp_path / "c.jpg").symlink_to(tmp_path / "c.jpg")
    (tmp_path / "d.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n"
    )
    messages = (
        ("a.jpg", "file size 4,294,967,297 bytes exceeds the limit"),
        ("b.jpg", "not a regular file"),
        ("c.jpg", "Too many levels"),
        ("d.jpg", "EPS is not supported"),
    )
    for name, message in messages:
        with pytest.raises(ImageError, match=message):
            to_rgb(tmp_path / name)


def bomb() -> bytes:
    """A PNG file whose header says 30,000 x 30,000 pixels."""
    small = encode(Image.new("L", (8, 8)))
    header = small[12:16] + struct.pack(">II", 30_000, 30_000) + small[24:29]
    return small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", "cannot be read: not an image format that Pillow supports"),
        (b"GIF89a nothing", "cannot be read"),
        (encode(noisy_image(60, 40), "JPEG")[:700], "cannot be read: .*truncated"),
        (encode(noisy_image(60, 40))[:900], "cannot be read: "),
        (bomb(), "cannot be read: Image size .* exceeds limit"),
        ("/nowhere/a.jpg", r"^/nowhere/a.jpg: the image cannot be read: .*No such file"),
        (Path(__file__).parent, "cannot be read: not a regular file but a folder; pass its files"),
        (
            "https://example.org/a.jpg",
            "^https://example.org/a.jpg: the image cannot be read: it is a URL; download it first",
        ),
        ("data:image/png;base64,iVBO", "cannot be read: it is a URL; .* pass its bytes"),
        ("/dev/zero", "cannot be read: not a regular file$"),
        ("a\0b", "cannot be read: embedded null"),
        (np.zeros((4, 4, 3)), "must be uint8, 0 to 255, got float64"),
        (torch.zeros(3, 4, 4), "must be uint8, 0 to 255, got torch.float32"),
        (
            torch.zeros(3, 4, 4, dtype=torch.bfloat16),
            "must be uint8, 0 to 255, got torch.bfloat16",
        ),
        (np.zeros((5, 5, 2), np.uint8), r"must be \[H, W\], .* got \[5, 5, 2\]"),
        (np.zeros((0, 4, 3), np.uint8), r"got \[0, 4, 3\]"),
        (np.zeros((2, 3, 4, 4), np.uint8), r"got \[2, 3, 4, 4\]"),
        (Image.new("RGB", (0, 5)), "has no pixels"),
        (7, "must be a path, bytes, a PIL image, an array or a tensor, got int"),
        (None, "must be a path"),
        ([], "images is empty; pass at least one image"),
        ([[]], "must be a path"),
    ],
)
def test_unusable_image(image: ImageInput, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        ImageProcessor.from_config(FIXED)(image)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": {"shortest_edge": 224}}, "size must be"),
        ({"size": 224}, "size must be"),
        ({"size": [1, 2, 3]}, "size must be"),
        ({"size": [10**6, 1]}, "size must be"),
        ({"do_normalize": "false"}, "do_normalize must be true or false, got 'false'"),
        (
            {"image_processor_type": "CLIPImageProcessor"},
            "must be that of a SigLIP or SigLIP 2 image processor, got CLIP",
        ),
        ({"image_mean": 10**400}, "image_mean must be three numbers"),
        ({"image_std": 1e-50}, "image_std must be three nonzero numbers"),
        ({"rescale_factor": 10**400}, "rescale_factor must be a nonzero number"),
        (
            {"image_processor_type": "Siglip2ImageProcessor", "max_num_patches": 10**10},
            "max_num_patches must be an integer",
        ),
        ({"size": {"height": 0, "width": 224}}, "size must be"),
        ({"resample": 5}, r"resample must be one of \[0, 1, 2, 3\]"),
        ({"resample": True}, "resample must be"),
        ({"image_mean": [0.5, 0.5]}, "image_mean must be three numbers"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std must be three nonzero numbers"),
        ({"image_std": float("nan")}, "image_std must be three numbers"),
        ({"rescale_factor": 0}, "rescale_factor must be a nonzero number"),
        ({"do_center_crop": True}, "do_center_crop and do_pad are not supported for SigLIP"),
        (
            {"image_processor_type": "Siglip2ImageProcessor", "patch_size": 0},
            "patch_size must be an integer",
        ),
        (
            {"image_processor_type": "Siglip2ImageProcessor", "max_num_patches": "9"},
            "max_num_patches must be an integer",
        ),
    ],
)
def test_unusable_configuration(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageProcessor.from_config({**FIXED, **change})


def test_unusable_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="backend must be 'pil' or 'torchvision', got 'tf'"):
        ImageProcessor.from_config(FIXED, "tf")  # type: ignore[arg-type]
    monkeypatch.setattr(image_processing, "version", lambda name: "0.26.1+cpu")
    with pytest.raises(ValueError, match=r"needs torchvision 0.27 or newer, got 0.26.1"):
        ImageProcessor.from_config({**FIXED, "resample": 1}, "torchvision")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'siglip-port\[torchvision\]'"):
        ImageProcessor.from_config(FIXED, "torchvision")


def test_images_of_different_sizes() -> None:
    processor = ImageProcessor.from_config({**FIXED, "do_resize": False})
    with pytest.raises(ImageError, match=r"must have the same size .*, got \[\(4, 5\), \(5, 5\)\]"):
        processor([noisy_image(5, 5), noisy_image(5, 4)])
    with pytest.raises(ImageError, match="more than num_patches=20"):
        ImageProcessor.from_config({**NAFLEX, "do_resize": False})(noisy_image(160, 160))


def test_fingerprint_depends_on_every_option() -> None:
    processor = ImageProcessor.from_config(FIXED)
    others = [
        replace(processor, size=(32, 48)),
        replace(processor, resample=2),
        replace(processor, do_resize=False),
        replace(processor, mean=(0.5, 0.5, 0.4)),
        replace(processor, std=None),
        replace(processor, rescale_factor=None),
        replace(processor, backend="torchvision"),
        ImageProcessor.from_config(NAFLEX),
        ImageProcessor.from_config({**NAFLEX, "max_num_patches": 21}),
        ImageProcessor.from_config({**NAFLEX, "patch_size": 14}),
    ]
    assert len({each.fingerprint for each in (processor, *others)}) == len(others) + 1


def test_fingerprint_is_stable() -> None:
    processor = ImageProcessor.from_config(FIXED)
    assert pickle.loads(pickle.dumps(processor)).fingerprint == processor.fingerprint
    in_other_order = ImageProcessor.from_config(dict(reversed(FIXED.items())))
    assert in_other_order.fingerprint == processor.fingerprint
    # siglip-base-patch16-224. Stored in existing output files, so it must not change.
    default = ImageProcessor.from_config(default_preprocessor_config(SigLipVisionConfig()))
    assert default.fingerprint == "dd941af9c5cf03d0"


def test_embed_images() -> None:
    config = replace(SMALL, pooling_head=True)
    model = random_model(config)
    images: list[ImageInput] = [
        noisy_image(30, 20),
        noisy_image(20, 30),
        SAMPLE_IMAGE,
        np.asarray(noisy_image(9, 9)),
    ]
    size = {"height": config.image_size, "width": config.image_size}
    options = {**model.preprocessor_config, "size": size, "do_convert_rgb": True}
    reference = SiglipImageProcessorPil(**options)
    expected = []
    for image in images:
        opened = Image.open(image) if isinstance(image, Path) else image
        pixels = reference(images=opened, return_tensors="pt")
        with torch.inference_mode():
            expected.append(model.embed(pixels["pixel_values"]))
    vectors = model.embed_images(images, batch_size=3)
    assert torch.allclose(vectors, torch.cat(expected), rtol=0, atol=1e-5)
    assert model.embed_images(images[0]).shape == (1, config.embed_dim)  # type: ignore[arg-type]
    assert torch.allclose(model.embed_images(images, normalize=True).norm(dim=-1), torch.ones(4))
    assert model.embed_images([]).shape == (0, config.embed_dim)


def test_embed_unusable_images() -> None:
    model = random_model(replace(SMALL, pooling_head=True))
    with pytest.raises(ImageError, match=r"^images\[1\]: the image cannot be read: "):
        model.embed_images([SAMPLE_IMAGE, b"no"])
    with pytest.raises(ValueError, match="batch_size must be"):
        model.embed_images([SAMPLE_IMAGE], batch_size=0)


def test_embed_images_naflex() -> None:
    config = replace(SMALL, pooling_head=True, naflex=True)
    assert default_preprocessor_config(config)["max_num_patches"] == config.num_patches
    images: list[ImageInput] = [noisy_image(30, 20), noisy_image(20, 60)]
    assert random_model(config).embed_images(images).shape == (2, config.embed_dim)
