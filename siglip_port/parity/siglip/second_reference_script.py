"""Run a second reference on a SigLIP model's weights, in float64.

    python second_reference_script.py PACKAGE DIR

Runs in isolated environments: imports torch, safetensors and the package, not siglip_port. DIR
contains config.json, model.safetensors (transformers' SiglipVisionModel, names without a prefix),
inputs.safetensors and points.json, a list of the reference's points. The script writes
outputs.safetensors, with `output.<name>` and `tap.<point>`, and second_reference.json.

A *place* is the counterpart of a point in the second reference: a module path for the module's
output, `path:input` for its input, `path:2/3` for the second of three equal parts of its output.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Json = dict[str, Any]
Tensors = dict[str, Tensor]

# fmt: off
# transformers' names -> names in timm's VisionTransformer, applied in this order.
TIMM = (
    ("embeddings.patch_embedding", "patch_embed.proj"),
    # an identity, the last module before the blocks
    ("embeddings",                 "norm_pre"),
    ("encoder.layers",             "blocks"),
    ("post_layernorm",             "norm"),
    ("layernorm",                  "norm"),
    ("layer_norm",                 "norm"),
    ("self_attn",                  "attn"),
    ("q_proj",                     "qkv:1/3"),
    ("k_proj",                     "qkv:2/3"),
    ("v_proj",                     "qkv:3/3"),
    ("out_proj",                   "proj"),
    ("head.attention:q",           "attn_pool.q"),
    ("head.attention:k",           "attn_pool.kv:1/2"),
    ("head.attention:v",           "attn_pool.kv:2/2"),
    ("head.attention:context",     "attn_pool.proj:input"),
    ("head.attention.proj",        "attn_pool.proj"),
    ("head.attention",             "attn_pool.proj"),
    ("head",                       "attn_pool"),
)
# fmt: on


@dataclass(frozen=True)
class Implementation:
    """A second reference with the weights loaded.

    Attributes:
        label: Package and version.
        model: Model, built as its users build it.
        run: Function pixels -> `tokens` and, with a pooling head, `pooled`.
        place: Function point of the reference -> place.
        is_float64: Whether all steps can be computed in float64.
    """

    label: str
    model: nn.Module
    run: Callable[[Tensor], Tensors]
    place: Callable[[str], str]
    is_float64: bool = True


def build_transformers(folder: Path, config: Json, weights: Tensors) -> Implementation:
    """Build the SiglipVisionModel of another transformers release, with its default attention."""
    transformers = importlib.import_module("transformers")
    hf_config = transformers.SiglipVisionConfig.from_pretrained(folder)
    model = transformers.SiglipVisionModel(hf_config).double().eval()
    prefix = ""
    if any(name.startswith("vision_model.") for name in model.state_dict()):
        prefix = "vision_model."
    model.load_state_dict(add_prefix(weights, prefix), strict=True)

    def run(pixels: Tensor) -> Tensors:
        output = model(pixels)
        outputs = {"tokens": output.last_hidden_state}
        if config["vision_use_head"]:
            outputs["pooled"] = output.pooler_output
        return outputs

    # The softmax of the eager attention is float32 in every dtype.
    attention = getattr(model.config, "_attn_implementation", "eager")
    label = f"transformers {transformers.__version__}"
    is_float64 = attention != "eager"
    return Implementation(label, model, run, lambda point: prefix + point, is_float64)


def build_timm(_: Path, config: Json, weights: Tensors) -> Implementation:
    """Build timm's model, with the settings of `vit_base_patch16_siglip_224`."""
    return with_trunk(f"timm {version('timm')}", make_trunk(config), "", config, weights)


def build_open_clip(_: Path, config: Json, weights: Tensors) -> Implementation:
    """Build open_clip's TimmModel, with the settings of `ViT-B-16-SigLIP`.

    open_clip finds sizes by the name of a timm model, so a model of this size is registered.
    """
    open_clip = importlib.import_module("open_clip")
    settings = open_clip.get_model_config("ViT-B-16-SigLIP")["vision_cfg"]

    def siglip_of_this_size(*, num_classes: int, global_pool: str, **_: object) -> nn.Module:
        return make_trunk(config, num_classes=num_classes, global_pool=global_pool)

    importlib.import_module("timm.models").register_model(siglip_of_this_size)
    model = importlib.import_module("open_clip.timm_model").TimmModel(
        siglip_of_this_size.__name__,
        embed_dim=config["hidden_size"],
        image_size=config["image_size"],
        pool=settings["timm_pool"] if config["vision_use_head"] else "",
        proj=settings["timm_proj"],
        pretrained=False,
    )
    label = f"open_clip {version('open_clip_torch')} (timm {version('timm')})"
    return with_trunk(label, model, "trunk.", config, weights)


