"""A witness in a process of its own.

What a third implementation computes with a SigLIP tower's weights, in float64.

`python witness_script.py PACKAGE FOLDER`. It runs in isolated environments, so it imports torch,
safetensors and the package, and nothing of ours. FOLDER holds config.json and model.safetensors
(transformers' SiglipVisionModel, names without a prefix), inputs.safetensors, and points.json: the
points of the reference that are of interest. It leaves outputs.safetensors there, with
`output.<name>` and `tap.<point>`, and witness.json.

A *place* is where the witness has a point of the reference: the path of a module for what it
returns, `path:input` for what it is given, `path:2/3` for the second of three equal parts of what
it returns.
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
# What transformers' names are in timm's VisionTransformer, one replacement after the other.
TIMM = (
    ("embeddings.patch_embedding", "patch_embed.proj"),
    # the last thing, which does nothing, before the blocks
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
class Witness:
    """The third implementation, with the weights loaded.

    Attributes:
        label: package and version, for reports.
        model: built as its users build it.
        run: calls it: pixels -> `tokens` and, with a head, `pooled`.
        place: the reference's point -> where it has it, if at all.
        is_float64: whether it computes in float64 throughout where asked to.
    """

    label: str
    model: nn.Module
    run: Callable[[Tensor], Tensors]
    place: Callable[[str], str]
    is_float64: bool = True


def build_transformers(folder: Path, config: Json, weights: Tensors) -> Witness:
    """Builds another release's SiglipVisionModel, with the attention that it chooses itself.

    Sdpa, if it has it.
    """
    transformers = importlib.import_module("transformers")
    model = (
        transformers.SiglipVisionModel(transformers.SiglipVisionConfig.from_pretrained(folder))
        .double()
        .eval()
    )
    prefix = (
        "vision_model."
        if any(name.startswith("vision_model.") for name in model.state_dict())
        else ""
    )
    model.load_state_dict({prefix + name: tensor for name, tensor in weights.items()}, strict=True)

    def run(pixels: Tensor) -> Tensors:
        output = model(pixels)
        tokens = {"tokens": output.last_hidden_state}
        return {**tokens, "pooled": output.pooler_output} if config["vision_use_head"] else tokens

    attention = getattr(
        model.config, "_attn_implementation", "eager"
    )  # whose softmax is float32 whatever the dtype
    label = f"transformers {transformers.__version__}"
    return Witness(label, model, run, lambda point: prefix + point, is_float64=attention != "eager")


def build_timm(_: Path, config: Json, weights: Tensors) -> Witness:
    """Builds timm's tower, as its `vit_base_patch16_siglip_224` is built."""
    return with_trunk(f"timm {version('timm')}", make_trunk(config), "", config, weights)


def build_open_clip(_: Path, config: Json, weights: Tensors) -> Witness:
    """Builds open_clip's tower, as its `ViT-B-16-SigLIP` is built: a TimmModel.

    It takes the sizes from timm by the name of a model alone, so one of our size is registered
    there.
    """
    settings = importlib.import_module("open_clip").get_model_config("ViT-B-16-SigLIP")[
        "vision_cfg"
    ]

    def siglip_of_our_size(*, num_classes: int, global_pool: str, **_: object) -> Any:  # noqa: ANN401 (timm's class)
        return make_trunk(config, num_classes=num_classes, global_pool=global_pool)

    importlib.import_module("timm.models").register_model(siglip_of_our_size)
    model = importlib.import_module("open_clip.timm_model").TimmModel(
        siglip_of_our_size.__name__,
        embed_dim=config["hidden_size"],
        image_size=config["image_size"],
        pool=settings["timm_pool"] if config["vision_use_head"] else "",
        proj=settings["timm_proj"],
        pretrained=False,
    )
    label = f"open_clip {version('open_clip_torch')} (timm {version('timm')})"
    return with_trunk(label, model, "trunk.", config, weights)


def make_trunk(config: Json, **how: object) -> Any:  # noqa: ANN401 (timm's class)
    """Makes timm's VisionTransformer in our sizes.

    The activation and eps are its own, and its testimony.
    """
    pool = {"num_classes": 0, "global_pool": "map" if config["vision_use_head"] else ""}
    return importlib.import_module("timm.models").VisionTransformer(
        img_size=config["image_size"],
        patch_size=config["patch_size"],
        in_chans=config["num_channels"],
        embed_dim=config["hidden_size"],
        depth=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        mlp_ratio=(config["intermediate_size"] + 0.5)
        / config["hidden_size"],  # it rounds the product down
        class_token=False,
        **{**pool, **how},
    )


