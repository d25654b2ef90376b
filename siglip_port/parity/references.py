"""The implementation that the port is compared with. The only module that imports `transformers`."""

from __future__ import annotations

import contextlib
import importlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers import Siglip2VisionConfig, SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

from siglip_port.config import SigLipVisionConfig
from siglip_port.parity.gates import Side
from siglip_port.parity.mutation import replaced
from siglip_port.parity.weights import fill

Attention = Literal["sdpa", "eager"]

VERSION: str = transformers.__version__


class BrokenReferenceError(RuntimeError):
    """The reference cannot be loaded as it must be: nothing can be compared with it."""


class Reference:
    """transformers' `SiglipVisionModel`, in `eval()` mode.

    Attributes:
        model: the module.
        attentions: its implementations of attention; the first computes in float64 where asked to. The softmax of
            the eager one is float32 whatever the dtype.
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
        return {ours: getattr(theirs, name) for ours, name in FIELDS.items()}


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
    """`tokens` [B, N, D] and, where it has a head, `pooled` [B, D]."""
    output = model(pixel_values)
    points = {"tokens": output.last_hidden_state, "pooled": output.pooler_output}
    return {point: tensor for point, tensor in points.items() if tensor is not None}


def hf_config(config: SigLipVisionConfig) -> SiglipVisionConfig:
    """Returns the reference's configuration of the same architecture."""
    return SiglipVisionConfig(**{k: v for k, v in config.to_hf().items() if k not in ("architectures", "model_type")})


def write_random_checkpoint(folder: Path, config: SigLipVisionConfig, seed: int = 1234, recipe: str = "N1") -> None:
    """Has the reference write a checkpoint of this architecture, with random weights on which mistakes are loud.

    Args:
        folder: where to.
        config: the architecture.
        seed: of the weights.
        recipe: one of `siglip_port.parity.weights.RECIPES`.
    """
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SiglipVisionModel(hf_config(config))
        fill(model, recipe, seed)
        model.save_pretrained(folder)


def load(
    source: str | Path,
    *,
    pooling_head: bool,
    dtype: torch.dtype,
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


def foreign(
    kind: Literal["naflex", "resized"], edits: Sequence[tuple[str, str, str]], seed: int = 1234
) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """For what the port does not have yet: a small tower of the reference's own, and one of a changed copy of its code.

    Args:
        kind: `naflex`, the SigLIP 2 tower for pictures of any shape; `resized`, the fixed one at another resolution.
        edits: in the text of transformers' `modeling_siglip2.py` or `modeling_siglip.py`.
        seed: of weights and inputs.

    Returns:
        The tower, the changed one with the same weights, and what both are called with.
    """
    sizes = {"hidden_size": 72, "intermediate_size": 101, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "naflex":
        name, config, made = "siglip2", Siglip2VisionConfig(**sizes, patch_size=4, num_patches=25), "Siglip2VisionModel"
    else:
        name, config, made = "siglip", SiglipVisionConfig(**sizes, patch_size=7, image_size=35), "SiglipVisionModel"
    original = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    text = Path(str(original.__file__)).read_text(encoding="utf-8")
    for _, old, new in edits:
        text = replaced(text, old, new, f"transformers' modeling_{name}.py")
    changed = ModuleType(original.__name__)
    changed.__dict__.update(__file__=original.__file__, __package__=original.__package__)
    registered = sys.modules[original.__name__]
    sys.modules[original.__name__] = changed  # its decorators look the module up
    try:
        exec(compile(text, str(original.__file__), "exec", dont_inherit=True), changed.__dict__)
    finally:
        sys.modules[original.__name__] = registered
    with _quiet():
        towers = [getattr(module, made)(config).eval() for module in (original, changed)]
    fill(towers[0], "N1", seed)
    towers[1].load_state_dict(towers[0].state_dict())
    generator = torch.Generator().manual_seed(seed)
    if kind == "resized":
        pixels = torch.rand(2, 3, 42, 56, generator=generator) * 2 - 1
        return towers[0], towers[1], {"pixel_values": pixels, "interpolate_pos_encoding": True}
    shapes = torch.tensor([[4, 6], [7, 3]])
    mask = torch.arange(28)[None] < shapes.prod(1)[:, None]
    patches = torch.rand(2, 28, 48, generator=generator) * 2 - 1
    inputs = {"pixel_values": patches, "pixel_attention_mask": mask.long(), "spatial_shapes": shapes}
    return towers[0], towers[1], inputs


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
