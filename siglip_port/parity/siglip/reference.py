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

# transformers is untyped here: these say what is meant.
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
"""The port's fields -> the reference's.

Not the port's own table: what that one gets wrong must be seen here.
"""

PROCESSORS: dict[Backend, HFClass] = {
    "pil": SiglipImageProcessorPil,
    "torchvision": SiglipImageProcessor,
}
NAFLEX_PROCESSORS: dict[Backend, HFClass] = {
    "pil": Siglip2ImageProcessorPil,
    "torchvision": Siglip2ImageProcessor,
}


BILINEAR = 2  # of Pillow


class BrokenReferenceError(RuntimeError):
    """The reference cannot be loaded as it must be: nothing can be compared with it."""


class Reference:
    """transformers' `SiglipVisionModel`, or its `Siglip2VisionModel` for NaFlex, in `eval()` mode.

    Attributes:
        model: the module.
        attentions: its implementations of attention; the first computes in float64 where asked to.
            The softmax of the eager one is float32 whatever the dtype.
    """

    attentions: tuple[Attention, ...] = ("sdpa", "eager")

    def __init__(self, model: HFModel) -> None:
        self.model = model

    def side(self) -> Side:
        """The reference as the gates take it."""
        return Side(self.model, outputs, self.attentions, self.model.set_attn_implementation)

    def config(self) -> dict[str, object]:
        """Its architecture as it says itself, field by field, in the port's names."""
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
    """Whether it is the reference's model for images of any shape."""
    return isinstance(model, Siglip2VisionModel)


def outputs(model: nn.Module, pixel_values: Tensor) -> dict[str, Tensor]:
    """Run the reference on whole images, which NaFlex models take in patches.

    Args:
        model: the reference.
        pixel_values: [B, C, H, W].

    Returns:
        `tokens` [B, N, D] and, with a head, `pooled` [B, D].
    """
    if not isinstance(model, Siglip2VisionModel):
        return name_outputs(model(pixel_values))
    patch = model.config.patch_size
    rows, columns = (side // patch for side in pixel_values.shape[2:])
    whole_patches = pixel_values[..., : rows * patch, : columns * patch]
    patches = torch.stack([convert_image_to_patches(image, patch) for image in whole_patches])
    mask = torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device)
    shapes = torch.tensor([[rows, columns]]).expand(len(patches), 2)
    return name_outputs(model(patches, mask, shapes))


def name_outputs(output: HFOutput) -> dict[str, Tensor]:
    """`tokens` and, with a head, `pooled`, of what the reference returns."""
    tensors = {"tokens": output.last_hidden_state, "pooled": output.pooler_output}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def hf_config(config: SigLipVisionConfig) -> SiglipVisionConfig | Siglip2VisionConfig:
    """Return the reference's configuration of the same architecture."""
    values = config.to_hf()
    values.pop("architectures", None)
    values.pop("model_type", None)
    return config_class(config.naflex)(**values)


def config_class(naflex: bool) -> HFClass:
    """The reference's class of configurations."""
    return Siglip2VisionConfig if naflex else SiglipVisionConfig


def model_class(naflex: bool) -> HFClass:
    """The reference's class of models."""
    return Siglip2VisionModel if naflex else SiglipVisionModel


