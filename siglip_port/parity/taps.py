"""Taps: the points at which port and reference are compared inside, by forward hooks alone.

A *point* is a text: the path of a module for what it returns, `path:input` for what it is given,
and, for an `nn.MultiheadAttention`, which has no modules inside, `path:q`, `path:k`, `path:v` and
`path:context`. A tap pairs a point of the reference with one of the port.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from siglip_port.checkpoint import layouts as key_map

Visit = Callable[[str, Tensor], Tensor | None]
"""Called with a point and the tensor seen there.

A tensor that it returns takes the place of the one seen.
"""

INSIDE_ATTENTION = ("q", "k", "v", "context")

# What the rows of the key map do not name: inputs, and modules without parameters of their own.
_BLOCK, _HF_BLOCK = "transformer.encoder.encoder_blocks.{}", "encoder.layers.{}"
_BETWEEN = {
    "embeddings": "transformer.embeddings",
    f"{_HF_BLOCK}.layer_norm1:input": f"{_BLOCK}.layer_norm1:input",
    f"{_HF_BLOCK}.self_attn.out_proj:input": f"{_BLOCK}.self_attn.out_proj:input",
    f"{_HF_BLOCK}.self_attn": f"{_BLOCK}.self_attn",
    f"{_HF_BLOCK}.layer_norm2:input": f"{_BLOCK}.layer_norm2:input",
    f"{_HF_BLOCK}.mlp.fc2:input": f"{_BLOCK}.mlp.fc2:input",
    f"{_HF_BLOCK}.mlp": f"{_BLOCK}.mlp",
    _HF_BLOCK: _BLOCK,
    "post_layernorm:input": "transformer.post_layernorm:input",
    "head.attention:q": "pooling_head.attention.q_proj",
    "head.attention:k": "pooling_head.attention.k_proj",
    "head.attention:v": "pooling_head.attention.v_proj",
    "head.attention:context": "pooling_head.attention.out_proj:input",
    "head.attention": "pooling_head.attention",
    "head.mlp.fc2:input": "pooling_head.mlp.fc2:input",
    "head.mlp": "pooling_head.mlp",
    "head": "pooling_head",
}


@dataclass(frozen=True)
class Tap:
    """One place of the computation, by its points in the reference and in the port."""

    reference: str
    port: str


def siglip_taps(pooling_head: bool, table: ModuleType = key_map) -> dict[str, str]:
    """The taps of a SigLIP tower, reference -> port, for `expand`.

    From the key map's rows, so they never part ways.
    """
    rows = table.HUGGINGFACE_ENCODER + (table.HUGGINGFACE_HEAD if pooling_head else ())
    taps = {
        row.stored.removesuffix(".*"): row.port[0].removesuffix(".*")
        for row in rows
        if row.port[0].endswith("*")
    }
    taps |= {
        theirs: ours
        for theirs, ours in _BETWEEN.items()
        if pooling_head or not theirs.startswith("head")
    }
    # An nn.MultiheadAttention neither calls its out_proj nor has a module for in_proj.
    return {
        theirs: ours for theirs, ours in taps.items() if not theirs.startswith("head.attention.")
    }


def expand(taps: Mapping[str, str], reference: nn.Module, port: nn.Module) -> list[Tap]:
    """Spells taps out: `{}` stands for the number of a block, every one that the reference has.

    Raises:
        ValueError: a point is malformed, or names no module of its side at all. (A port that lacks
            some of the blocks is another matter: that is a finding.)
    """
    sides = {"reference": dict(reference.named_modules()), "port": dict(port.named_modules())}
    found = []
    for theirs, ours in taps.items():
        numbers = {
            "reference": _numbers(theirs, sides["reference"]),
            "port": _numbers(ours, sides["port"]),
        }
        for side, point in (("reference", theirs), ("port", ours)):
            if not numbers[side]:
                path = _split(point)[0]
                near = [name for name in sides[side] if name.endswith(path.rsplit(".")[-1])][:5]
                hint = f"; modules that end like it: {', '.join(near)}" if near else ""
                raise ValueError(
                    f"the {side} has no module {path!r}, which the tap {theirs!r}: {ours!r} "
                    f"names{hint}"
                )
        found += [Tap(theirs.replace("{}", n), ours.replace("{}", n)) for n in numbers["reference"]]
    return found


def _numbers(point: str, modules: Mapping[str, nn.Module]) -> list[str]:
    path, what = _split(point)
    if what not in ("output", "input", *INSIDE_ATTENTION):
        raise ValueError(f"{point!r}: after the colon comes input, q, k, v or context")
    pattern = re.escape(path).replace(r"\{\}", r"(\d+)")
    matches = [match for match in (re.fullmatch(pattern, name) for name in modules) if match]
    if what in INSIDE_ATTENTION and not all(
        isinstance(modules[m[0]], nn.MultiheadAttention) for m in matches
    ):
        raise ValueError(
            f"{point!r}: only an nn.MultiheadAttention has :{what}; tap the projection itself"
        )
    return [match[1] if match.lastindex else "" for match in matches]


def _split(point: str) -> tuple[str, str]:
    path, _, what = point.partition(":")
    return path, what or "output"


@contextlib.contextmanager
def listening(module: nn.Module, points: list[str], visit: Visit) -> Iterator[None]:
    """Calls `visit` whenever the computation of `module` passes one of `points`.

    Points it does not have are passed by.

    An input is replaced in place, where its memory allows, so that a residual connection, which
    reads the same tensor behind the hook's back, goes on with the replacement too.
    """
    modules = dict(module.named_modules())
    handles = []
    for point in points:
        path, what = _split(point)
        if path not in modules:
            continue
        target = modules[path]
        if what == "input":
            handles.append(
                target.register_forward_pre_hook(_input_hook(point, visit), with_kwargs=True)
            )
        elif what == "output":
            handles.append(target.register_forward_hook(_output_hook(point, visit)))
        else:
            handles.append(
                target.register_forward_hook(_attention_hook(point, what, visit), with_kwargs=True)
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _output_hook(point: str, visit: Visit) -> Callable[..., Any]:
    def hook(_: nn.Module, inputs: object, output: Any) -> Any:  # noqa: ANN401 (whatever the module returns)
        """The first tensor of what is returned.

        Of transformers' attention, the second is its weights.
        """
        tensor = output[0] if isinstance(output, (tuple, list)) else output
        replaced = visit(point, tensor) if isinstance(tensor, Tensor) else None
        if replaced is None:
            return None
        return (
            type(output)((replaced, *output[1:])) if isinstance(output, (tuple, list)) else replaced
        )

    return hook


def _input_hook(point: str, visit: Visit) -> Callable[..., Any]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        tensor = (
            args[0] if args else next((v for v in kwargs.values() if isinstance(v, Tensor)), None)
        )
        replaced = visit(point, tensor) if isinstance(tensor, Tensor) else None
        if tensor is None or replaced is None:
            return None
        overlaps = any(
            size > 1 and stride == 0
            for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
        if not overlaps and not isinstance(tensor, nn.Parameter):
            tensor.copy_(replaced)
            return None
        return (
            ((replaced, *args[1:]), kwargs)
            if args
            else ((), {**kwargs, next(iter(kwargs)): replaced})
        )

    return hook


def _attention_hook(point: str, what: str, visit: Visit) -> Callable[..., Any]:
    def hook(
        attention: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any], _: object
    ) -> None:
        inputs = {**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs}
        visit(point, inside_attention(attention, inputs)[what])

    return hook


def inside_attention(
    attention: nn.MultiheadAttention, inputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Works out again what an `nn.MultiheadAttention` computes inside.

    Q, k, v and context, [B, N, D] each.

    Only for `batch_first`, one width for all, and without masks: what SigLIP has.
    """
    assert attention.in_proj_weight is not None
    assert attention.in_proj_bias is not None
    rows = zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True)
    given = (inputs["query"], inputs["key"], inputs["value"])
    q, k, v = (F.linear(x, weight, bias) for x, (weight, bias) in zip(given, rows, strict=True))
    heads = [x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for x in (q, k, v)]
    context = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    return {"q": q, "k": k, "v": v, "context": context}


@dataclass(frozen=True)
class Recording:
    """One run of one side.

    Attributes:
        outputs: what it returned, by name.
        taps: what passed the points, in the order in which it came by. A module that was called
            several times, for one picture after the other, counts as called once for all.
    """

    outputs: dict[str, Tensor]
    taps: dict[str, Tensor]


def record(module: nn.Module, points: list[str], run: Callable[[], dict[str, Tensor]]) -> Recording:
    """Runs a side and keeps what passes its points."""
    seen: dict[str, list[Tensor]] = {}
    with (
        torch.inference_mode(),
        listening(module, points, lambda p, t: seen.setdefault(p, []).append(t.clone())),
    ):
        outputs = run()
    return Recording(
        outputs,
        {
            point: tensors[0] if len(tensors) == 1 else torch.cat(tensors)
            for point, tensors in seen.items()
        },
    )