def with_trunk(label: str, model: Any, prefix: str, config: Json, weights: Tensors) -> Witness:  # noqa: ANN401
    """A model that is, or has, a trunk of timm's."""
    model.double().eval().load_state_dict(
        {prefix + k: v for k, v in to_timm(weights).items()}, strict=True
    )

    def run(pixels: Tensor) -> Tensors:
        tokens: Tensors = {}  # the model returns what is pooled alone
        norm = model.get_submodule(f"{prefix}norm")
        handle = norm.register_forward_hook(lambda _, __, output: tokens.update(tokens=output))
        returned = model(pixels)
        handle.remove()
        return {**tokens, "pooled": returned} if config["vision_use_head"] else tokens

    return Witness(label, model, run, lambda point: prefix + rename(point))


def rename(point: str) -> str:
    """The reference's point -> timm's place."""
    for theirs, timms in TIMM:
        point = point.replace(theirs, timms)
    return point


def to_timm(weights: Tensors) -> Tensors:
    """Renames the reference's tensors, and fuses or splits them into timm's."""
    rest = dict(weights)
    found = {"pos_embed": rest.pop("embeddings.position_embedding.weight")[None]}
    if "head.probe" in rest:
        found["attn_pool.latent"] = rest.pop("head.probe")
        for kind in ("weight", "bias"):
            qkv = rest.pop(f"head.attention.in_proj_{kind}").chunk(3)
            rest |= {
                f"head.attention:{part}.{kind}": tensor
                for part, tensor in zip("qkv", qkv, strict=True)
            }
    fused: dict[str, Tensors] = {}
    for name, tensor in rest.items():
        module, _, kind = name.rpartition(".")
        path, _, part = rename(module).partition(":")
        fused.setdefault(f"{path}.{kind}", {})[part] = tensor
    return found | {
        name: torch.cat([parts[part] for part in sorted(parts)]) for name, parts in fused.items()
    }


def listen(model: nn.Module, places: Iterable[str]) -> Tensors:
    """Hooks the places that the model has; returns a dict that is filled when it runs."""
    seen: Tensors = {}
    modules = dict(model.named_modules())
    for place in places:
        path, _, what = place.partition(":")
        if path in modules and what == "input":
            modules[path].register_forward_pre_hook(
                lambda _, args, p=place: seen.update({p: args[0].clone()})
            )
        elif path in modules and (not what or "/" in what):
            modules[path].register_forward_hook(
                lambda _, __, output, p=place, w=what: seen.update({p: part_of(output, w).clone()})
            )
    return seen


def part_of(output: Any, which: str) -> Tensor:  # noqa: ANN401 (whatever the module returns)
    """The first tensor of what is returned, or its `2/3`, the second of three equal parts."""
    tensor: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    number, _, parts = (which or "1/1").partition("/")
    return tensor.chunk(int(parts), -1)[int(number) - 1]


BUILDERS = {"timm": build_timm, "open_clip": build_open_clip, "transformers": build_transformers}


def main(package: str, folder: Path) -> None:
    """Hears the witness."""
    config, points = (
        json.loads((folder / name).read_text()) for name in ("config.json", "points.json")
    )
    weights = {
        name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()
    }
    pixels = load_file(folder / "inputs.safetensors")["pixel_values"].double()
    witness = BUILDERS[package](folder, config, weights)
    seen = listen(witness.model, map(witness.place, points))
    with torch.inference_mode():
        tensors = {f"output.{name}": tensor for name, tensor in witness.run(pixels).items()}
    places = {point: witness.place(point) for point in points if witness.place(point) in seen}
    tensors |= {f"tap.{point}": seen[place] for point, place in places.items()}
    save_file(
        {name: t.double().contiguous().clone() for name, t in tensors.items()},
        folder / "outputs.safetensors",
    )
    about = {"label": witness.label, "is_float64": witness.is_float64, "places": places}
    (folder / "witness.json").write_text(json.dumps(about))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
