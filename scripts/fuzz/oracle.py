"""The oracle of `run.py`: the model that files describe, read independently of siglip_port.

The position of every stored element in the model's tensors is determined once per layout, from a
checkpoint whose elements are all different.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from scripts.fuzz.intact import KINDS, Files, make
from scripts.fuzz.setting_edits import (
    ADAPTER_CONFIG,
    FOREIGN_SETTINGS,
    TIMM_SETTINGS,
    foreign_settings,
)
from scripts.fuzz.stored_tensors import Tensors, UnusableError, read_object, read_tensors
from siglip_port import SigLipVisionConfig, SigLipVisionModel
from siglip_port.checkpoint.preprocessor_config import PREPROCESSOR
from siglip_port.checkpoint.source import CONFIG

ACTS = ("gelu", "gelu_pytorch_tanh")
TIMM = "vit_base_patch16_siglip_224"
"""The architecture that `save_timm` writes; its activation is the exact GELU."""

HF_KEYS: tuple[tuple[str, str, Any], ...] = (
    ("num_channels", "num_channels", 3),
    ("hidden_size", "embed_dim", 768),
    ("image_size", "image_size", 224),
    ("patch_size", "patch_size", 16),
    ("num_attention_heads", "num_attention_heads", 12),
    ("attention_dropout", "attention_dropout", 0.0),
    ("num_hidden_layers", "num_encoder_blocks", 12),
    ("intermediate_size", "mlp_hidden_dim", 3072),
    ("layer_norm_eps", "layer_norm_eps", 1e-6),
    ("hidden_act", "hidden_act", "gelu_pytorch_tanh"),
)
"""Key in config.json, field of SigLipVisionConfig, default of transformers."""

IN_THE_SHAPES = (
    "num_channels",
    "embed_dim",
    "patch_size",
    "num_encoder_blocks",
    "mlp_hidden_dim",
    "grid_size",
)
VALUE_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,)}


@dataclass(frozen=True)
class ModelState:
    """Everything that determines what a model computes.

    Attributes:
        config: the architecture.
        dtype: dtype of the tensors.
        tensors: bytes of all tensors, concatenated.
        processor: entries of `preprocessor_config.json` that the model must reproduce, as JSON;
            None if there are none.
    """

    config: SigLipVisionConfig
    dtype: torch.dtype
    tensors: bytes
    processor: str | None = None


class Reader:
    """Reads the files of a layout, with the element positions of an intact checkpoint.

    Args:
        name: one of `KINDS`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.kind = KINDS[name]
        state = SigLipVisionModel(self.kind.config).state_dict()
        self.size = sum(tensor.numel() for tensor in state.values())
        # float32 represents these numbers exactly, bfloat16 does not; the positions are the same.
        stored = read_tensors(make("flat" if name == "bf16" else name, fill_with_numbers))
        if name == "bf16":
            stored = {self.kind.prefix + key: tensor for key, tensor in stored.items()}
        self.positions: Tensors = {}  # stored name -> positions of its elements in the state
        for key, tensor in stored.items():
            if key.startswith(self.kind.prefix) and not is_ignored(key):
                self.positions[key] = tensor.long() - 1
        flat = torch.cat([tensor.flatten() for tensor in self.positions.values()])
        assert sorted(flat.tolist()) == list(range(self.size))

    def read(self, files: Files) -> ModelState:
        """Return the model that files describe.

        Raises:
            UnusableError: the files must be refused.
        """
        if ADAPTER_CONFIG in files:
            raise UnusableError("an adapter beside the weights, which transformers applies")
        stored = read_tensors(files, self.positions.keys())
        head_prefix = self.kind.prefix + self.kind.head
        head = {key for key in self.positions if key.startswith(head_prefix)}
        has_head = bool(head & stored.keys())
        expected = self.positions.keys() if has_head else self.positions.keys() - head
        self.check_tensors(stored, expected)
        content = read_object(files[CONFIG], CONFIG) if CONFIG in files else None
        if self.kind.described:
            config = self.config_as_described(content, has_head)
        else:
            config = self.config_by_shapes(content or {}, has_head)
        dtype, state = self.read_state(stored, expected)
        return ModelState(config, dtype, state, expected_processor(files, config))

    def check_tensors(self, stored: Tensors, expected: Collection[str]) -> None:
        """Raise UnusableError unless the encoder's tensors are complete, with the right shapes."""
        missing = set(expected) - stored.keys()
        if missing:
            raise UnusableError(f"missing tensors: {sorted(missing)[:3]}")
        encoder_keys = {
            key for key in stored if key.startswith(self.kind.prefix) and not is_ignored(key)
        }
        unknown = encoder_keys - set(expected)
        if unknown:
            raise UnusableError(f"unknown tensors: {sorted(unknown)[:3]}")
        misshapen = [key for key in expected if stored[key].shape != self.positions[key].shape]
        if misshapen:
            raise UnusableError(f"tensors with a wrong shape: {sorted(misshapen)[:3]}")

    def read_state(
        self, stored: Mapping[str, Tensor], expected: Collection[str]
    ) -> tuple[torch.dtype, bytes]:
        """Return the dtype that all stored tensors are promoted to, and the bytes of the state."""
        dtype = functools.reduce(torch.promote_types, (stored[key].dtype for key in expected))
        flat = torch.zeros(self.size, dtype=dtype)
        filled = torch.zeros(self.size, dtype=torch.bool)
        for key in expected:
            flat[self.positions[key]] = stored[key].to(dtype)
            filled[self.positions[key]] = True
        return dtype, raw_bytes(flat[filled])

    def config_as_described(
        self, content: dict[str, Any] | None, has_head: bool
    ) -> SigLipVisionConfig:
        """Return the architecture that transformers' config.json describes.

        Values must be valid; missing keys take transformers' defaults.
        """
        if content is None:
            raise UnusableError("no config.json")
        vision = content.get("vision_config")
        if vision is None:
            vision = content
        if not isinstance(vision, dict):
            raise UnusableError("vision_config is not an object")
        foreign = foreign_settings(vision, FOREIGN_SETTINGS)
        if foreign:
            raise UnusableError(f"settings of another model: {foreign}")
        kind = find_model_type(vision, content)
        values = {name: vision.get(key, default) for key, name, default in HF_KEYS}
        for name in ("image_size", "patch_size"):
            pair = values[name]
            if isinstance(pair, list) and len(pair) == 2 and pair[0] == pair[1]:
                values[name] = pair[0]
        naflex = kind.startswith("siglip2")
        if naflex:
            values["image_size"] = naflex_image_size(vision, values["patch_size"])
        mean = vision.get("mean_pooling") is True
        return self.checked_config(**values, naflex=naflex, **pooling(has_head, mean))

    def config_by_shapes(self, content: dict[str, Any], has_head: bool) -> SigLipVisionConfig:
        """Return the architecture by the shapes; the rest by timm's config.json."""
        parts = [content.get("model_args"), content.get("pretrained_cfg"), content]
        sections = [part for part in parts if type(part) is dict]
        foreign = foreign_settings(content.get("model_args"), TIMM_SETTINGS)
        if foreign:
            raise UnusableError(f"settings of another model: {foreign}")

        def first(key: str) -> Any:  # noqa: ANN401 (a value of JSON)
            values = (section[key] for section in sections if section.get(key) is not None)
            return next(values, None)

        config = self.kind.config
        num_heads = config.num_attention_heads
        act = first("act_layer")
        if self.name == "timm":
            num_heads = first("num_heads")
            if act is None and TIMM in json.dumps(content):
                act = "gelu"
        elif act is None:
            act = "gelu_pytorch_tanh"
        values: dict[str, Any] = {f.name: getattr(config, f.name) for f in fields(config)}
        values["num_attention_heads"] = num_heads
        values["hidden_act"] = "gelu_pytorch_tanh" if act == "gelu_tanh" else act
        values["image_size"] = config.grid_size * config.patch_size
        for size in image_sizes(sections):
            if type(size) is int and size // config.patch_size == config.grid_size:
                values["image_size"] = size
                break
        values |= pooling(has_head, first("global_pool") == "avg")
        return self.checked_config(**values)

    def checked_config(self, **values: Any) -> SigLipVisionConfig:  # noqa: ANN401 (values of JSON)
        """Return the configuration; raise UnusableError for values that are invalid or wrong."""
        for field in fields(SigLipVisionConfig):
            value = values.setdefault(field.name, None)
            types = VALUE_TYPES.get(str(field.type))
            is_positive = str(field.type) != "int" or type(value) is not int or value >= 1
            if types and (type(value) not in types or not is_positive):
                raise UnusableError(f"{field.name} is {value!r}")
        act = values["hidden_act"]
        heads = values["num_attention_heads"]
        if act not in ACTS or values["embed_dim"] % heads:
            raise UnusableError(f"hidden_act is {act!r}, num_attention_heads is {heads}")
        eps = values["layer_norm_eps"]
        dropout = values["attention_dropout"]
        if not 0 < eps < 1 or not 0 <= dropout < 1:
            raise UnusableError(f"layer_norm_eps is {eps}, attention_dropout is {dropout}")
        grid_size = values["image_size"] // values["patch_size"]
        for name in (*IN_THE_SHAPES, "naflex"):
            value = {**values, "grid_size": grid_size}[name]
            actual = getattr(self.kind.config, name)
            if value != actual:
                raise UnusableError(f"{name} is {value}, the shapes give {actual}")
        return replace(self.kind.config, **values)


