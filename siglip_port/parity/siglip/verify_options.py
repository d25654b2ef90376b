"""The options of the comparison with transformers, and what is checked before the work begins.

Nothing here needs transformers, so that a wrong argument does not cost the seconds of its import.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from PIL import Image

DEFAULT_CHECKPOINT = "google/siglip-base-patch16-224"
SAMPLE_IMAGE = Path(__file__).with_name("images") / "chelsea.png"
"""A image that is not square: `images/README.md` says where it is from."""

WEIGHTS = ("auto", "hub", "random")
DTYPES = ("float32", "float64", "bfloat16", "float16")
ATTENTIONS = ("both", "sdpa", "eager")

Weights = Literal["auto", "hub", "random"]


@dataclass(frozen=True)
class VerifyOptions:
    """What is compared, how, and where the results go.

    Attributes:
        checkpoint: a Hub id, a folder or a file.
        weights: `hub` for the checkpoint's own; `random` for random ones of its architecture;
            `auto` for its own, or random ones where the default checkpoint cannot be had.
        image: an image.
        dtype: of weights and arithmetic.
        attention: the reference's implementation whose rounding counts.
        device: `cpu`, `cuda`, `cuda:1`, ...
        full: all recipes of weights, two seeds and all dtypes.
        second_reference: a third implementation to ask, as `second_reference.parse` reads it.
        optimized: whether to judge every engine of `siglip_port.optimize`, too.
        json: the file to write all measurements to.
        report: the folder to write the reports to.
        baseline: an earlier JSON report to compare with.

    Raises:
        ValueError: an option is not supported.
    """

    checkpoint: str = DEFAULT_CHECKPOINT
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

    def __post_init__(self) -> None:
        validate_choice("weights", self.weights, WEIGHTS)
        validate_choice("dtype", self.dtype, DTYPES)
        validate_choice("attention", self.attention, ATTENTIONS)

    @property
    def attentions(self) -> tuple[str, ...]:
        """The reference's implementations of attention whose rounding counts."""
        if self.attention == "both":
            return ("sdpa", "eager")
        return (self.attention,)

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype`, as torch has it."""
        return named_dtype(self.dtype)

    @property
    def rounding_dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes in which the checkpoint's rounding is judged; `dtype` is the first."""
        others: list[str] = []
        if self.full:
            others = [name for name in DTYPES if name not in (self.dtype, "float64")]
        return tuple(named_dtype(name) for name in [self.dtype, *others])


def validate_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def named_dtype(name: str) -> torch.dtype:
    """The dtype of torch that has this name."""
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def check_outputs(options: VerifyOptions) -> None:
    """Raise OSError unless the reports can be written afterwards."""
    if options.json is not None:
        check_writable("--json", options.json.resolve())
    if options.report is not None:
        report = (options.report / "report.json").resolve()
        with contextlib.suppress(OSError):
            report.parent.mkdir(parents=True, exist_ok=True)
        check_writable("--report", report)


def check_writable(option: str, path: Path) -> None:
    """Raise OSError unless a file can be written to `path`, which `option` names."""
    if path.exists() and not path.is_file():
        raise OSError(f"{option} {path} is no file that could be replaced; name another")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise OSError(
            f"{option} {path}: its folder does not exist, or may not be written to; name another"
        )


def check_device(device: str) -> None:
    """Raise ValueError unless tensors can be made on `device`."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--device {device} cannot be used on this machine ({reason}); use cpu"
        ) from error


def read_image(path: Path) -> Image.Image:
    """Read the image, in RGB."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow's own kinds, the system's, and those of its decoders
        raise ValueError(
            f"--image {path} cannot be read as an image ({error}); pass a JPEG or PNG file of "
            "this machine"
        ) from error


def read_baseline(path: Path) -> dict[str, Any]:
    """Read an earlier JSON report."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or "sections" not in content:
            raise ValueError("it is not a report of this program")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--baseline {path} cannot be used: {error}; name a file written by --json"
        ) from error
    return content
