"""Pixels, bit for bit as the reference's own processors make them."""

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

from siglip_port import SigLipVisionConfig, SigLipVisionModel
from siglip_port import image_processing as image
from siglip_port.checkpoint import preprocessor_config as processors
from siglip_port.image_processing import (
    LARGEST,
    Backend,
    ImageError,
    ImageProcessor,
    Picture,
    naflex_size,
    to_rgb,
)
from siglip_port.parity import randomise
from siglip_port.parity.metrics import bits
from tests.helpers.checkpoints import SMALL

CHELSEA = Path(__file__).parent / "images" / "chelsea.png"
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


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """A cut-out of the photograph, with noise: edges, flat parts, and every value from 0 to 255."""
    with Image.open(CHELSEA) as image:
        pixels = np.asarray(
            image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        ).astype(int)
    noise = np.random.default_rng(seed).integers(-40, 40, pixels.shape)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def with_alpha(image: Image.Image, mode: str) -> Image.Image:
    alpha = Image.fromarray(
        np.random.default_rng(1).integers(0, 256, image.size[::-1]).astype(np.uint8)
    )
    image.putalpha(alpha)
    return image.convert(mode)


def transparent_palette() -> Image.Image:
    image = photograph(60, 50).quantize(16)
    image.info["transparency"] = 3
    return image


def sixteen_bits() -> Image.Image:
    return Image.fromarray(np.arange(60 * 50, dtype=np.uint16).reshape(50, 60) * 20)


MODES: dict[str, Callable[[], Image.Image]] = {
    "RGB": lambda: photograph(97, 61),
    "tall": lambda: photograph(31, 200),
    "a pixel": lambda: photograph(1, 1),
    "a pixel wide": lambda: photograph(1, 90),
    "three pixels high": lambda: photograph(70, 3),
    "its own size": lambda: photograph(32, 48),
    "larger by far": lambda: photograph(1500, 900),
    "smaller": lambda: photograph(9, 7),
    "L": lambda: photograph(60, 50).convert("L"),
    "1": lambda: photograph(60, 50).convert("1"),
    "LA": lambda: with_alpha(photograph(60, 50), "LA"),
    "RGBA": lambda: with_alpha(photograph(60, 50), "RGBA"),
    "P": lambda: photograph(60, 50).quantize(16),
    "P, transparent": transparent_palette,
    "CMYK": lambda: photograph(60, 50).convert("CMYK"),
    "YCbCr": lambda: photograph(60, 50).convert("YCbCr"),
    "HSV": lambda: photograph(60, 50).convert("HSV"),
    "LAB": lambda: Image.fromarray(np.asarray(photograph(60, 50)), "LAB"),
    "I;16": sixteen_bits,
    "I": lambda: sixteen_bits().convert("I"),
    "F": lambda: photograph(60, 50).convert("F"),
}


