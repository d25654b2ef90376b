"""The reference: transformers' SigLIP models and image processors.

The only module of the package that imports `transformers`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from PIL import Image, ImageOps
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
from transformers.models.siglip2.image_processing_siglip2 import (
    convert_image_to_patches,
    pad_along_first_dim,
)

from siglip_port.config import SigLipVisionConfig
from siglip_port.image_processing import Backend
from siglip_port.parity.sides import Side
from siglip_port.parity.siglip.recipes import fill

Attention = Literal["sdpa", "eager"]

# transformers is untyped; the aliases document the expected types.
HFModel = Any
HFConfig = Any
HFClass = Any
HFOutput = Any
HFProcessor = Any

VERSION: str = transformers.__version__

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
"""Field of the port's config -> field of the reference's.

Independent of the port's own table, so that a bug in it is detected.
"""

PROCESSORS: dict[Backend, HFClass] = {
    "pil": SiglipImageProcessorPil,
    "torchvision": SiglipImageProcessor,
}
NAFLEX_PROCESSORS: dict[Backend, HFClass] = {
    "pil": Siglip2ImageProcessorPil,
    "torchvision": Siglip2ImageProcessor,
}


BILINEAR = 2  # Pillow's value


class BrokenReferenceError(RuntimeError):
    """transformers did not load all weights, so there is no reference to compare with."""


class Reference:
    """transformers' `SiglipVisionModel`, or its `Siglip2VisionModel` for NaFlex, in `eval()` mode.

    Attributes:
        model: Module.
        attentions: Attention implementations. The first supports float64 throughout; the softmax of
            `eager` is always float32.
    """

    attentions: tuple[Attention, ...] = ("sdpa", "eager")

    def __init__(self, model: HFModel) -> None:
        self.model = model

    def side(self) -> Side:
        """Return the reference as a side of a comparison."""
        return Side(self.model, outputs, self.attentions, self.model.set_attn_implementation)

    def config(self) -> dict[str, object]:
        """Return the architecture from the reference's config, under the port's field names."""
        config = self.model.config
        fields: dict[str, object] = {}
        for name, reference_name in FIELDS.items():
            if hasattr(config, reference_name):
                fields[name] = getattr(config, reference_name)
        if is_naflex(self.model):
            fields["naflex"] = True
            fields["image_size"] = math.isqrt(config.num_patches) * config.patch_size
        return fields


def is_naflex(model: nn.Module) -> bool:
    """Return whether a model is the reference for NaFlex."""
    return isinstance(model, Siglip2VisionModel)


def outputs(model: nn.Module, pixel_values: Tensor) -> dict[str, Tensor]:
    """Run the reference on whole images, which are cut into patches for NaFlex models.

    Args:
        model: Reference.
        pixel_values: Images, [B, C, H, W].

    Returns:
        `tokens` [B, N, D] and, with a pooling head, `pooled` [B, D].
    """
    if not isinstance(model, Siglip2VisionModel):
        return name_outputs(model(pixel_values))
    return name_outputs(model(**cut_into_patches(pixel_values, model.config.patch_size)))


def cut_into_patches(pixel_values: Tensor, patch: int) -> dict[str, Tensor]:
    """Return the inputs of the reference for NaFlex, from whole images of one size.

    Args:
        pixel_values: Images, [B, C, H, W].
        patch: Patch size in pixels.
    """
    rows, columns = (side // patch for side in pixel_values.shape[2:])
    whole_patches = pixel_values[..., : rows * patch, : columns * patch]
    patches = torch.stack([convert_image_to_patches(image, patch) for image in whole_patches])
    mask = torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device)
    shapes = torch.tensor([[rows, columns]]).expand(len(patches), 2)
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def pack_images(images: Sequence[Tensor], patch: int, count: int) -> dict[str, Tensor]:
    """Cut images into patches and pad them, as the image processor for NaFlex does.

    Args:
        images: Images of any size, [C, H, W].
        patch: Patch size in pixels.
        count: Padded number of patches.
    """
    pixel_values, masks, shapes = [], [], []
    for image in images:
        inputs = cut_into_patches(image[None], patch)
        patches, mask = pad_along_first_dim(inputs["pixel_values"][0], count)
        pixel_values.append(patches)
        masks.append(mask)
        shapes.append(inputs["spatial_shapes"][0])
    return {
        "pixel_values": torch.stack(pixel_values),
        "pixel_attention_mask": torch.stack(masks),
        "spatial_shapes": torch.stack(shapes),
    }


def name_outputs(output: HFOutput) -> dict[str, Tensor]:
    """Return `tokens` and, with a pooling head, `pooled`."""
    tensors = {"tokens": output.last_hidden_state, "pooled": output.pooler_output}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def hf_config(config: SigLipVisionConfig) -> SiglipVisionConfig | Siglip2VisionConfig:
    """Return transformers' config of the same architecture."""
    values = config.to_hf()
    values.pop("architectures", None)
    values.pop("model_type", None)
    return config_class(config.naflex)(**values)


