"""Options of the comparison with transformers, and checks of their values.

Does not import transformers: a wrong argument is reported without the seconds of its import.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from PIL import Image

DEFAULT_CHECKPOINT = "google/siglip-base-patch16-224"
SAMPLE_IMAGE = Path(__file__).with_name("images") / "chelsea.png"
"""An image that is not square; its source is in `images/README.md`."""

WEIGHTS = ("auto", "hub", "random")
DTYPES = ("float32", "float64", "bfloat16", "float16")
ATTENTIONS = ("both", "sdpa", "eager")

Weights = Literal["auto", "hub", "random"]


@dataclass(frozen=True)
class VerifyOptions:
    """Options of a comparison.

    Attributes:
        checkpoint: Hub id, folder or file.
        layout: Layout of the checkpoint; None to recognize it.
        prefix: Prefix of the encoder's names; None to find it.
        subfolder: Folder of the checkpoint in the folder or repository; None for none.
        revision: Branch, tag or commit of a Hub repository.
        offline: Whether to use only the Hub's local cache.
        weights: `hub` for the checkpoint's weights; `random` for random weights for its
            architecture; `auto` for the checkpoint's, or random ones if the default checkpoint is
            unavailable.
        image: Path of the input image.
        dtype: Dtype of weights and computation.
        attention: Attention implementation of the reference for the rounding bounds.
        device: `cpu`, `cuda`, `cuda:1`, ...
        full: Whether to use all weight recipes, two seeds and all dtypes.
        second_reference: Third implementation, in the form of `second_reference.parse`.
        optimized: Whether to check every engine of `siglip_port.optimize`.
        json: File for the JSON report.
        report: Folder for reports in all formats.
        baseline: Earlier JSON report to compare with.
        save: Folder in which to write a golden folder instead of comparing.
        against: Another port to judge, see `against.TARGETS`; None for this package's.

    Raises:
        ValueError: An option is not supported.
    """

    checkpoint: str = DEFAULT_CHECKPOINT
    layout: str | None = None
    prefix: str | None = None
    subfolder: str | None = None
    revision: str | None = None
    offline: bool = False
    weights: Weights = "auto"
    image: Path = SAMPLE_IMAGE
    dtype: str = DTYPES[0]
    attention: str = ATTENTIONS[0]
    device: str = "cpu"
    full: bool = False
    second_reference: str | None = None
    optimized: bool = False
    json: Path | None = None
    report: Path | None = None
    baseline: Path | None = None
    save: Path | None = None
    against: str | None = None

    def __post_init__(self) -> None:
        validate_choice("weights", self.weights, WEIGHTS)
        validate_choice("dtype", self.dtype, DTYPES)
        validate_choice("attention", self.attention, ATTENTIONS)
        if self.save is not None and self.against is not None:
            raise ValueError("--save and --against exclude each other; run the command twice")

    @property
    def selection(self) -> str:
        """The options that select one encoder of the checkpoint, as they are typed."""
        options = ""
        for name in ("layout", "prefix", "subfolder", "revision"):
            value = getattr(self, name)
            if value is not None:
                options += f" --{name} {shlex.quote(value)}"
        return options

    @property
    def attentions(self) -> tuple[str, ...]:
        """Attention implementations of the reference for the rounding bounds."""
        if self.attention == "both":
            return ("sdpa", "eager")
        return (self.attention,)

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as a `torch.dtype`."""
        return named_dtype(self.dtype)

    @property
    def rounding_dtypes(self) -> tuple[torch.dtype, ...]:
        """Dtypes for rounding on the checkpoint; `dtype` is the first."""
        others: list[str] = []
        if self.full:
            others = [name for name in DTYPES if name not in (self.dtype, "float64")]
        return tuple(named_dtype(name) for name in [self.dtype, *others])


def validate_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def named_dtype(name: str) -> torch.dtype:
    """Return the `torch.dtype` of this name."""
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def check_outputs(options: VerifyOptions) -> None:
    """Raise OSError unless the reports can be written."""
    if options.json is not None:
        check_writable("--json", options.json.resolve())
    if options.report is not None:
        report = (options.report / "report.json").resolve()
        with contextlib.suppress(OSError):
            report.parent.mkdir(parents=True, exist_ok=True)
        check_writable("--report", report)


def check_writable(option: str, path: Path) -> None:
    """Raise OSError unless a file can be written to `path`, the value of `option`."""
    if path.exists() and not path.is_file():
        raise OSError(f"{option} {path}: not a regular file; choose another path")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise OSError(
            f"{option} {path}: the folder is missing or not writable; choose another path"
        )


def check_device(device: str) -> None:
    """Raise ValueError unless `device` is available."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--device {device}: not available on this machine ({reason}); use cpu"
        ) from error


def read_image(path: Path) -> Image.Image:
    """Read an image and convert it to RGB."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # OSError, or any error of a Pillow decoder
        raise ValueError(
            f"--image {path}: cannot be read as an image ({error}); pass a local JPEG or PNG file"
        ) from error


def read_baseline(path: Path) -> dict[str, Any]:
    """Read an earlier JSON report."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or "sections" not in content:
            raise ValueError("not a report of this command")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--baseline {path}: cannot be read ({error}); pass a file written by --json"
        ) from error
    return content
