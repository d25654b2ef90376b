"""A picture becomes `pixel_values`, bit for bit as the image processors of transformers make them.

What is done follows the checkpoint's `preprocessor_config.json`; where that has no say, the rules
are those of docs/pixels.md. Sources: transformers 5.23 `image_processing_backends.py`,
`image_transforms.py`, `models/siglip*`.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, TypeGuard, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from siglip_port.checkpoint.preprocessor_config import RESAMPLE
from siglip_port.patches import pack

Picture = str | os.PathLike[str] | bytes | Image.Image | NDArray[Any] | Tensor
"""A file, its contents, a picture of Pillow's.

Or uint8, [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels.
"""

Backend = Literal["pil", "torchvision"]

LARGEST = 4 << 30
"""Bytes of a file: more than the largest that Pillow opens would take, uncompressed."""

MOST = 65536
"""Of pixels a side, and of patches a picture."""

RULES = 1
"""The number of the rules that no configuration has a say in.

To change one of them is to change this.
"""


class Pixels(TypedDict):
    """What a tower takes: `model(**pixels)`.

    The last two, of NaFlex towers, are those of `siglip_port.pack`.
    """

    pixel_values: Tensor
    pixel_attention_mask: NotRequired[Tensor]
    spatial_shapes: NotRequired[Tensor]


class ImageError(ValueError):
    """A picture cannot be used; the message says why."""


@dataclass(frozen=True)
class ImageProcessor:
    """Turns pictures into what a tower takes. Made by `from_config`; small, and can be pickled.

    Attributes:
        size: (height, width) that a picture is resized to, whatever its shape; None for NaFlex.
        patch_size: of NaFlex towers, in pixels; None for others.
        max_num_patches: of NaFlex towers: a picture is resized to at most so many, and padded to
            them.
        do_resize: whether pictures are resized at all.
        resample: Pillow's number of the filter.
        rescale_factor: what the values 0 to 255 are multiplied by; None for nothing.
        mean: subtracted afterwards, one number a channel; None for nothing.
        std: divided by; None for nothing.
        backend: whose arithmetic it is. `pil` gives the same bits on every machine. The results of
            `torchvision` depend on the processor's instructions, and differ by up to one of 255
            levels.
    """

    size: tuple[int, int] | None
    patch_size: int | None
    max_num_patches: int | None
    do_resize: bool
    resample: int
    rescale_factor: float | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    backend: Backend = "pil"

    @classmethod
    def from_config(cls, config: Mapping[str, Any], backend: Backend = "pil") -> ImageProcessor:
        """Reads the contents of a `preprocessor_config.json`; `model.preprocessor_config` is one.

        Args:
            config: of `SiglipImageProcessor` or `Siglip2ImageProcessor`.
            backend: `pil` or `torchvision`, which is an extra.

        Raises:
            ValueError: a field is none that these processors know, or is of the wrong kind.
        """
        kind = str(config.get("image_processor_type", "SiglipImageProcessor"))
        if not kind.startswith(("Siglip2", "SiglipImage")):
            raise ValueError(f"image_processor_type must be that of SigLIP or SigLIP 2, got {kind}")
        naflex = kind.startswith("Siglip2")
        size = None if naflex else _size(config.get("size", (224, 224)))
        if config.get("do_center_crop") or config.get("do_pad"):
            raise ValueError(
                "the preprocessor crops or pads, as no SigLIP checkpoint does; set that to false"
            )
        resample = config.get("resample", 2 if naflex else 3)
        if resample not in RESAMPLE.values() or isinstance(resample, bool):
            raise ValueError(
                f"resample must be one of {sorted(RESAMPLE.values())} (Pillow's filters), got "
                f"{resample!r}"
            )
        if backend not in ("pil", "torchvision"):
            raise ValueError(f"backend must be 'pil' or 'torchvision', got {backend!r}")
        if backend == "torchvision":
            _check_torchvision(lanczos=resample == RESAMPLE["lanczos"])
        normalize = _flag(config, "do_normalize")
        return cls(
            size=size,
            patch_size=_positive(config, "patch_size", 16) if naflex else None,
            max_num_patches=_positive(config, "max_num_patches", 256) if naflex else None,
            do_resize=_flag(config, "do_resize"),
            resample=int(resample),
            rescale_factor=_factor(config) if _flag(config, "do_rescale") else None,
            mean=_three(config, "image_mean") if normalize else None,
            std=_three(config, "image_std") if normalize else None,
            backend=backend,
        )

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with every choice that changes a pixel.

        Not with versions of decoders.
        """
        return hashlib.sha256(
            json.dumps([RULES, asdict(self)], sort_keys=True).encode()
        ).hexdigest()[:16]

    def __call__(self, pictures: Picture | Sequence[Picture]) -> Pixels:
        """Turns pictures into a batch: `model.embed(**processor(pictures))`.

        Args:
            pictures: one, or several.

        Returns:
            `pixel_values`, [B, 3, S, S], float32; for NaFlex packed patches, see
            `siglip_port.pack`.

        Raises:
            ImageError: a picture cannot be read, or they have no common shape (without resizing).
        """
        pixels = []
        for number, picture in enumerate(several := listed(pictures)):
            try:
                pixels.append(self.one(picture))
            except ImageError as error:
                name = (
                    picture
                    if isinstance(picture, (str, os.PathLike))
                    else f"picture {number} of {len(several)}"
                )
                raise ImageError(f"{name}: {error}") from error
        return self.batch(pixels)

    def batch(self, pixels: Sequence[Tensor]) -> Pixels:
        """Puts what `one` returned into a batch.

        Raises:
            ImageError: there is none, they have no common shape, or more patches than fit.
        """
        if not pixels:
            raise ImageError("there are no pictures; pass at least one")
        if self.patch_size is not None:
            try:
                return cast(Pixels, pack(pixels, self.patch_size, self.max_num_patches))
            except ValueError as error:
                raise ImageError(str(error)) from error
        if len(shapes := {tuple(p.shape[1:]) for p in pixels}) > 1:
            raise ImageError(
                f"without resizing, pictures must be of one size, got {sorted(shapes)}"
            )
        return {"pixel_values": torch.stack(list(pixels))}

    def one(self, picture: Picture) -> Tensor:
        """Turns one picture into [3, H, W], float32.

        Raises:
            ImageError: it cannot be read.
        """
        pixels = to_rgb(picture, self.backend)
        size = self._target(*pixels.shape[1:]) if self.do_resize else pixels.shape[1:]
        if self.backend == "torchvision":
            return self._by_torchvision(torch.from_numpy(pixels.copy()), size)
        if self.do_resize:
            resized = Image.fromarray(np.moveaxis(pixels, 0, -1)).resize(
                size[::-1], Image.Resampling(self.resample)
            )
            pixels = np.moveaxis(np.asarray(resized), -1, 0)
        factor = 1.0 if self.rescale_factor is None else self.rescale_factor
        values = (pixels.astype(np.float64) * factor).astype(np.float32)
        if self.mean is not None and self.std is not None:
            mean, std = (
                np.array(numbers, dtype=np.float32)[:, None, None]
                for numbers in (self.mean, self.std)
            )
            values = (values - mean) / std
        return torch.from_numpy(np.ascontiguousarray(values))

    def _target(self, height: int, width: int) -> tuple[int, int]:
        if self.size is not None:
            return self.size
        assert self.patch_size is not None
        assert self.max_num_patches is not None
        return naflex_size(height, width, self.patch_size, self.max_num_patches)

    def _by_torchvision(self, pixels: Tensor, size: Sequence[int]) -> Tensor:
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional

        if self.do_resize:
            names = {number: name for name, number in RESAMPLE.items()} | {
                0: "nearest-exact"
            }  # as Pillow's nearest
            mode = InterpolationMode(names[self.resample])
            pixels = functional.resize(pixels, list(size), interpolation=mode, antialias=True)
        if self.mean is None or self.std is None:
            return (
                pixels * self.rescale_factor if self.rescale_factor is not None else pixels.float()
            )
        scale = 1.0 if self.rescale_factor is None else 1.0 / self.rescale_factor
        mean, std = ((torch.tensor(numbers) * scale).tolist() for numbers in (self.mean, self.std))
        normalized: Tensor = functional.normalize(pixels.float(), mean, std)
        return normalized


def listed(pictures: Picture | Sequence[Picture]) -> list[Picture]:
    """One picture or several, as several."""
    if isinstance(pictures, (list, tuple)):
        return list(pictures)
    return [pictures]  # type: ignore[list-item]


def to_rgb(picture: Picture, backend: Backend = "pil") -> NDArray[np.uint8]:
    """Reads a picture: [3, H, W], 0 to 255.

    Files are turned as their EXIF orientation says; what is transparent becomes white; of several
    frames, the first is taken; all other kinds of pixels become RGB as Pillow's `convert` does it.

    Args:
        picture: any.
        backend: whose arithmetic lays arrays and tensors with transparency onto white.

    Raises:
        ImageError: it cannot be read: damaged, no picture, or so large that Pillow takes it for an
            attack.
    """
    if isinstance(picture, (Tensor, np.ndarray)):
        return _rgb_of_array(picture, backend)
    try:
        if isinstance(picture, (str, os.PathLike)):
            picture = file_contents(picture)
        if isinstance(picture, bytes):
            opened = Image.open(io.BytesIO(picture))
            if opened.format == "EPS":
                raise ImageError(
                    "the picture cannot be read: PostScript is a program, and is not run"
                )
            picture = ImageOps.exif_transpose(opened)
        if not isinstance(picture, Image.Image):
            raise ImageError(
                f"a picture must be a path, bytes, a PIL image, an array or a tensor, got "
                f"{type(picture)}"
            )
        if 0 in picture.size:
            raise ImageError("the picture has no pixels")
        if "A" in picture.getbands() or picture.info.get("transparency") is not None:
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
            picture = Image.alpha_composite(white, picture)
        return np.moveaxis(np.asarray(picture.convert("RGB")), -1, 0)
    except ImageError:
        raise
    except UnidentifiedImageError as error:  # whose own message names an object in memory
        raise ImageError(
            "the picture cannot be read: it is of no kind that Pillow knows"
        ) from error
    except (
        Exception
    ) as error:  # Pillow's own kinds, the system's, and those of its decoders, of all kinds
        raise ImageError(
            f"the picture cannot be read: {str(error).strip() or type(error).__name__}"
        ) from error


def file_contents(path: str | os.PathLike[str]) -> bytes:
    """Reads a file.

    Raises:
        ImageError: it is not there, may not be read, or is no regular file: pipes and devices may
            never end.
    """
    try:
        found = Path(path).stat()
        if not stat.S_ISREG(found.st_mode):
            raise ImageError("the picture cannot be read: it is no regular file")
        check_size(found.st_size)
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # the latter of names with a null in them
        if isinstance(error, ImageError):
            raise
        raise ImageError(
            f"the picture cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error


def check_size(size: int) -> None:
    """Refuses a file of so many bytes before it is read.

    Raises:
        ImageError: it is larger than any picture that Pillow opens.
    """
    if size > LARGEST:
        raise ImageError(
            f"the picture cannot be read: {size:,} bytes, more than the {LARGEST:,} of the largest"
        )


def _rgb_of_array(picture: NDArray[Any] | Tensor, backend: Backend) -> NDArray[np.uint8]:
    if picture.dtype != (torch.uint8 if isinstance(picture, Tensor) else np.uint8):
        raise ImageError(
            f"an array or tensor must be of uint8, 0 to 255, got {picture.dtype}; what is already "
            "normalised needs no "
            "preprocessing: pass it to the model as it is"
        )
    if isinstance(picture, Tensor):
        picture = picture.detach().cpu().numpy()
    if picture.ndim == 2:
        picture = picture[None]
    if (
        picture.ndim != 3
        or 0 in picture.shape
        or not {picture.shape[0], picture.shape[2]} & {1, 3, 4}
    ):
        raise ImageError(
            f"an array or tensor must be [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels, "
            "got "
            f"{list(picture.shape)}"
        )
    if picture.shape[0] not in (
        1,
        3,
        4,
    ):  # where both can be channels, the first are, as for the reference
        picture = np.moveaxis(picture, -1, 0)
    if len(picture) == 1:
        picture = np.repeat(picture, 3, axis=0)
    return _onto_white(picture, backend) if len(picture) == 4 else picture


def _onto_white(picture: NDArray[np.uint8], backend: Backend) -> NDArray[np.uint8]:
    """[4, H, W] -> [3, H, W]. The backends round differently."""
    if backend == "torchvision":
        from torchvision.transforms.v2 import functional

        image: Tensor = functional.to_dtype(
            torch.from_numpy(picture.copy()), torch.float32, scale=True
        )
        white = functional.to_dtype(
            image[:3] * image[3:] + (1 - image[3:]), torch.uint8, scale=True
        )
        return white.numpy()  # type: ignore[no-any-return]
    alpha = picture[3:] / 255
    return np.round(alpha * picture[:3] + (1 - alpha) * 255).astype(np.uint8)


def _check_torchvision(lanczos: bool) -> None:
    try:
        import torchvision.transforms.v2  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "backend='torchvision' needs torchvision: pip install 'siglip-port[torchvision]', or "
            "use backend='pil'"
        ) from error
    release = tuple(map(int, version("torchvision").split(".")[:2]))
    if lanczos and release < (0, 27):
        raise ValueError(
            f"torchvision has no Lanczos filter before 0.27, this is {version('torchvision')}"
        )


def naflex_size(height: int, width: int, patch_size: int, max_num_patches: int) -> tuple[int, int]:
    """The largest size of about the same shape that has at most so many patches.

    (height, width), in pixels.

    By the same bisection as the reference, to the last bit.
    """

    def scaled(scale: float, side: int) -> int:
        return max(patch_size, math.ceil(side * scale / patch_size) * patch_size)

    smallest, largest = 1e-6, 100.0
    while largest - smallest >= 1e-5:
        scale = (smallest + largest) / 2
        if (scaled(scale, height) / patch_size) * (
            scaled(scale, width) / patch_size
        ) <= max_num_patches:
            smallest = scale
        else:
            largest = scale
    return scaled(smallest, height), scaled(smallest, width)


def _size(size: Any) -> tuple[int, int]:  # noqa: ANN401 (whatever stands in a file)
    if isinstance(size, Mapping):
        sides = [size.get("height"), size.get("width")]
    else:
        sides = (
            list(size) if isinstance(size, (list, tuple)) else []
        )  # one number is the shorter side's
    height, width = sides if len(sides) == 2 else (None, None)
    if not _is_whole(height) or not _is_whole(width):
        raise ValueError(
            f"size must be {{'height': H, 'width': W}}, of 1 to {MOST}, got {size!r}; SigLIP keeps "
            "no aspect ratio"
        )
    return height, width


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST


def _flag(config: Mapping[str, Any], name: str) -> bool:
    value = config.get(name, True)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return bool(value)  # null: no, for the reference too


def _positive(config: Mapping[str, Any], name: str, default: int) -> int:
    value = config.get(name, default)
    if not _is_whole(value):
        raise ValueError(f"{name} must be a whole number from 1 to {MOST}, got {value!r}")
    return value


def _three(config: Mapping[str, Any], name: str) -> tuple[float, ...]:
    value = config.get(name, [0.5] * 3)
    numbers = value if isinstance(value, (list, tuple)) else [value] * 3
    if len(numbers) != 3 or not all(_is_finite(n) for n in numbers):
        raise ValueError(f"{name} must be three numbers, got {value!r}")
    if name == "image_std" and 0 in np.array(numbers, dtype=np.float32):
        raise ValueError(f"image_std must be three numbers other than 0, got {value!r}")
    return tuple(float(number) for number in numbers)


def _factor(config: Mapping[str, Any]) -> float:
    value = config.get("rescale_factor", 1 / 255)
    if not _is_finite(value) or not value:
        raise ValueError(f"rescale_factor must be a number other than 0, got {value!r}")
    return float(value)


def _is_finite(value: object) -> bool:
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30
    )  # of any float