def write_random_checkpoint(
    folder: Path, config: SigLipVisionConfig, seed: int = 1234, recipe: str = "N1"
) -> None:
    """Have the reference write a checkpoint with random weights on which bugs are loud.

    Args:
        folder: where to.
        config: the architecture.
        seed: of the weights.
        recipe: one of `siglip_port.parity.siglip.recipes.RECIPES`.
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
    local_files_only: bool = False,
) -> Reference:
    """Load the reference, in `eval()` mode, and make sure that it really is loaded.

    Args:
        source: a Hub id, a folder, or a `.safetensors` file with its `config.json` beside it.
        pooling_head: whether the checkpoint has one. The reference believes its `config.json`
            instead, and would make up a random one.
        dtype: of the parameters.
        naflex: whether it is the encoder of SigLIP 2 for images of any shape.
        device: where to.
        revision: the commit of a Hub repository.
        local_files_only: use the Hub's cache only.

    Raises:
        BrokenReferenceError: transformers left parameters at random values.
        OSError: transformers cannot find or read the checkpoint.
    """
    options: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
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
            f"transformers {VERSION} left {len(random_parameters)} parameters of {source} at "
            f"random values, beginning with {random_parameters[0]}: there is nothing to compare "
            "with"
        )
    return Reference(model.to(device).eval())


def make_square(config: HFConfig) -> None:
    """Replace pairs of sides by one: a configuration may hold them, the model divides numbers."""
    for name in ("image_size", "patch_size"):
        size = getattr(config, name, None)
        if isinstance(size, (list, tuple)):
            setattr(config, name, size[0])


def small_reference(
    kind: Literal["naflex", "resized"], folder: Path, seed: int = 1234
) -> tuple[Side, dict[str, Tensor]]:
    """Write a small model that takes images of other shapes, and load the reference of it.

    Args:
        kind: `naflex`, a SigLIP 2 model that takes packed patches; `resized`, one of a fixed size
            that is given another.
        folder: where to.
        seed: of weights and inputs.

    Returns:
        The reference, and what both sides are called with, by name.
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
    """Run the reference on images of another size than its own."""
    return name_outputs(model(**inputs, interpolate_pos_encoding=True))


def packed_inputs(generator: torch.Generator) -> dict[str, Tensor]:
    """Patches of 4 x 4 pixels of two images, one of them with padding."""
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
    local_files_only: bool = False,
) -> dict[Backend, Callable[[Any], dict[str, Tensor]]]:
    """The reference's own image processors.

    For Pillow, and for torchvision where that is installed. Each turns an image into what a model
    takes: of a PIL image, `pixel_values` [1, 3, S, S], float32.

    Args:
        config: of the model, for its size.
        source: a checkpoint, for its `preprocessor_config.json`; None, or one without, for the
            defaults.
        revision: the commit of a Hub repository.
        local_files_only: use the Hub's cache only.
    """
    folder = source
    if source is not None and Path(source).is_file():
        folder = Path(source).parent
    options: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
    if not config.naflex:  # What the file says is for NaFlex models to follow.
        options["size"] = {"height": config.image_size, "width": config.image_size}
    classes = NAFLEX_PROCESSORS if config.naflex else PROCESSORS
    processors: dict[Backend, Callable[[Any], dict[str, Tensor]]] = {}
    for backend, processor_class in classes.items():
        with quiet_transformers():
            try:
                processor = processor_class(**default_options(config, folder))
            except ImportError:
                continue
            if folder is not None:
                with contextlib.suppress(OSError):  # A checkpoint may come without one.
                    processor = processor_class.from_pretrained(folder, **options)
        # As the reference's own pipelines have it; without, it refuses other modes than RGB.
        processor.do_convert_rgb = True
        processors[backend] = functools.partial(process_image, processor)
    return processors


def default_options(config: SigLipVisionConfig, folder: str | Path | None) -> dict[str, Any]:
    """What a processor is made with where no file says more."""
    options: dict[str, Any]
    if config.naflex:
        options = {"patch_size": config.patch_size, "max_num_patches": config.num_patches}
    else:
        options = {"size": {"height": config.image_size, "width": config.image_size}}
    if "siglip2" in Path(folder or "").name.lower():
        # `convert_siglip2_to_hf.py` writes that of all of them.
        options["resample"] = BILINEAR
    return options


def process_image(processor: HFProcessor, image: object) -> dict[str, Tensor]:
    """Turn one image, or one file, into a batch.

    Files are opened as the reference opens them for Pillow. Torchvision's decoders are deprecated.
    """
    if isinstance(image, str):
        image = transformers.image_utils.load_image(image)
    pixels: dict[str, Tensor] = processor(images=image, return_tensors="pt")
    return pixels


@contextlib.contextmanager
def as_folder(source: str | Path) -> Iterator[str | Path]:
    """Show a `.safetensors` file of any name to transformers as the folder that it wants."""
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
    """Keep transformers' bars and tables of keys off the terminal.

    What they warn of is checked in `load`.
    """
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