def model_state(model: SigLipVisionModel, files: Files) -> ModelState:
    """Return the state of a model that was loaded from files."""
    tensors = list(model.state_dict().values())
    (dtype,) = {tensor.dtype for tensor in tensors}
    processor = None
    if expected_processor(files, model.config) is not None:
        keys = read_object(files[PREPROCESSOR], PREPROCESSOR)
        stored = {key: model.preprocessor_config.get(key) for key in keys}
        processor = json.dumps(stored, sort_keys=True)
    state = raw_bytes(torch.cat([tensor.flatten() for tensor in tensors]))
    return ModelState(model.config, dtype, state, processor)


def expected_processor(files: Files, config: SigLipVisionConfig) -> str | None:
    """Return the expected preprocessor configuration as JSON; None without a SigLIP preprocessor.

    The contents of the file, except that the size is the model's.
    """
    if PREPROCESSOR not in files:
        return None
    content = read_object(files[PREPROCESSOR], PREPROCESSOR)
    kind = content.get("image_processor_type", content.get("feature_extractor_type"))
    prefix = "Siglip2" if config.naflex else "SiglipImage"
    if not isinstance(kind, str) or not kind.startswith(prefix):
        return None
    if not config.naflex and "size" in content:
        content["size"] = {"height": config.image_size, "width": config.image_size}
    return json.dumps(content, sort_keys=True)