def same(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """The same bits under the same names."""
    return ours.keys() == dict(theirs).keys() and all(
        ours[name].shape == theirs[name].shape
        and (ours[name].dtype == theirs[name].dtype or not ours[name].is_floating_point())
        and (
            torch.equal(bits(ours[name]), bits(theirs[name]))
            if ours[name].is_floating_point()
            else torch.equal(ours[name], theirs[name].to(ours[name].dtype))
        )
        for name in ours
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("resample", [0, 1, 2, 3])
def test_every_kind_of_picture_as_the_reference(mode: str, resample: int) -> None:
    image = MODES[mode]()
    config = {**FIXED, "resample": resample}
    theirs = SiglipImageProcessorPil(**config)(images=image, return_tensors="pt")
    assert same(ImageProcessor.from_config(config)(image), theirs)


@pytest.mark.parametrize("mode", MODES)
def test_naflex_as_the_reference(mode: str) -> None:
    image = MODES[mode]()
    theirs = Siglip2ImageProcessorPil(**NAFLEX, do_convert_rgb=True)(
        images=image, return_tensors="pt"
    )
    assert same(ImageProcessor.from_config(NAFLEX)(image), theirs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("resample", [0, 1, 2, 3])
def test_torchvision_as_the_reference(mode: str, resample: int) -> None:
    image = MODES[mode]()
    fixed = {**FIXED, "resample": resample}
    theirs = SiglipImageProcessor(**fixed)(images=image, return_tensors="pt")
    assert same(ImageProcessor.from_config(fixed, "torchvision")(image), theirs)
    naflex = {**NAFLEX, "resample": resample}
    theirs = Siglip2ImageProcessor(**naflex, do_convert_rgb=True)(images=image, return_tensors="pt")
    assert same(ImageProcessor.from_config(naflex, "torchvision")(image), theirs)


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
def test_what_the_configuration_says(option: dict[str, Any]) -> None:
    images = [photograph(64, 32), photograph(64, 32, seed=1)]
    for ours, theirs in ((FIXED, SiglipImageProcessorPil), (NAFLEX, Siglip2ImageProcessorPil)):
        config = {**ours, **option}
        expected = theirs(**config)(images=images, return_tensors="pt")
        assert same(ImageProcessor.from_config(config)(images), expected)
    for ours, theirs in ((FIXED, SiglipImageProcessor), (NAFLEX, Siglip2ImageProcessor)):
        config = {**ours, **option}
        expected = theirs(**config)(images=images, return_tensors="pt")
        assert same(ImageProcessor.from_config(config, "torchvision")(images), expected)


@pytest.mark.parametrize(
    "shape", [(50, 60, 3), (3, 50, 60), (1, 50, 60), (50, 60, 4), (4, 50, 60), (3, 9, 3)]
)
def test_arrays_and_tensors(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    kinds: list[tuple[Backend, Any]] = [
        ("pil", SiglipImageProcessorPil),
        ("torchvision", SiglipImageProcessor),
    ]
    for backend, kind in kinds:
        theirs = kind(**FIXED)(images=array, return_tensors="pt")
        processor = ImageProcessor.from_config(FIXED, backend)
        assert same(processor(array), theirs)
        assert same(processor(torch.from_numpy(array)), theirs)
        assert same(
            processor([array, array]), {"pixel_values": theirs["pixel_values"].repeat(2, 1, 1, 1)}
        )


def test_transparent_arrays_are_rounded_as_each_backend_does_it() -> None:
    array = np.full((5, 5, 4), (8, 8, 8, 250), np.uint8)
    assert (to_rgb(array) == 13).all()
    assert (to_rgb(array, "torchvision") == 12).all()


def test_an_array_without_channels_is_gray() -> None:
    """Which the reference's processors refuse."""
    array, processor = (
        np.arange(3000, dtype=np.uint16).reshape(50, 60).astype(np.uint8),
        ImageProcessor.from_config(FIXED),
    )
    assert same(processor(array), processor(Image.fromarray(array)))


@given(
    st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([4, 14, 16]), st.integers(1, 1024)
)
def test_sizes_of_naflex(height: int, width: int, patch: int, most: int) -> None:
    assert naflex_size(height, width, patch, most) == get_image_size_for_max_num_patches(
        height, width, patch, most
    )


def contents(image: Image.Image, kind: str = "PNG", **how: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_files_are_turned_upright(orientation: int, tmp_path: Path) -> None:
    """As the reference does it with paths.

    Of a picture of Pillow's, it sees the pixels alone, and so do we.
    """
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.jpg"
    path.write_bytes(contents(photograph(60, 40), "JPEG", exif=exif))
    processor, theirs = ImageProcessor.from_config(FIXED), SiglipImageProcessorPil(**FIXED)
    expected = theirs(images=ImageOps.exif_transpose(Image.open(path)), return_tensors="pt")
    assert same(processor(path), theirs(images=theirs.fetch_images(str(path)), return_tensors="pt"))
    assert same(processor(path), expected)
    assert same(processor(str(path)), expected)
    assert same(processor(path.read_bytes()), expected)
    assert same(processor(Image.open(path)), theirs(images=Image.open(path), return_tensors="pt"))
    assert to_rgb(path).shape == ((3, 60, 40) if orientation > 4 else (3, 40, 60))


def test_transparency_is_white_whatever_it_comes_from(tmp_path: Path) -> None:
    image = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    (tmp_path / "a.png").write_bytes(contents(image))
    for picture in (image, tmp_path / "a.png", np.asarray(image)):
        assert (to_rgb(picture) == 255).all()


@pytest.mark.parametrize("kind", ["webp", "png", "gif"])
def test_the_first_frame_of_an_animation(kind: str, tmp_path: Path) -> None:
    first, second = (
        photograph(20, 20).quantize(64),
        photograph(20, 20, seed=5).rotate(90).quantize(64),
    )
    first, second = (image if kind == "gif" else image.convert("RGB") for image in (first, second))
    how = {"lossless": True} if kind == "webp" else {}
    first.save(tmp_path / f"a.{kind}", None, save_all=True, append_images=[second], **how)
    assert np.array_equal(
        to_rgb(tmp_path / f"a.{kind}"), np.moveaxis(np.asarray(first.convert("RGB")), -1, 0)
    )


def png_of_16_bits(values: NDArray[np.uint16]) -> bytes:
    """[H, W, C], C 1 or 3. Pillow writes none with colours."""
    height, width, channels = values.shape

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


def test_files_of_16_bits() -> None:
    """With colours, Pillow takes the upper 8 bits when it opens them.

    Of gray ones, all that is above 255 is white.
    """
    values = np.random.default_rng(0).integers(0, 65536, (9, 7, 3)).astype(np.uint16)
    assert np.array_equal(to_rgb(png_of_16_bits(values)), np.moveaxis(values >> 8, -1, 0))
    gray = to_rgb(png_of_16_bits(values[..., :1]))
    assert np.array_equal(gray, np.repeat(np.minimum(values[..., 0], 255)[None], 3, axis=0))
    processor, theirs = ImageProcessor.from_config(FIXED), SiglipImageProcessorPil(**FIXED)
    for picture in (png_of_16_bits(values), png_of_16_bits(values[..., :1])):
        assert same(
            processor(picture), theirs(images=Image.open(io.BytesIO(picture)), return_tensors="pt")
        )


def test_what_may_never_end_or_fit(tmp_path: Path) -> None:
    with open(tmp_path / "a.jpg", "wb") as file:  # noqa: PTH123 (sparse: nothing is written)
        file.truncate(LARGEST + 1)
    os.mkfifo(tmp_path / "b.jpg")
    (tmp_path / "c.jpg").symlink_to(tmp_path / "c.jpg")
    (tmp_path / "d.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n"
    )
    for name, message in (
        ("a.jpg", "4,294,967,297 bytes, more than the"),
        ("b.jpg", "no regular file"),
        ("c.jpg", "Too many levels"),
        ("d.jpg", "PostScript is a program, and is not run"),
    ):
        with pytest.raises(ImageError, match=message):
            to_rgb(tmp_path / name)


def bomb() -> bytes:
    """A picture of 30,000 x 30,000 pixels, by its header."""
    small = contents(Image.new("L", (8, 8)))
    header = small[12:16] + struct.pack(">II", 30_000, 30_000) + small[24:29]
    return small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (b"", "cannot be read: it is of no kind that Pillow knows"),
        (b"GIF89a nothing", "cannot be read"),
        (contents(photograph(60, 40), "JPEG")[:700], "cannot be read: .*truncated"),
        (contents(photograph(60, 40))[:900], "cannot be read: "),
        (bomb(), "cannot be read: Image size .* exceeds limit"),
        ("/nowhere/a.jpg", r"^/nowhere/a.jpg: the picture cannot be read: .*No such file"),
        (Path(__file__).parent, "cannot be read: it is no regular file"),
        ("/dev/zero", "cannot be read: it is no regular file"),
        ("a\0b", "cannot be read: embedded null"),
        (np.zeros((4, 4, 3)), "must be of uint8, 0 to 255, got float64"),
        (torch.zeros(3, 4, 4), "must be of uint8, 0 to 255, got torch.float32"),
        (
            torch.zeros(3, 4, 4, dtype=torch.bfloat16),
            "must be of uint8, 0 to 255, got torch.bfloat16",
        ),
        (np.zeros((5, 5, 2), np.uint8), r"must be \[H, W\], .* got \[5, 5, 2\]"),
        (np.zeros((0, 4, 3), np.uint8), r"got \[0, 4, 3\]"),
        (np.zeros((2, 3, 4, 4), np.uint8), r"got \[2, 3, 4, 4\]"),
        (Image.new("RGB", (0, 5)), "has no pixels"),
        (7, "must be a path, bytes, a PIL image, an array or a tensor, got <class 'int'>"),
        (None, "must be a path"),
        ([], "there are no pictures"),
        ([[]], "must be a path"),
    ],
)
def test_what_is_no_picture(picture: Picture, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        ImageProcessor.from_config(FIXED)(picture)


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
            "must be that of SigLIP or SigLIP 2, got CLIP",
        ),
        ({"image_mean": 10**400}, "image_mean must be three numbers"),
        ({"image_std": 1e-50}, "image_std must be three numbers other than 0"),
        ({"rescale_factor": 10**400}, "rescale_factor must be a number"),
        (
            {"image_processor_type": "Siglip2ImageProcessor", "max_num_patches": 10**10},
            "max_num_patches must be a",
        ),
        ({"size": {"height": 0, "width": 224}}, "size must be"),
        ({"resample": 5}, r"resample must be one of \[0, 1, 2, 3\]"),
        ({"resample": True}, "resample must be"),
        ({"image_mean": [0.5, 0.5]}, "image_mean must be three numbers"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std must be three numbers"),
        ({"image_std": float("nan")}, "image_std must be three numbers"),
        ({"rescale_factor": 0}, "rescale_factor must be a number"),
        ({"do_center_crop": True}, "crops or pads"),
        (
            {"image_processor_type": "Siglip2ImageProcessor", "patch_size": 0},
            "patch_size must be a whole number",
        ),
        (
            {"image_processor_type": "Siglip2ImageProcessor", "max_num_patches": "9"},
            "max_num_patches must be a whole",
        ),
    ],
)
def test_what_no_processor_of_siglip_says(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageProcessor.from_config({**FIXED, **change})


def test_backends_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="backend must be 'pil' or 'torchvision', got 'tf'"):
        ImageProcessor.from_config(FIXED, "tf")  # type: ignore[arg-type]
    monkeypatch.setattr(image, "version", lambda name: "0.26.1+cpu")
    with pytest.raises(ValueError, match=r"no Lanczos filter before 0.27, this is 0.26.1"):
        ImageProcessor.from_config({**FIXED, "resample": 1}, "torchvision")
    monkeypatch.setitem(sys.modules, "torchvision.transforms.v2", None)
    with pytest.raises(
        ValueError, match=r"needs torchvision: pip install 'siglip-port\[torchvision\]'"
    ):
        ImageProcessor.from_config(FIXED, "torchvision")


def test_pictures_without_a_common_size() -> None:
    processor = ImageProcessor.from_config({**FIXED, "do_resize": False})
    with pytest.raises(ImageError, match=r"must be of one size, got \[\(4, 5\), \(5, 5\)\]"):
        processor([photograph(5, 5), photograph(5, 4)])
    with pytest.raises(ImageError, match="more than num_patches=20"):
        ImageProcessor.from_config({**NAFLEX, "do_resize": False})(photograph(160, 160))


def test_the_fingerprint_follows_every_choice() -> None:
    processor = ImageProcessor.from_config(FIXED)
    changed = [
        replace(processor, size=(32, 48)), replace(processor, resample=2), replace(processor, do_resize=False),
        replace(processor, mean=(0.5, 0.5, 0.4)), replace(processor, std=None), replace(processor, rescale_factor=None),
        replace(processor, backend="torchvision"), ImageProcessor.from_config(NAFLEX),
        ImageProcessor.from_config({**NAFLEX, "max_num_patches": 21}),
        ImageProcessor.from_config({**NAFLEX, "patch_size": 14}),
    ]  # fmt: skip
    assert len({each.fingerprint for each in (processor, *changed)}) == len(changed) + 1
    assert pickle.loads(pickle.dumps(processor)).fingerprint == processor.fingerprint
    assert (
        ImageProcessor.from_config(dict(reversed(FIXED.items()))).fingerprint
        == processor.fingerprint
    )
    # That of siglip-base-patch16-224. It stands in files that were written long ago: it may not
    # change by itself.
    assert (
        ImageProcessor.from_config(processors.default(SigLipVisionConfig())).fingerprint
        == "dd941af9c5cf03d0"
    )


def test_a_model_embeds_pictures(tmp_path: Path) -> None:
    config = replace(SMALL, pooling_head=True)
    model = SigLipVisionModel(config).eval()
    randomise(model, seed=0)
    pictures: list[Picture] = [
        photograph(30, 20),
        photograph(20, 30),
        CHELSEA,
        np.asarray(photograph(9, 9)),
    ]
    size = {"height": config.image_size, "width": config.image_size}
    theirs = SiglipImageProcessorPil(
        **{**model.preprocessor_config, "size": size, "do_convert_rgb": True}
    )
    with torch.inference_mode():
        expected = torch.cat(
            [
                model.embed(
                    theirs(images=Image.open(p) if isinstance(p, Path) else p, return_tensors="pt")[
                        "pixel_values"
                    ]
                )
                for p in pictures
            ]
        )
    assert torch.allclose(model.embed_images(pictures, batch_size=3), expected, rtol=0, atol=1e-5)
    assert model.embed_images(pictures[0]).shape == (1, config.embed_dim)  # type: ignore[arg-type]
    assert torch.allclose(model.embed_images(pictures, normalize=True).norm(dim=-1), torch.ones(4))
    assert model.embed_images([]).shape == (0, config.embed_dim)
    with pytest.raises(ImageError, match="picture 1 of 2: "):
        model.embed_images([CHELSEA, b"no"])
    with pytest.raises(ValueError, match="batch_size must be"):
        model.embed_images(pictures, batch_size=0)


def test_a_naflex_model_embeds_pictures() -> None:
    config = replace(SMALL, pooling_head=True, naflex=True)
    model = SigLipVisionModel(config).eval()
    randomise(model, seed=0)
    assert processors.default(config)["max_num_patches"] == config.num_patches
    pictures: list[Picture] = [photograph(30, 20), photograph(20, 60)]
    assert model.embed_images(pictures).shape == (2, config.embed_dim)
