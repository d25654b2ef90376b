"""The implementation that the port is compared with.

The only module that imports `transformers`.
"""

from __future__ import annotations

import contextlib
import functools
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    Siglip2ImageProcessor,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipImageProcessor,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

from siglip_port.config import SigLipVisionConfig
from siglip_port.image_processing import Backend
from siglip_port.parity.sides import Side
from siglip_port.parity.siglip.recipes import fill

Attention = Literal["sdpa", "eager"]

VERSION: str = transformers.__version__

_PROCESSORS: dict[bool, dict[Backend, Any]] = {  # of NaFlex towers, or not
    False: {"pil": SiglipImageProcessorPil, "torchvision": SiglipImageProcessor},
    True: {"pil": Siglip2ImageProcessorPil, "torchvision": Siglip2ImageProcessor},
}


class BrokenReferenceError(RuntimeError):
    """The reference cannot be loaded as it must be: nothing can be compared with it."""


class Reference:
    """transformers' `SiglipVisionModel`, or `Siglip2VisionModel` for NaFlex towers, in `eval()` mode.

    Attributes:
        model: the module.
        attentions: its implementations of attention; the first computes in float64 where asked to.
            The softmax of the eager one is float32 whatever the dtype.
    """

    attentions: tuple[Attention, ...] = ("sdpa", "eager")

    def __init__(self, model: Any) -> None:  # noqa: ANN401 (transformers is untyped here)
        self.model = model

    def side(self) -> Side:
        """The reference as the gates take it."""
        return Side(self.model, outputs, self.attentions, self.model.set_attn_implementation)

    def config(self) -> dict[str, object]:
        """Its architecture as it says itself, field by field, in the port's names."""
        theirs = self.model.config
        told = {
            ours: getattr(theirs, name) for ours, name in FIELDS.items() if hasattr(theirs, name)
        }
        if isinstance(self.model, Siglip2VisionModel):
            told |= {
                "naflex": True,
                "image_size": math.isqrt(theirs.num_patches) * theirs.patch_size,
            }
        return told


# Not `config.py`'s own table: what that one gets wrong must be seen here.
FIELDS = {
    "num_channels": "num_channels",
    "embed_dim": "hidden_size",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "num_attention_heads": "num_attention_heads",
    "attention_dropout": "attention_dropout",
    "num_encoder_blocks": "num_hidden_layers",
    "mlp_hidden_dim": "intermediate_size",
    "layer_norm_eps": "layer_norm_eps",
    "hidden_act": "hidden_act",
    "pooling_head": "vision_use_head",
}


