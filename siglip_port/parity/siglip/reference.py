"""The reference: transformers' SigLIP models and image processors.

The only module of the package that imports `transformers`, and only when a function needs it: the
process of the port names these functions, and that of the reference runs them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import math
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from siglip_port.parity import gates
from siglip_port.parity.results import GateResult
from siglip_port.parity.sides import ReferenceHost, Result, Side
from siglip_port.parity.sides import cast as cast_module
from siglip_port.parity.siglip.recipes import fill

if TYPE_CHECKING:  # the process of the reference imports no code of the port
    from siglip_port.config import SigLipVisionConfig
    from siglip_port.image_processing import Backend

Attention = Literal["sdpa", "eager"]

# transformers is untyped; the aliases document the expected types.
HFModel = Any
HFConfig = Any
HFClass = Any
HFOutput = Any
HFProcessor = Any

MINIMUM_RELEASE = (5, 23)
"""First release of transformers that the comparison supports, as in the extra `parity`."""

INSTALL = "pip install 'siglip-port[parity]'"


class UnsupportedReleaseError(RuntimeError):
    """transformers is missing, or of a release that the comparison does not support."""


def installed_release() -> str:
    """Return the installed release of transformers; empty without one."""
    try:
        return version("transformers")
    except PackageNotFoundError:
        return ""


VERSION = installed_release()

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

PROCESSORS: dict[Backend, str] = {
    "pil": "SiglipImageProcessorPil",
    "torchvision": "SiglipImageProcessor",
}
NAFLEX_PROCESSORS: dict[Backend, str] = {
    "pil": "models.siglip2.image_processing_pil_siglip2.Siglip2ImageProcessorPil",
    "torchvision": "Siglip2ImageProcessor",
}
"""Classes of transformers, by backend."""


BILINEAR = 2  # Pillow's value


class BrokenReferenceError(RuntimeError):
    """transformers did not load all weights, so there is no reference to compare with."""


@functools.cache
def import_transformers() -> Any:  # noqa: ANN401 (an untyped module)
    """Import transformers, once.

    Raises:
        UnsupportedReleaseError: It cannot be imported, or is too old.
    """
    check_release(VERSION)
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise UnsupportedReleaseError(
            f"transformers cannot be imported ({error}); run: {INSTALL}"
        ) from error


def preload() -> None:
    """Import the modules of transformers that a comparison needs, which takes seconds."""
    for naflex in (False, True):
        config_class(naflex)
        model_class(naflex)
    for class_name in (*PROCESSORS.values(), *NAFLEX_PROCESSORS.values()):
        library_object(class_name)


def check_release(release: str) -> None:
    """Raise UnsupportedReleaseError if a release of transformers is too old.

    Args:
        release: Installed release; empty if it is not known.
    """
    numbers = release_numbers(release)
    if numbers and numbers < MINIMUM_RELEASE:
        raise UnsupportedReleaseError(
            f"the comparison needs transformers {required_release()} or newer, got {release}; "
            f"run: {INSTALL}"
        )


def required_release() -> str:
    """Return `MINIMUM_RELEASE` as text."""
    return ".".join(map(str, MINIMUM_RELEASE))


def library_object(path: str) -> Any:  # noqa: ANN401 (a class or function)
    """Return a class or function of transformers.

    Args:
        path: Its name, or modules and name, separated by dots.

    Raises:
        UnsupportedReleaseError: The installed release does not have it.
    """
    library = import_transformers()
    module_name, _, name = f"transformers.{path}".rpartition(".")
    try:
        module = library if module_name == "transformers" else importlib.import_module(module_name)
        return getattr(module, name)
    except (ImportError, AttributeError) as error:
        raise UnsupportedReleaseError(
            f"transformers {library.__version__} has no {name}, expected that of release "
            f"{required_release()}; run: {INSTALL}"
        ) from error


def fields_of(config: SigLipVisionConfig) -> SigLipVisionConfig:
    """Copy the fields of a config, without the port's class, for the process of the reference."""
    return cast("SigLipVisionConfig", SimpleNamespace(**vars(config)))


