"""What a checkpoint says, told without siglip_port's readers.

By the libraries of the file formats, for `run.py`.

Which of the stored numbers belongs where in our tensors was found by storing a tower whose every
number is another.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor, nn

from scripts.fuzz.mutants import (
    CONFIG,
    INDEX,
    KINDS,
    NPZ,
    PREPROCESSOR,
    WEIGHTS,
    Files,
    join,
    make,
    split,
)
from siglip_port import SigLipVisionConfig, SigLipVisionModel

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ACTS = ("gelu", "gelu_pytorch_tanh")
# the architecture that `save_timm` names, whose activation is the exact GELU
TIMM = "vit_base_patch16_siglip_224"

# transformers' keys, our fields, and the defaults: those of google/siglip-base-patch16-224, as the
# library says.
HF: tuple[tuple[str, str, Any], ...] = (
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
_IN_THE_SHAPES = (
    "num_channels",
    "embed_dim",
    "patch_size",
    "num_encoder_blocks",
    "mlp_hidden_dim",
    "grid_size",
)


class UnusableError(Exception):
    """The files say nothing that may be loaded; why."""


@dataclass(frozen=True)
class Meaning:
    """A tower: what decides over all that it computes.

    Attributes:
        config: its architecture.
        dtype: of its tensors.
        state: the bytes of all its tensors, one after the other.
        processor: what of `preprocessor_config.json` has to be found in the model's; None where
            nothing has to.
    """

    config: SigLipVisionConfig
    dtype: torch.dtype
    state: bytes
    processor: str | None = None


class Reader:
    """Knows how a layout stores the tower, from intact files.

    Args:
        name: one of `KINDS`.
    """

    def __init__(self, name: str) -> None:
        self.name, self.kind = name, KINDS[name]
        state = SigLipVisionModel(self.kind.config).state_dict()
        self._sizes = {name: tensor.numel() for name, tensor in state.items()}
        # float32 holds these numbers exactly; of bfloat16, the same tower in float32 tells.
        stored = _stored(make("flat" if name == "bf16" else name, _number))
        added = self.kind.prefix if name == "bf16" else ""
        inside = {
            added + key: t
            for key, t in stored.items()
            if (added + key).startswith(self.kind.prefix)
        }
        self._places = {
            key: tensor.long() - 1 for key, tensor in inside.items() if not _is_ballast(key)
        }
        assert sorted(torch.cat([t.flatten() for t in self._places.values()])) == list(
            range(sum(self._sizes.values()))
        )

    def read(self, files: Files) -> Meaning:
        """Tells what the files say.

        Raises:
            UnusableError: they must be refused.
        """
        stored = _stored(files, self._places.keys())
        head = {key for key in self._places if key.startswith(self.kind.prefix + self.kind.head)}
        wanted = self._places.keys() if head & stored.keys() else self._places.keys() - head
        if missing := wanted - stored.keys():
            raise UnusableError(f"tensors are missing: {sorted(missing)[:3]}")
        inside = {
            key for key in stored if key.startswith(self.kind.prefix) and not _is_ballast(key)
        }
        if unknown := inside - wanted:
            raise UnusableError(f"tensors that nobody knows: {sorted(unknown)[:3]}")
        if wrong := [key for key in wanted if stored[key].shape != self._places[key].shape]:
            raise UnusableError(f"tensors of another shape: {sorted(wrong)[:3]}")
        has_head = len(wanted) == len(self._places)
        config = (self._described if self.kind.described else self._by_shapes)(
            _configuration(files), has_head
        )
        return Meaning(config, *self._state(stored, wanted), _processor(files, config))

    def _state(
        self, stored: Mapping[str, Tensor], wanted: Iterable[str]
    ) -> tuple[torch.dtype, bytes]:
        """Puts the stored numbers where they belong; in the one dtype that holds them all."""
        dtype = functools.reduce(torch.promote_types, (stored[key].dtype for key in wanted))
        flat = torch.zeros(sum(self._sizes.values()), dtype=dtype)
        filled = torch.zeros(len(flat), dtype=torch.bool)
        for key in wanted:
            flat[self._places[key]], filled[self._places[key]] = stored[key].to(dtype), True
        return dtype, raw(flat[filled])

    def _described(self, content: dict[str, Any] | None, has_head: bool) -> SigLipVisionConfig:
        """The architecture by transformers' configuration.

        What is written must be legal, the rest is default.
        """
        if content is None:
            raise UnusableError("there is no config.json")
        vision = content.get("vision_config")
        vision = content if vision is None else vision
        if not isinstance(vision, dict):
            raise UnusableError("vision_config is no object")
        told = [c["model_type"] for c in (vision, content) if c.get("model_type") is not None]
        kind = told[0] if told else "siglip_vision_model"
        if kind not in ("siglip", "siglip_vision_model", "siglip2", "siglip2_vision_model"):
            raise UnusableError(f"model_type is {kind!r}")
        naflex = kind.startswith("siglip2")
        values = {ours: vision.get(theirs, default) for theirs, ours, default in HF}
        for name in ("image_size", "patch_size"):
            pair = values[name]
            if isinstance(pair, list) and len(pair) == 2 and pair[0] == pair[1]:
                values[name] = pair[0]
        if naflex:
            count = vision.get("num_patches", 256)
            if type(count) is not int or count < 1 or math.isqrt(count) ** 2 != count:
                raise UnusableError(f"num_patches is {count!r}")
            patch = values["patch_size"]
            values["image_size"] = math.isqrt(count) * (patch if type(patch) is int else 1)
        return self._checked(
            **values, naflex=naflex, **_pooling(has_head, vision.get("mean_pooling") is True)
        )

    def _by_shapes(self, content: dict[str, Any] | None, has_head: bool) -> SigLipVisionConfig:
        """The architecture as the shapes tell it, which are right.

        And for the rest, what timm's configuration says.
        """
        content = content or {}
        told = [
            part
            for part in (content.get("model_args"), content.get("pretrained_cfg"), content)
            if type(part) is dict
        ]

        def first(key: str) -> Any:  # noqa: ANN401 (a value of JSON)
            return next((part[key] for part in told if part.get(key) is not None), None)

        heads, act = self.kind.config.num_attention_heads, first("act_layer")
        if self.name == "timm":
            heads = first("num_heads")
            act = act if act is not None or TIMM not in json.dumps(content) else "gelu"
        elif act is None:
            act = "gelu_pytorch_tanh"
        sides = [
            part[key]
            for part in told
            for key in ("img_size", "image_size", "input_size")
            if key in part
        ]
        sides = [side[-1] if isinstance(side, list) and side else side for side in sides]
        grid, patch = self.kind.config.grid_size, self.kind.config.patch_size
        values = {
            field.name: getattr(self.kind.config, field.name)
            for field in fields(SigLipVisionConfig)
        }
        values |= {
            "num_attention_heads": heads,
            "hidden_act": "gelu_pytorch_tanh" if act == "gelu_tanh" else act,
        }
        values["image_size"] = next(
            (s for s in sides if type(s) is int and s // patch == grid), grid * patch
        )
        return self._checked(**values | _pooling(has_head, first("global_pool") == "avg"))

    def _checked(self, **values: Any) -> SigLipVisionConfig:  # noqa: ANN401 (values of JSON)
        """Makes the configuration, where every value is legal and none contradicts the tensors, which are right."""
        for field in fields(SigLipVisionConfig):
            value, kind = values.setdefault(field.name, None), str(field.type)
            legal = {"int": (int,), "float": (int, float), "bool": (bool,)}.get(kind)
            if legal and (
                type(value) not in legal or (type(value) is int and kind == "int" and value < 1)
            ):
                raise UnusableError(f"{field.name} is {value!r}")
        if values["hidden_act"] not in ACTS or values["embed_dim"] % values["num_attention_heads"]:
            raise UnusableError(
                f"hidden_act is {values['hidden_act']!r}, heads are {values['num_attention_heads']}"
            )
        if not 0 < values["layer_norm_eps"] < 1 or not 0 <= values["attention_dropout"] < 1:
            raise UnusableError(
                f"eps is {values['layer_norm_eps']}, dropout is {values['attention_dropout']}"
            )
        true = self.kind.config
        values["grid_size"] = values["image_size"] // values["patch_size"]
        for name in (*_IN_THE_SHAPES, "naflex"):
            if values[name] != getattr(true, name):
                raise UnusableError(
                    f"{name} is {values[name]}, by the shapes {getattr(true, name)}"
                )
        return replace(true, **{key: value for key, value in values.items() if key != "grid_size"})


def loaded(model: SigLipVisionModel, files: Files) -> Meaning:
    """What a model is, to be compared with what the files say."""
    tensors = list(model.state_dict().values())
    (dtype,) = {tensor.dtype for tensor in tensors}
    config = model.config
    found = {
        key: model.preprocessor_config.get(key)
        for key in _json(files.get(PREPROCESSOR, b"{}"), PREPROCESSOR)
    }
    processor = None if _processor(files, config) is None else json.dumps(found, sort_keys=True)
    return Meaning(
        config, dtype, raw(torch.cat([tensor.flatten() for tensor in tensors])), processor
    )


def raw(tensor: Tensor) -> bytes:
    """The bytes of a tensor."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _number(model: nn.Module) -> None:
    """Fills a tower with the numbers 1, 2, 3, ..., through all its tensors."""
    tensors = list(model.state_dict().values())
    starts = itertools.accumulate((tensor.numel() for tensor in tensors), initial=1)
    for tensor, start in zip(tensors, starts, strict=False):
        tensor.copy_(torch.arange(start, start + tensor.numel()).reshape(tensor.shape))