def outputs(model: nn.Module, pixel_values: Tensor) -> dict[str, Tensor]:
    """`tokens` [B, N, D] and, with a head, `pooled` [B, D].

    Of pictures, which NaFlex towers take in patches.
    """
    if not isinstance(model, Siglip2VisionModel):
        return _outputs_of(model(pixel_values))
    patch = model.config.patch_size
    shape = torch.tensor([side // patch for side in pixel_values.shape[2:]])
    whole = pixel_values[..., : shape[0] * patch, : shape[1] * patch]
    patches = torch.stack([convert_image_to_patches(picture, patch) for picture in whole])
    mask = torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device)
    return _outputs_of(model(patches, mask, shape.expand(len(patches), 2)))


def _outputs_of(output: Any) -> dict[str, Tensor]:  # noqa: ANN401
    points = {"tokens": output.last_hidden_state, "pooled": output.pooler_output}
    return {point: tensor for point, tensor in points.items() if tensor is not None}


def is_naflex(model: nn.Module) -> bool:
    """Whether it is the reference's tower for pictures of any shape."""
    return isinstance(model, Siglip2VisionModel)


def hf_config(config: SigLipVisionConfig) -> SiglipVisionConfig | Siglip2VisionConfig:
    """Returns the reference's configuration of the same architecture."""
    values = {k: v for k, v in config.to_hf().items() if k not in ("architectures", "model_type")}
    return Siglip2VisionConfig(**values) if config.naflex else SiglipVisionConfig(**values)


def write_random_checkpoint(
    folder: Path, config: SigLipVisionConfig, seed: int = 1234, recipe: str = "N1"
) -> None:
    """Has the reference write a checkpoint of this architecture, with random weights on which mistakes are loud.

    Args:
        folder: where to.
        config: the architecture.
        seed: of the weights.
        recipe: one of `siglip_port.parity.siglip.recipes.RECIPES`.
    """
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (Siglip2VisionModel if config.naflex else SiglipVisionModel)(hf_config(config))
        fill(model, recipe, seed)
        model.save_pretrained(folder)


def load(
    source: str | Path,
    *,
    pooling_head: bool,
    dtype: torch.dtype,
    naflex: bool = False,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    local_files_only: bool = False,
) -> Reference:
    """Loads the reference, in `eval()` mode, and makes sure that it really is loaded.

    Args:
        source: a Hub id, a folder, or a `.safetensors` file with its `config.json` beside it.
        pooling_head: whether the checkpoint has one. The reference believes its `config.json`
            instead, and would make up a random one.
        dtype: of the parameters.
        naflex: whether it is the tower of SigLIP 2 for pictures of any shape.
        device: where to.
        revision: the commit of a Hub repository.
        local_files_only: use the Hub's cache only.

    Raises:
        BrokenReferenceError: transformers left parameters at random values.
        OSError: transformers cannot find or read the checkpoint.
    """
    with _quiet(), _as_folder(source) as folder:
        where = {"revision": revision, "local_files_only": local_files_only}
        config = (Siglip2VisionConfig if naflex else SiglipVisionConfig).from_pretrained(
            folder, **where
        )
        config.vision_use_head = pooling_head
        for name in (
            "image_size",
            "patch_size",
        ):  # Its configuration may hold pairs, but its model divides numbers.
            if isinstance(size := getattr(config, name, None), (list, tuple)):
                setattr(config, name, size[0])
        model, info = (Siglip2VisionModel if naflex else SiglipVisionModel).from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation="sdpa",
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


def small_tower(
    kind: Literal["naflex", "resized"], folder: Path, seed: int = 1234
) -> tuple[Side, dict[str, Any]]:
    """Writes a small tower for pictures of other shapes, and gives the reference's side of it.

    Args:
        kind: `naflex`, a SigLIP 2 tower that takes packed patches; `resized`, the fixed one at
            another size.
        folder: where to.
        seed: of weights and inputs.

    Returns:
        The reference, and what both sides are called with.
    """
    sizes = {
        "embed_dim": 72,
        "mlp_hidden_dim": 101,
        "num_encoder_blocks": 2,
        "num_attention_heads": 4,
    }
    patch, naflex = (4, True) if kind == "naflex" else (7, False)
    config = SigLipVisionConfig(
        **sizes,  # type: ignore[arg-type]
        patch_size=patch,
        image_size=5 * patch,
        pooling_head=True,
        naflex=naflex,
    )
    write_random_checkpoint(folder, config, seed)
    reference = load(folder, pooling_head=True, naflex=naflex, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    if kind == "resized":

        def resizing(model: nn.Module, inputs: Any) -> dict[str, Tensor]:  # noqa: ANN401
            return _outputs_of(model(**inputs, interpolate_pos_encoding=True))

        pixels = torch.rand(2, 3, 42, 56, generator=generator) * 2 - 1
        return Side(reference.model, resizing), {"pixel_values": pixels}
    shapes = torch.tensor([[4, 6], [7, 3]])
    mask = torch.arange(28)[None] < shapes.prod(1)[:, None]
    patches = torch.rand(2, 28, 48, generator=generator) * 2 - 1
    inputs = {
        "pixel_values": patches,
        "pixel_attention_mask": mask.long(),
        "spatial_shapes": shapes,
    }
    return Side(reference.model, lambda model, given: _outputs_of(model(**given))), inputs


def processors(
    config: SigLipVisionConfig,
    source: str | Path | None = None,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
) -> dict[Backend, Callable[[Any], dict[str, Tensor]]]:
    """The reference's own image processors.

    For Pillow, and for torchvision where that is installed.

    Each turns a picture into what a tower takes: of a PIL picture, `pixel_values` [1, 3, S, S],
    float32.

    Args:
        config: of the tower, for its size.
        source: a checkpoint, for its `preprocessor_config.json`; None, or one without, for the
            defaults.
        revision: the commit of a Hub repository.
        local_files_only: use the Hub's cache only.
    """
    size: dict[str, Any] = {"size": {"height": config.image_size, "width": config.image_size}}
    default = dict(size)
    if config.naflex:
        size = {}  # what the file says is for these towers to follow
        default = {"patch_size": config.patch_size, "max_num_patches": config.num_patches}
    folder = Path(source).parent if source is not None and Path(source).is_file() else source
    if "siglip2" in Path(folder or "").name.lower():
        default["resample"] = (
            2  # where no file tells: `convert_siglip2_to_hf.py` writes that of all of them
        )
    made: dict[Backend, Callable[[Any], dict[str, Tensor]]] = {}
    for backend, kind in _PROCESSORS[config.naflex].items():
        with _quiet():
            try:
                processor = kind(**default)
            except ImportError:
                continue
            if folder is not None:
                with contextlib.suppress(OSError):  # A checkpoint may come without one.
                    how = {"revision": revision, "local_files_only": local_files_only}
                    processor = kind.from_pretrained(folder, **size, **how)
            processor.do_convert_rgb = (
                True  # as the reference's own pipelines have it; without, it refuses the others
            )
        made[backend] = functools.partial(_pixels_of, processor)
    return made


def _pixels_of(processor: Any, picture: Any) -> dict[str, Tensor]:  # noqa: ANN401
    """Files are opened as the reference opens them for Pillow.

    Torchvision's decoders are deprecated.
    """
    if isinstance(picture, str):
        picture = transformers.image_utils.load_image(picture)
    made: dict[str, Tensor] = processor(images=picture, return_tensors="pt")
    return made


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
    """Keeps transformers' bars and tables of keys off the terminal.

    What they warn of is checked in `load`.
    """
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