class ReferenceHandle(ABC):
    """A loaded reference, in this process or in another one."""

    @abstractmethod
    def side(self) -> ReferenceHost:
        """Return the place of the reference, where functions get it as a `Side`."""

    def compute(self, function: Callable[..., Result], *arguments: object) -> Result:
        """Return `function(side, *arguments)`, computed where the reference is."""
        return self.side().compute(function, *arguments)

    def config(self) -> dict[str, object]:
        """Return the architecture from the reference's config, under the port's field names."""
        return self.compute(config_of)

    def hf_config(self) -> dict[str, Any]:
        """Return the reference's config."""
        return self.compute(hf_config_of)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the reference's tensors."""
        return self.compute(tensors_of)

    def module_types(self) -> dict[str, type[nn.Module]]:
        """Return all modules by name: `nn.MultiheadAttention`, or `nn.Module` for all others."""
        return self.compute(module_types_of)

    def check_environment(self) -> GateResult:
        """Run the gate `environment` where the reference is."""
        return self.compute(environment_of)


class Reference(ReferenceHandle):
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
        set_attention = self.model.set_attn_implementation
        return Side(self.model, outputs, self.attentions, set_attention, find_defined=find_defined)


def config_of(reference: Side) -> dict[str, object]:
    """Return the architecture from a reference's config, under the port's field names."""
    config: HFConfig = reference.module.config
    fields: dict[str, object] = {}
    for name, reference_name in FIELDS.items():
        if hasattr(config, reference_name):
            fields[name] = getattr(config, reference_name)
    if is_naflex(reference.module):
        fields["naflex"] = True
        fields["image_size"] = math.isqrt(config.num_patches) * config.patch_size
    return fields


def hf_config_of(reference: Side) -> dict[str, Any]:
    """Return a reference's config."""
    config: HFConfig = reference.module.config
    contents: dict[str, Any] = config.to_dict()
    return contents


def tensors_of(reference: Side) -> dict[str, Tensor]:
    """Return a reference's tensors."""
    return dict(reference.module.state_dict())


