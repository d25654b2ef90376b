"""The gate on pixels.

Pictures of all kinds through the port's preprocessing and the reference's, bit for bit.

All other gates give both sides the same pixels. So this one alone says whether it is the pixels
that differ.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from siglip_port.image_processing import Backend, ImageProcessor
from siglip_port.parity.gates import MEANING
from siglip_port.parity.metrics import bits, cosine
from siglip_port.parity.results import Finding, GateResult

Theirs = Mapping[Backend, Callable[[Any], Mapping[str, Tensor]]]
"""The reference's processors: what each makes of one picture."""

_PLACE = ("pixel_values", "siglip_port.image_processing")


def pictures(photograph: Image.Image) -> Iterator[tuple[str, Any]]:
    """The photograph in every shape and mode that a file can bring; each with its name."""
    photograph = photograph.convert("RGB")
    width, height = photograph.size
    small, random = photograph.resize((60, 50)), np.random.default_rng(0)
    yield "the photograph", photograph
    yield "upright", photograph.resize((height // 3 + 1, width))
    yield "a thin line", photograph.resize((2, 199))
    yield "one pixel", photograph.resize((1, 1))
    yield "larger than any tower's", photograph.resize((1111, 901))
    yield "noise", Image.fromarray(random.integers(0, 256, (70, 90, 3), dtype=np.uint8))
    for mode in ("1", "L", "P", "CMYK", "YCbCr", "F"):
        yield mode, small.convert(mode)
    yield "I;16", Image.fromarray(np.arange(3000, dtype=np.uint16).reshape(50, 60) * 20)
    clear = small.copy()
    clear.putalpha(Image.fromarray(random.integers(0, 256, (50, 60), dtype=np.uint8)))
    yield "RGBA", clear
    yield "LA", clear.convert("LA")
    palette = small.quantize(16)
    palette.info["transparency"] = 3
    yield "P, transparent", palette
    yield "a JPEG file", _read_again(photograph, "JPEG")
    with tempfile.TemporaryDirectory() as folder:
        exif = Image.Exif()
        exif[0x0112] = 6  # a quarter turn, as telephones have it
        photograph.save(path := f"{folder}/turned.jpg", exif=exif)
        yield "a JPEG file that lies on its side", path
    yield "an array", np.array(small)
    yield "an array with transparency", random.integers(0, 256, (50, 60, 4), dtype=np.uint8)
    yield "a tensor, channels first", torch.from_numpy(np.array(small)).movedim(-1, 0).contiguous()


def waves() -> Image.Image:
    """A picture where there is no photograph: smooth, with every level, and no two sides alike."""
    levels = np.random.default_rng(1).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize((451, 300), Image.Resampling.BICUBIC)


def _read_again(image: Image.Image, kind: str) -> Image.Image:
    file = io.BytesIO()
    image.save(file, kind)
    return Image.open(io.BytesIO(file.getvalue()))


def pixels(
    processors: Mapping[Backend, ImageProcessor],
    theirs: Theirs,
    photograph: Image.Image,
    embed: Callable[..., Tensor] | None = None,
    explained: int = 1,
) -> GateResult:
    """Compares what both sides make of `pictures`.

    Args:
        processors: the port's, by backend.
        theirs: the reference's, by the same backends.
        photograph: any picture.
        embed: the port, to say what a difference in pixels does to a vector; None for a tower
            without.
        explained: how many differences, of each backend, get a hint, and the cosine.
    """
    checked, findings = 0, []
    for backend, processor in processors.items():
        left = explained
        for name, picture in pictures(photograph):
            checked += 1
            try:
                given, expected = dict(processor(picture)), dict(theirs[backend](picture))
            except Exception as error:  # whatever it is, one of the two cannot take the picture
                findings.append(
                    Finding(f"{name}, {backend}: {type(error).__name__}: {error}", *_PLACE)
                )
                continue
            if what := _differs(given, expected, levels(processor)):
                costs = _costs(embed, given, expected) if left > 0 else ""
                hint = _hint(processor, picture, expected) if left > 0 else ""
                left -= 1
                findings.append(Finding(f"{name}, {backend}: {what}{costs}", *_PLACE, hint=hint))
    return GateResult("pixels", checked, MEANING["pixels"].bound, tuple(findings))


def levels(processor: ImageProcessor) -> float:
    """How many of the 255 levels of a picture's values are one of what a processor makes of them, at the most."""
    return max(processor.std or (1.0,)) / (processor.rescale_factor or 1.0)


def _differs(given: Mapping[str, Any], expected: Mapping[str, Any], step: float = 1.0) -> str:
    """What is not the same in two batches; empty where everything is."""
    if given.keys() != expected.keys():
        return f"gives {', '.join(given)}, expected {', '.join(expected)}"
    for name, tensor in given.items():
        other = torch.as_tensor(expected[name])
        if tensor.shape != other.shape:
            return f"{name} of shape {list(tensor.shape)}, expected {list(other.shape)}"
        if name == "pixel_values":
            if tensor.dtype != other.dtype:
                return f"{name} are {tensor.dtype}, expected {other.dtype}"
            if not torch.equal(bits(tensor), bits(other)):
                far = (tensor.double() - other.double()).abs() * step
                return f"differs by up to {far.max():.3g} of 255 levels, in {(far > 0).double().mean():.0%} of all values"
        elif not torch.equal(tensor.long(), other.long()):
            return f"{name} is not the same"
    return ""


def _costs(embed: Callable[..., Tensor] | None, given: Any, expected: Any) -> str:  # noqa: ANN401
    if embed is None or {k: t.shape for k, t in given.items()} != {
        k: t.shape for k, t in expected.items()
    }:
        return ""
    with torch.inference_mode():
        ours, theirs = embed(**given), embed(**expected)
    return (
        f"; the port's vectors of the two have a cosine of {float(cosine(ours, theirs).min()):.6f}"
    )


def _hint(processor: ImageProcessor, picture: Any, expected: Mapping[str, Any]) -> str:  # noqa: ANN401
    """What to change in the port's processor to have it as expected.

    Empty where nothing known does.
    """
    changes: dict[str, dict[str, Any]] = {
        f"resample={number}": {"resample": number}
        for number in (0, 1, 2, 3)
        if number != processor.resample
    }
    changes |= {
        "the other backend": {
            "backend": "pil" if processor.backend == "torchvision" else "torchvision"
        },
        "no normalisation": {"mean": None, "std": None},
        "mean and std of 0.5": {"mean": (0.5,) * 3, "std": (0.5,) * 3},
        "mean and std of ImageNet": {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
        "a factor of 1/255": {"rescale_factor": 1 / 255},
        "no resizing": {"do_resize": False},
    }
    for name, change in changes.items():
        try:
            other = dict(replace(processor, **change)(picture))
        except (ValueError, RuntimeError):
            continue
        if not _differs(other, expected):
            return f"the reference has {name}"
    return ""