def _is_ballast(name: str) -> bool:
    return name.startswith("text_model.") or name == "logit_scale"


def _pooling(has_head: bool, mean: bool) -> dict[str, bool]:
    """The file decides over the pooling head, whatever the configuration says.

    A mean is taken only without it.
    """
    return {"pooling_head": has_head, "mean_pooling": mean and not has_head}


def _json(content: bytes, name: str) -> dict[str, Any]:
    try:
        document = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UnusableError(f"{name} is no JSON") from error
    if not isinstance(document, dict):
        raise UnusableError(f"{name} is no object")
    return document


def _configuration(files: Files) -> dict[str, Any] | None:
    return _json(files[CONFIG], CONFIG) if CONFIG in files else None


def _processor(files: Files, config: SigLipVisionConfig) -> str | None:
    """What the model's preprocessor must say.

    All that the file says, but for the size, if it is one for SigLIP.
    """
    if PREPROCESSOR not in files:
        return None
    found = _json(files[PREPROCESSOR], PREPROCESSOR)
    kind = found.get("image_processor_type", found.get("feature_extractor_type"))
    if not isinstance(kind, str) or not kind.startswith(
        "Siglip2" if config.naflex else "SiglipImage"
    ):
        return None
    if not config.naflex and "size" in found:
        found["size"] = {"height": config.image_size, "width": config.image_size}
    return json.dumps(found, sort_keys=True)