def config_class(naflex: bool) -> HFClass:
    """Return transformers' config class."""
    return Siglip2VisionConfig if naflex else SiglipVisionConfig


def model_class(naflex: bool) -> HFClass:
    """Return transformers' model class."""
    return Siglip2VisionModel if naflex else SiglipVisionModel


def write_random_checkpoint(
    folder: Path, config: SigLipVisionConfig, seed: int = 1234, recipe: str = "N1"
) -> None:
    """Write a checkpoint with stress weights, through transformers.

    Args:
        folder: Output folder.
        config: Architecture.
        seed: Seed of the weights.
        recipe: Name in `siglip_port.parity.siglip.recipes.RECIPES`.
    """
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config.naflex)(hf_config(config))
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
    subfolder: str = "",
    local_files_only: bool = False,
) -> Reference:
    """Load the reference in `eval()` mode, and check that all its weights are loaded.

    Args:
        source: Hub id, folder, or `.safetensors` file with `config.json` next to it.
        pooling_head: Whether the checkpoint has a pooling head. transformers follows `config.json`
            instead and would initialize a missing head randomly.
        dtype: Dtype of the parameters.
        naflex: Whether it is a NaFlex model.
        device: Device of the model.
        revision: Commit of a Hub repository.
        subfolder: Subfolder of a Hub repository; empty for none.
        local_files_only: Whether to use only the Hub's local cache.

    Raises:
        BrokenReferenceError: transformers initialized parameters randomly.
        OSError: transformers cannot find or read the checkpoint.
    """
    options: dict[str, Any] = {
        "revision": revision,
        "subfolder": subfolder,
        "local_files_only": local_files_only,
    }
    with quiet_transformers(), as_folder(source) as folder:
        config = config_class(naflex).from_pretrained(folder, **options)
        config.vision_use_head = pooling_head
        make_square(config)
        model, info = model_class(naflex).from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    random_parameters = sorted(info["missing_keys"]) + sorted(info["mismatched_keys"])
    if random_parameters:
        raise BrokenReferenceError(
            f"{source}: transformers {VERSION} initialized {len(random_parameters)} parameters "
            f"randomly, the first is {random_parameters[0]}; check that the checkpoint is complete"
        )
    return Reference(model.to(device).eval())


def make_square(config: HFConfig) -> None:
    """Replace pairs of sizes with one number; a config may contain pairs, the model needs one."""
    for name in ("image_size", "patch_size"):
        size = getattr(config, name, None)
        if isinstance(size, (list, tuple)):
            setattr(config, name, size[0])


def small_reference(
    kind: Literal["naflex", "resized"], folder: Path, seed: int = 1234
) -> tuple[Side, dict[str, Tensor]]:
    """Write a small model for images of other shapes, and load the reference from it.

    Args:
        kind: `naflex` for a SigLIP 2 model with packed patches; `resized` for a model of fixed size
            with images of another size.
        folder: Output folder.
        seed: Seed of weights and inputs.

    Returns:
        Reference, and inputs for both sides by name.
    """
    naflex = kind == "naflex"
    patch_size = 4 if naflex else 7
    config = SigLipVisionConfig(
        embed_dim=72,
        mlp_hidden_dim=101,
        num_encoder_blocks=2,
        num_attention_heads=4,
        patch_size=patch_size,
        image_size=5 * patch_size,
        pooling_head=True,
        naflex=naflex,
    )
    write_random_checkpoint(folder, config, seed)
    model = load(folder, pooling_head=True, naflex=naflex, dtype=torch.float32).model
    generator = torch.Generator().manual_seed(seed)
    if naflex:
        return Side(model, named_outputs), packed_inputs(generator)
    pixel_values = torch.rand(2, 3, 42, 56, generator=generator) * 2 - 1
    return Side(model, resized_outputs), {"pixel_values": pixel_values}