def make_trunk(config: Json, *, num_classes: int = 0, global_pool: str | None = None) -> nn.Module:
    """Build timm's VisionTransformer with the sizes of `config`; activation and eps are timm's."""
    if global_pool is None:
        global_pool = "map" if config["vision_use_head"] else ""
    hidden_size = config["hidden_size"]
    trunk: nn.Module = importlib.import_module("timm.models").VisionTransformer(
        img_size=config["image_size"],
        patch_size=config["patch_size"],
        in_chans=config["num_channels"],
        embed_dim=hidden_size,
        depth=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        mlp_ratio=(config["intermediate_size"] + 0.5) / hidden_size,  # timm rounds the product down
        class_token=False,
        num_classes=num_classes,
        global_pool=global_pool,
    )
    return trunk


def with_trunk(
    label: str, model: nn.Module, prefix: str, config: Json, weights: Tensors
) -> Implementation:
    """Load the weights into a model that is or contains timm's VisionTransformer."""
    model.double().eval()
    model.load_state_dict(add_prefix(to_timm(weights), prefix), strict=True)

    def run(pixels: Tensor) -> Tensors:
        outputs: Tensors = {}
        norm = model.get_submodule(f"{prefix}norm")
        # The model returns the pooled output only.
        handle = norm.register_forward_hook(lambda _, __, output: outputs.update(tokens=output))
        returned = model(pixels)
        handle.remove()
        if config["vision_use_head"]:
            outputs["pooled"] = returned
        return outputs

    return Implementation(label, model, run, lambda point: prefix + rename(point))


def add_prefix(tensors: Tensors, prefix: str) -> Tensors:
    """Return the tensors with a prefix on their names."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def rename(point: str) -> str:
    """Return the place in timm's model of a point."""
    for name, timm_name in TIMM:
        point = point.replace(name, timm_name)
    return point


def to_timm(weights: Tensors) -> Tensors:
    """Convert the reference's tensors to timm's: rename, fuse and split."""
    weights = dict(weights)
    tensors = {"pos_embed": weights.pop("embeddings.position_embedding.weight")[None]}
    if "head.probe" in weights:
        tensors["attn_pool.latent"] = weights.pop("head.probe")
        for kind in ("weight", "bias"):
            fused = weights.pop(f"head.attention.in_proj_{kind}")
            for part, tensor in zip("qkv", fused.chunk(3), strict=True):
                weights[f"head.attention:{part}.{kind}"] = tensor
    parts: dict[str, Tensors] = {}
    for name, tensor in weights.items():
        module, _, kind = name.rpartition(".")
        path, _, part = rename(module).partition(":")
        parts.setdefault(f"{path}.{kind}", {})[part] = tensor
    for name, by_part in parts.items():
        tensors[name] = torch.cat([by_part[part] for part in sorted(by_part)])
    return tensors


def hook_places(model: nn.Module, places: Iterable[str]) -> Tensors:
    """Hook the places that exist in the model; return a dict that is filled when it runs."""
    values: Tensors = {}

    def input_hook(place: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            values[place] = args[0].clone()

        return hook

    def output_hook(place: str, part: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: object, output: object) -> None:
            values[place] = part_of(output, part).clone()

        return hook

    modules = dict(model.named_modules())
    for place in places:
        path, _, part = place.partition(":")
        if path not in modules:
            continue
        if part == "input":
            modules[path].register_forward_pre_hook(input_hook(place))
        elif not part or "/" in part:
            modules[path].register_forward_hook(output_hook(place, part))
    return values


def part_of(output: object, part: str) -> Tensor:
    """Return the first tensor of an output, or a part: `2/3` is the second of three."""
    tensor = output[0] if isinstance(output, (tuple, list)) else output
    assert isinstance(tensor, Tensor)
    number, _, parts = (part or "1/1").partition("/")
    return tensor.chunk(int(parts), -1)[int(number) - 1]


BUILDERS = {"timm": build_timm, "open_clip": build_open_clip, "transformers": build_transformers}


def main(package: str, folder: Path) -> None:
    """Run the implementation and write the results."""
    config = json.loads((folder / "config.json").read_text())
    points = json.loads((folder / "points.json").read_text())
    weights = load_double(folder / "model.safetensors")
    pixels = load_double(folder / "inputs.safetensors")["pixel_values"]
    implementation = BUILDERS[package](folder, config, weights)
    places = {point: implementation.place(point) for point in points}
    values = hook_places(implementation.model, places.values())
    with torch.inference_mode():
        outputs = implementation.run(pixels)
    places = {point: place for point, place in places.items() if place in values}
    tensors = {f"output.{name}": tensor for name, tensor in outputs.items()}
    tensors |= {f"tap.{point}": values[place] for point, place in places.items()}
    for name, tensor in tensors.items():
        tensors[name] = tensor.double().contiguous().clone()
    save_file(tensors, folder / "outputs.safetensors")
    about = {
        "label": implementation.label,
        "is_float64": implementation.is_float64,
        "places": places,
    }
    (folder / "second_reference.json").write_text(json.dumps(about))


def load_double(path: Path) -> Tensors:
    """Load the tensors of a file in float64."""
    return {name: tensor.double() for name, tensor in load_file(path).items()}


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