def find_model_type(vision: dict[str, Any], content: dict[str, Any]) -> str:
    """Return the model type that a configuration describes."""
    kind = vision.get("model_type")
    if kind is None:
        kind = content.get("model_type")
    if kind is None:
        return "siglip_vision_model"
    if kind in ("siglip", "siglip_vision_model", "siglip2", "siglip2_vision_model"):
        return str(kind)
    raise UnusableError(f"model_type is {kind!r}")


def naflex_image_size(vision: dict[str, Any], patch_size: object) -> int:
    """Return the image size in pixels that the position grid of a NaFlex encoder corresponds to."""
    count = vision.get("num_patches", 256)
    if type(count) is not int or count < 1 or math.isqrt(count) ** 2 != count:
        raise UnusableError(f"num_patches is {count!r}")
    return math.isqrt(count) * (patch_size if type(patch_size) is int else 1)


def image_sizes(sections: list[dict[str, Any]]) -> list[object]:
    """Return the image sizes in sections of timm's configuration; the last element of a list."""
    sizes = []
    for section in sections:
        for key in ("img_size", "image_size", "input_size"):
            if key in section:
                size = section[key]
                sizes.append(size[-1] if isinstance(size, list) and size else size)
    return sizes


def pooling(has_head: bool, mean: bool) -> dict[str, bool]:
    """Return the fields for pooling: by the head that is stored; a mean only without a head."""
    return {"pooling_head": has_head, "mean_pooling": mean and not has_head}


def is_ignored(name: str) -> bool:
    """Return whether a tensor is not part of the vision encoder."""
    return name.startswith("text_model.") or name == "logit_scale"


def raw_bytes(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def fill_with_numbers(model: nn.Module) -> None:
    """Fill the tensors of a model with the numbers 1, 2, 3, ..."""
    tensors = list(model.state_dict().values())
    starts = itertools.accumulate((tensor.numel() for tensor in tensors), initial=1)
    for tensor, start in zip(tensors, starts, strict=False):
        tensor.copy_(torch.arange(start, start + tensor.numel()).reshape(tensor.shape))