def named_outputs(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run the reference on named inputs."""
    return name_outputs(model(**inputs))


def resized_outputs(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run the reference on images of another size, with interpolated positions."""
    return name_outputs(model(**inputs, interpolate_pos_encoding=True))


def packed_inputs(generator: torch.Generator) -> dict[str, Tensor]:
    """Return patches of 4 x 4 pixels of two images, one of them with padding."""
    shapes = torch.tensor([[4, 6], [7, 3]])
    mask = torch.arange(28)[None] < shapes.prod(1)[:, None]
    return {
        "pixel_values": torch.rand(2, 28, 48, generator=generator) * 2 - 1,
        "pixel_attention_mask": mask.long(),
        "spatial_shapes": shapes,
    }


def image_processors(
    config: SigLipVisionConfig,
    source: str | Path | None = None,
    *,
    revision: str | None = None,
    subfolder: str = "",
    local_files_only: bool = False,
) -> dict[Backend, Callable[[Any], dict[str, Tensor]]]:
    """Return the reference's image processors: for Pillow and, if installed, torchvision.

    Each returns a batch of one image; for fixed sizes, `pixel_values` [1, 3, S, S], float32.

    Args:
        config: Configuration of the model, for its image size.
        source: Checkpoint with a `preprocessor_config.json`; None or a checkpoint without one for
            the defaults.
        revision: Commit of a Hub repository.
        subfolder: Subfolder of a Hub repository; empty for none.
        local_files_only: Whether to use only the Hub's local cache.
    """
    folder = source
    if source is not None and Path(source).is_file():
        folder = Path(source).parent
    options: dict[str, Any] = {
        "revision": revision,
        "subfolder": subfolder,
        "local_files_only": local_files_only,
    }
    if not config.naflex:  # NaFlex models take the size from the file.
        options["size"] = {"height": config.image_size, "width": config.image_size}
    classes = NAFLEX_PROCESSORS if config.naflex else PROCESSORS
    processors: dict[Backend, Callable[[Any], dict[str, Tensor]]] = {}
    for backend, processor_class in classes.items():
        with quiet_transformers():
            try:
                processor = processor_class(**default_options(config, folder))
            except ImportError:
                continue
            for candidate in processor_folders(folder):
                with contextlib.suppress(OSError):  # No preprocessor_config.json.
                    processor = processor_class.from_pretrained(candidate, **options)
                    break
        # As in transformers' pipelines; without it, modes other than RGB are rejected.
        processor.do_convert_rgb = True
        processors[backend] = functools.partial(process_image, processor)
    return processors


def processor_folders(source: str | Path | None) -> list[str | Path]:
    """Return where a checkpoint's processor may be: diffusers stores it beside the encoder."""
    if source is None:
        return []
    if not Path(source).is_dir():
        return [source]
    parent = Path(source).absolute().parent
    return [source, parent / "feature_extractor", parent / "image_processor"]


def is_siglip2(source: str | Path | None) -> bool:
    """Return whether a checkpoint is of SigLIP 2: by its Hub id, or by its vocabulary."""
    if source is None:
        return False
    config = Path(source) / "config.json"
    if not config.is_file():
        return not Path(source).exists() and "siglip2" in Path(source).name.lower()
    text_config = json.loads(config.read_text(encoding="utf-8-sig")).get("text_config") or {}
    return bool(text_config.get("vocab_size") == 256_000)


def default_options(config: SigLipVisionConfig, folder: str | Path | None) -> dict[str, Any]:
    """Return the options of a processor without a file."""
    options: dict[str, Any]
    if config.naflex:
        options = {"patch_size": config.patch_size, "max_num_patches": config.num_patches}
    else:
        options = {"size": {"height": config.image_size, "width": config.image_size}}
    if is_siglip2(folder):
        # `convert_siglip2_to_hf.py` writes this for all of them.
        options["resample"] = BILINEAR
    return options


def process_image(processor: HFProcessor, image: object) -> dict[str, Tensor]:
    """Process an image, an image file or its bytes into a batch of one; a list into a batch.

    Files are decoded with Pillow; torchvision's decoders are deprecated.
    """
    if isinstance(image, str):
        image = transformers.image_utils.load_image(image)
    if isinstance(image, bytes):
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(image)))
    pixels: dict[str, Tensor] = processor(images=image, return_tensors="pt")
    return pixels


@contextlib.contextmanager
def as_folder(source: str | Path) -> Iterator[str | Path]:
    """Yield a folder that transformers can load, for a `.safetensors` file of any name."""
    path = Path(source).expanduser()
    if not path.is_file():
        yield path if path.is_dir() else source
        return
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "model.safetensors").symlink_to(path.resolve())
        Path(folder, "config.json").symlink_to((path.parent / "config.json").resolve())
        yield folder


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppress transformers' progress bars and warnings about keys, which `load` checks."""
    logging = transformers.utils.logging
    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
