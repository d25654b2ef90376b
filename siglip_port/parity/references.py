"""The implementation that the port is compared with. The only module that imports `transformers`."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self

import torch
import transformers
from torch import Tensor
from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

from siglip_port.config import SigLipVisionConfig
from siglip_port.parity.weights import randomise

Attention = Literal["sdpa", "eager"]

VERSION: str = transformers.__version__


class BrokenReferenceError(RuntimeError):
    """The reference cannot be loaded as it must be: nothing can be compared with it."""


class Reference:
    """transformers' `SiglipVisionModel`, in `eval()` mode.

    Attributes:
        model: the module.
    """

    def __init__(self, model: Any) -> None:  # noqa: ANN401 (transformers is untyped here)
        self.model = model

    @property
    def attention(self) -> str:
        """Its implementation of attention, by name."""
        return str(self.model.config._attn_implementation)

    @property
    def is_exact(self) -> bool:
        """Whether it computes in float64 throughout. Its eager attention does not: it has a float32 softmax."""
        return bool(self.model.dtype == torch.float64 and self.attention == "sdpa")

    def outputs(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Returns `tokens` [B, N, D] and, where it has a head, `pooled` [B, D]."""
        with torch.inference_mode():
            output = self.model(pixel_values)
        points = {"tokens": output.last_hidden_state, "pooled": output.pooler_output}
        return {point: tensor for point, tensor in points.items() if tensor is not None}

    def to_float64(self) -> Self:
        """Turns it into the exact one, in place: its own parameters, computed with in float64."""
        self.model.double().set_attn_implementation("sdpa")
        return self


def hf_config(config: SigLipVisionConfig) -> SiglipVisionConfig:
    """Returns the reference's configuration of the same architecture."""
    return SiglipVisionConfig(**{k: v for k, v in config.to_hf().items() if k not in ("architectures", "model_type")})


def write_random_checkpoint(folder: Path, config: SigLipVisionConfig, seed: int = 1234) -> None:
    """Has the reference write a checkpoint of this architecture, with random weights on which mistakes are loud."""
    with _quiet():
        model = SiglipVisionModel(hf_config(config))
        randomise(model, seed)
        model.save_pretrained(folder)


def load(
    source: str | Path,
    *,
    pooling_head: bool,
    dtype: torch.dtype,
    attention: Attention,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    local_files_only: bool = False,
) -> Reference:
    """Loads the reference, in `eval()` mode, and makes sure that it really is loaded.

    Args:
        source: a Hub id, a folder, or a `.safetensors` file with its `config.json` beside it.
        pooling_head: whether the checkpoint has one. The reference believes its `config.json` instead, and would
            make up a random one.
        dtype: of the parameters.
        attention: the reference's implementation of attention in the blocks.
        device: where to.
        revision: the commit of a Hub repository.
        local_files_only: use the Hub's cache only.

    Raises:
        BrokenReferenceError: transformers left parameters at random values.
        OSError: transformers cannot find or read the checkpoint.
    """
    with _quiet(), _as_folder(source) as folder:
        where = {"revision": revision, "local_files_only": local_files_only}
        config = SiglipVisionConfig.from_pretrained(folder, **where)
        config.vision_use_head = pooling_head
        for name in ("image_size", "patch_size"):  # Its configuration may hold pairs, but its model divides numbers.
            if isinstance(size := getattr(config, name), (list, tuple)):
                setattr(config, name, size[0])
        model, info = SiglipVisionModel.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            output_loading_info=True,
            **where,
        )
    if random := sorted(info["missing_keys"]) + sorted(info["mismatched_keys"]):
        raise BrokenReferenceError(
            f"transformers {VERSION} left {len(random)} parameters of {source} at random values, "
            f"beginning with {random[0]}: there is nothing to compare with"
        )
    return Reference(model.to(device).eval())


def preprocess(
    image: object,
    image_size: int,
    source: str | Path | None = None,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Tensor:
    """Turns a PIL picture into `pixel_values` [1, 3, S, S], float32, with the reference's own image processor (PIL).

    Args:
        image: a `PIL.Image.Image`.
        image_size: S.
        source: a checkpoint, for its `preprocessor_config.json`; None, or one without, for the defaults (bicubic).
        revision: the commit of a Hub repository.
        local_files_only: use the Hub's cache only.
    """
    size = {"height": image_size, "width": image_size}
    with _quiet():
        processor = SiglipImageProcessorPil(size=size)
        if source is not None:
            folder = Path(source).parent if Path(source).is_file() else source
            with contextlib.suppress(OSError):  # A checkpoint may come without one.
                processor = SiglipImageProcessorPil.from_pretrained(
                    folder, size=size, revision=revision, local_files_only=local_files_only
                )
        pixel_values: Tensor = processor(images=image, return_tensors="pt")["pixel_values"]
    return pixel_values


@contextlib.contextmanager
def _as_folder(source: str | Path) -> Iterator[str | Path]:
    """Shows a `.safetensors` file of any name to transformers as the folder that it wants."""
    path = Path(source).expanduser()
    if not path.is_file():
        yield path if path.is_dir() else source
        return
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "model.safetensors").symlink_to(path.resolve())
        Path(folder, "config.json").symlink_to((path.parent / "config.json").resolve())
        yield folder


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' bars and tables of keys off the terminal; what they warn of is checked in `load`."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