def _stored(files: Files, tower: Iterable[str] = ()) -> dict[str, Tensor]:
    """All tensors of one file, or of those shards that hold the tower, by name."""
    if NPZ in files:
        return _npz(files[NPZ])
    if WEIGHTS in files:
        return _safetensors(files[WEIGHTS], WEIGHTS)
    if INDEX not in files:
        if "open_clip_model.safetensors" in files:
            return _safetensors(files["open_clip_model.safetensors"], "open_clip_model.safetensors")
        raise UnusableError("there are no weights")
    placed = _json(files[INDEX], INDEX).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
        raise UnusableError("the index has no weight_map")
    if bad := [
        file
        for file in placed.values()
        if re.search(r"[/\\\n\0]", file) or not file.endswith(".safetensors")
    ]:
        raise UnusableError(f"the index leads to {bad[0]!r}")
    tensors: dict[str, Tensor] = {}
    for shard in {file for name, file in placed.items() if name in tower or not tower}:
        if shard not in files:
            raise UnusableError(f"there is no {shard}")
        found = _safetensors(files[shard], shard)
        if astray := [name for name in found if placed.get(name) != shard]:
            raise UnusableError(f"the index does not place {astray[0]} in {shard}")
        tensors |= found
    unread = {name: torch.empty(0) for name in placed if name not in tensors and name not in tower}
    return {**unread, **tensors}


def _safetensors(content: bytes, name: str) -> dict[str, Tensor]:
    """All tensors of a file, by the format's own library, and as strictly as the format is described.

    Tensors of dtypes that no tower has are empty.
    """
    try:
        found = safetensors.deserialize(content)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        # What is outside the tower may be of a dtype that this release of the library does not know
        # yet.
        if "unknown variant" in str(error) and (known := _of_known_dtypes(content)) != content:
            return _safetensors(known, name)
        raise UnusableError(f"{name}: {error}") from error
    names = [
        key
        for key, _ in json.loads(split(content)[0], object_pairs_hook=list)
        if key != "__metadata__"
    ]
    if len(names) > len(found):
        raise UnusableError(f"{name} has a tensor twice")  # which the library does not mind
    return {
        key: torch.frombuffer(value["data"], dtype=DTYPES[value["dtype"]]).reshape(value["shape"])
        if value["dtype"] in DTYPES and value["data"]
        else torch.empty(0)
        for key, value in found
    }


def _of_known_dtypes(content: bytes) -> bytes:
    """The same file, where what is of a dtype unknown to the library is that many bytes instead."""
    header, data = split(content)
    try:
        tensors = json.loads(header)
        for key, tensor in tensors.items():
            if key != "__metadata__" and tensor["dtype"] not in DTYPES:
                begin, end = tensor["data_offsets"]
                tensor |= {"dtype": "U8", "shape": [end - begin]}
    except (ValueError, TypeError, KeyError, AttributeError):
        return content
    return join(json.dumps(tensors).encode(), data)


def _npz(content: bytes) -> dict[str, Tensor]:
    """All arrays of an archive, by numpy.

    Those that numpy cannot read, and that are no floats, are empty.
    """
    tensors: dict[str, Tensor] = {}
    try:
        with warnings.catch_warnings(), np.load(io.BytesIO(content), allow_pickle=False) as archive:
            warnings.simplefilter("ignore")
            for name in archive.files:
                tensors[name] = torch.empty(0)
                try:
                    array = archive[name]
                except Exception:  # of zipfile, zlib and numpy, which have no base in common
                    continue
                if array.dtype.kind == "f" and array.dtype.itemsize < 16:
                    tensors[name] = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
                elif array.dtype == np.dtype("V2"):
                    tensors[name] = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    except Exception as error:  # likewise
        raise UnusableError(f"no .npz file: {error}") from error
    return tensors