def rounded_tensors_of(reference: Side, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return a reference's tensors, rounded to a dtype."""
    with cast_module(reference.module, dtype):
        return {name: tensor.clone() for name, tensor in reference.module.state_dict().items()}


def save_checkpoint(reference: Side, folder: Path, dtype: torch.dtype) -> None:
    """Write a reference's weights as a checkpoint of the vision encoder alone."""
    model: HFModel = reference.module
    with cast_module(model, dtype):
        model.save_pretrained(folder)


def module_types_of(reference: Side) -> dict[str, type[nn.Module]]:
    """Return a reference's modules by name: `nn.MultiheadAttention`, or `nn.Module`."""
    types: dict[str, type[nn.Module]] = {}
    for name, module in reference.module.named_modules():
        is_attention = isinstance(module, nn.MultiheadAttention)
        types[name] = nn.MultiheadAttention if is_attention else nn.Module
    return types


def environment_of(reference: Side) -> GateResult:
    """Run the gate `environment` on a reference."""
    return gates.check_environment({"reference": reference.module})


def is_naflex(model: nn.Module) -> bool:
    """Return whether a model is the reference for NaFlex."""
    return isinstance(model, library_object("Siglip2VisionModel"))


def outputs(model: HFModel, inputs: Tensor | Mapping[str, Any]) -> dict[str, Tensor]:
    """Run the reference on images or packed patches.

    Args:
        model: Reference.
        inputs: Images [B, C, H, W], which are cut into patches for NaFlex models, and for which
            others interpolate positions if the size is not their own; or packed patches by
            argument, for which the mask may be missing.

    Returns:
        `tokens` [B, N, D], 0 at padding, and, with a pooling head, `pooled` [B, D].
    """
    if is_naflex(model):
        if isinstance(inputs, Tensor):
            inputs = pack_images(inputs, model.config.patch_size)
        return packed_outputs(model, inputs)
    assert isinstance(inputs, Tensor)
    own_size = (model.config.image_size, model.config.image_size)
    is_resized = tuple(inputs.shape[2:]) != own_size
    return name_outputs(model(inputs, interpolate_pos_encoding=is_resized))


def packed_outputs(model: HFModel, packed: Mapping[str, Any]) -> dict[str, Tensor]:
    """Run the reference for NaFlex on packed patches."""
    patches = packed["pixel_values"]
    defined = patch_positions(packed)
    shapes = torch.as_tensor(packed["spatial_shapes"], device=patches.device)
    named = name_outputs(model(patches, defined.long(), shapes))
    return {**named, "tokens": hide_padding(named["tokens"], defined)}


def pack_images(images: Tensor, patch_size: int) -> dict[str, Tensor]:
    """Cut images [B, C, H, W] of one size into patches; pixels beyond whole patches are dropped."""
    rows, columns = (side // patch_size for side in images.shape[2:])
    whole_patches = images[..., : rows * patch_size, : columns * patch_size]
    to_patches = library_object("models.siglip2.image_processing_siglip2.convert_image_to_patches")
    patches = [to_patches(image, patch_size) for image in whole_patches]
    shapes = torch.tensor([[rows, columns]]).expand(len(patches), 2)
    return {"pixel_values": torch.stack(patches), "spatial_shapes": shapes}


def find_defined(inputs: Tensor | Mapping[str, Any]) -> Tensor | None:
    """Return the positions [B, N] of packed patches that are not padding; None for images."""
    if isinstance(inputs, Tensor):
        return None
    return patch_positions(inputs)


def patch_positions(packed: Mapping[str, Any]) -> Tensor:
    """Return the positions [B, N] that are not padding: by the mask, or else by the shapes."""
    mask: Tensor | None = packed.get("pixel_attention_mask")
    if mask is not None:
        return mask.bool()
    patches = packed["pixel_values"]
    shapes = torch.as_tensor(packed["spatial_shapes"], device=patches.device)
    indices = torch.arange(patches.shape[1], device=patches.device)
    return indices < shapes.prod(1, keepdim=True)


def hide_padding(tokens: Tensor, defined: Tensor | None) -> Tensor:
    """Set tokens [B, N, D] to 0 at padding, where they are undefined."""
    if defined is None or tokens.shape[:2] != defined.shape:
        return tokens
    return tokens.masked_fill(~defined[..., None], 0.0)


def name_outputs(output: HFOutput) -> dict[str, Tensor]:
    """Return `tokens` and, with a pooling head, `pooled`."""
    tensors = {"tokens": output.last_hidden_state, "pooled": output.pooler_output}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def hf_config(config: SigLipVisionConfig) -> HFConfig:
    """Return transformers' config of the same architecture."""
    values = {key: getattr(config, field) for field, key in FIELDS.items()}
    if config.naflex:
        values["num_patches"] = num_patches(config)
        del values["image_size"]
    if config.mean_pooling:
        values["mean_pooling"] = True
    return config_class(config.naflex)(**values)


def parse_config(contents: Mapping[str, Any]) -> HFConfig | None:
    """Return transformers' config of the vision encoder in a `config.json`, read without the port.

    None if it is not of transformers' SigLIP models, such as one of an open_clip repository.
    """
    values = contents.get("vision_config") or contents
    kind = str(values.get("model_type") or contents.get("model_type"))
    if not kind.startswith("siglip"):
        return None
    return config_class(kind.startswith("siglip2")).from_dict(dict(values))


def num_patches(config: SigLipVisionConfig) -> int:
    """Return the number of positions of a square image."""
    return (config.image_size // config.patch_size) ** 2


def config_class(naflex: bool) -> HFClass:
    """Return transformers' config class."""
    return library_object("Siglip2VisionConfig" if naflex else "SiglipVisionConfig")


def model_class(naflex: bool) -> HFClass:
    """Return transformers' model class."""
    return library_object("Siglip2VisionModel" if naflex else "SiglipVisionModel")


def write_random_checkpoint(
    folder: Path,
    config: SigLipVisionConfig,
    seed: int = 1234,
    recipe: str = "N1",
    contents: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint with stress weights, through transformers.

    Args:
        folder: Output folder.
        config: Architecture.
        seed: Seed of the weights.
        recipe: Name in `siglip_port.parity.siglip.recipes.RECIPES`.
        contents: `config.json` that the port read `config` from, for transformers to read.
    """
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        own_config = parse_config(contents) if contents is not None else None
        if own_config is None:
            own_config = hf_config(config)
        model = model_class(own_config.model_type.startswith("siglip2"))(own_config)
        fill(model, recipe, seed)
        model.save_pretrained(folder)


def load(
    source: str | Path,
    *,
    pooling_head: bool | None = None,
    dtype: torch.dtype,
    naflex: bool = False,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    subfolder: str = "",
    cache_dir: str | None = None,
) -> Reference:
    """Load the reference in `eval()` mode, and check that all its weights are loaded.

    Args:
        source: Hub id, folder, or `.safetensors` file with `config.json` next to it.
        pooling_head: Whether to load the pooling head; None to load it if the checkpoint has one.
            transformers follows `config.json` instead and would initialize a missing head randomly.
        dtype: Dtype of the parameters.
        naflex: Whether it is a NaFlex model.
        device: Device of the model.
        revision: Commit of a Hub repository.
        subfolder: Subfolder of a Hub repository; empty for none.
        cache_dir: The Hub's local cache, to read `source` from; None to download it.

    Raises:
        BrokenReferenceError: transformers initialized parameters randomly, or cannot load a
            checkpoint of a newer release.
        UnsupportedReleaseError: transformers is missing or too old.
        OSError: transformers cannot find or read the checkpoint.
    """
    options: dict[str, Any] = {
        "revision": revision,
        "subfolder": subfolder,
        "cache_dir": cache_dir,
        "local_files_only": cache_dir is not None,
    }
    with quiet_transformers(), as_folder(source) as folder:
        newer = newer_release(config_class(naflex), folder, options)
        try:
            model, info = read_model(folder, naflex, dtype, pooling_head is not False, options)
            if pooling_head is None and lacks_head(model, info):
                model, info = read_model(folder, naflex, dtype, False, options)
        except Exception as error:  # whatever a file of another release causes
            if not newer:
                raise
            reason = " ".join(str(error).split())
            raise BrokenReferenceError(
                f"{source}: transformers {VERSION} cannot load it ({reason}); {newer}"
            ) from error
    random_parameters = sorted(info["missing_keys"]) + sorted(info["mismatched_keys"])
    if random_parameters:
        raise BrokenReferenceError(
            f"{source}: transformers {VERSION} initialized {len(random_parameters)} parameters "
            f"randomly, the first is {random_parameters[0]}; "
            f"{newer or 'check that the checkpoint is complete'}"
        )
    return Reference(model.to(device).eval())


def read_model(
    folder: str | Path, naflex: bool, dtype: torch.dtype, with_head: bool, options: dict[str, Any]
) -> tuple[HFModel, dict[str, Any]]:
    """Read a model through transformers; return it, and what its loading reports."""
    config = config_class(naflex).from_pretrained(folder, **options)
    config.vision_use_head = with_head
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
    return model, info


def lacks_head(model: nn.Module, info: Mapping[str, Any]) -> bool:
    """Return whether the checkpoint has no tensor of the pooling head."""
    names = {name for name, _ in model.named_parameters() if name.startswith("head.")}
    return names <= set(info["missing_keys"])


def load_side(source: str | Path, **options: Any) -> Side:  # noqa: ANN401 (those of `load`)
    """Load the reference as a side of a comparison: see `load`."""
    return load(source, **options).side()


def newer_release(config: HFClass, folder: str | Path, options: dict[str, Any]) -> str:
    """Return the advice for a checkpoint of a newer release than the installed one; empty if not.

    Args:
        config: transformers' config class.
        folder: Hub id or folder of the checkpoint.
        options: Options of `from_pretrained`.
    """
    contents, _ = config.get_config_dict(folder, **options)
    release = str(contents.get("transformers_version") or "")
    if release_numbers(release) <= release_numbers(VERSION):
        return ""
    needed = ".".join(map(str, release_numbers(release)))
    return (
        f"its config.json is of transformers {release}; run: pip install 'transformers>={needed}'"
    )


def release_numbers(release: str) -> tuple[int, ...]:
    """Return the first three numbers of a release: (5, 23, 0) for `5.23.0.dev0`."""
    match = re.match(r"(\d+)(?:\.(\d+))?(?:\.(\d+))?", release)
    return tuple(int(number or 0) for number in match.groups()) if match else ()


def make_square(config: HFConfig) -> None:
    """Replace pairs of sizes with one number; a config may contain pairs, the model needs one."""
    for name in ("image_size", "patch_size"):
        size = getattr(config, name, None)
        if isinstance(size, (list, tuple)):
            setattr(config, name, size[0])


def image_processors(
    config: SigLipVisionConfig,
    source: str | Path | None = None,
    *,
    revision: str | None = None,
    subfolder: str = "",
    cache_dir: str | None = None,
) -> dict[Backend, Callable[[Any], dict[str, Tensor]]]:
    """Return the reference's image processors: for Pillow and, if installed, torchvision.

    Each returns a batch of one image; for fixed sizes, `pixel_values` [1, 3, S, S], float32.

    Args:
        config: Configuration of the model, for its image size.
        source: Checkpoint with a `preprocessor_config.json`; None or a checkpoint without one for
            the defaults.
        revision: Commit of a Hub repository.
        subfolder: Subfolder of a Hub repository; empty for none.
        cache_dir: The Hub's local cache, to read `source` from; None to download it.
    """
    folder = source
    if source is not None and Path(source).is_file():
        folder = Path(source).parent
    options: dict[str, Any] = {
        "revision": revision,
        "subfolder": subfolder,
        "cache_dir": cache_dir,
        "local_files_only": cache_dir is not None,
    }
    if not config.naflex:  # NaFlex models take the size from the file.
        options["size"] = {"height": config.image_size, "width": config.image_size}
    class_names = NAFLEX_PROCESSORS if config.naflex else PROCESSORS
    processors: dict[Backend, Callable[[Any], dict[str, Tensor]]] = {}
    for backend, class_name in class_names.items():
        processor_class = library_object(class_name)
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


def backends_of(processors: Mapping[Backend, object]) -> list[Backend]:
    """Return the backends of some image processors."""
    return list(processors)


def process_with(
    processors: Mapping[Backend, Callable[[Any], dict[str, Tensor]]],
    backend: Backend,
    image: object,
) -> dict[str, Tensor]:
    """Process an image with one of the image processors."""
    return dict(processors[backend](image))


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
        options = {"patch_size": config.patch_size, "max_num_patches": num_patches(config)}
    else:
        options = {"size": {"height": config.image_size, "width": config.image_size}}
    if is_siglip2(folder):
        # `convert_siglip2_to_hf.py` writes this for all of them.
        options["resample"] = BILINEAR
    return options


def process_image(processor: HFProcessor, image: object) -> dict[str, Tensor]:
    """Process an image, an image file or its bytes into a batch of one.

    Files are decoded with Pillow; torchvision's decoders are deprecated.
    """
    if isinstance(image, bytes):
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(image)))
    if isinstance(image, str):
        image = library_object("image_utils.load_image")(image)
    with quiet_transformers():  # about arrays whose channels may be first or last
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
    logging = import_transformers().utils.logging
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
