"""What an error looks like.

Known mistakes are tried on the reference's own numbers, until one gives the port's.

A hint is given only where a mistake explains the port's values to `MATCH`, which no chance does.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from siglip_port.parity.metrics import bits, relative_error
from siglip_port.parity.observe import ReferenceRun
from siglip_port.parity.sides import cast

MATCH = 1e-8

MEANS = {
    "CLIP": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

Guess = tuple[str, Tensor]
"""What the mistake is called, and what the reference's numbers would be with it.

Made when it is its turn.
"""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "exact (erf) GELU": F.gelu,
    "tanh GELU": lambda x: F.gelu(x, approximate="tanh"),
    "QuickGELU, x sigmoid(1.702 x)": lambda x: x * torch.sigmoid(1.702 * x),
    "SiLU": F.silu,
    "ReLU": F.relu,
    "no activation": lambda x: x,
}


def explain_tap(run: ReferenceRun, point: str, value: Tensor) -> str:
    """The hint for a tap that differs.

    Bugs are tried on what the reference's module is given there.
    """
    model = run.reference.module
    module = model.get_submodule(point.partition(":")[0])
    inputs: list[Tensor] = []

    def keep_inputs(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                inputs.append(value.clone())

    handle = module.register_forward_pre_hook(keep_inputs, with_kwargs=True)
    try:
        with cast(model, run.dtype, torch.float64):
            run.reference.run(run.exact_inputs)
            given = inputs[0] if inputs else None
            return explain(model, point, given, run.exact.taps, value)
    finally:
        handle.remove()


def explain(
    reference: nn.Module,
    point: str,
    given: Tensor | None,
    taps: Mapping[str, Tensor],
    value: Tensor,
) -> str:
    """Says what the port's value at a tap looks like, given right inputs.

    Empty where it looks like nothing known.

    Args:
        reference: the module in float64, for its parameters.
        point: the tap, in its names.
        given: what the reference's module there was given, if anything.
        taps: the truth at all taps.
        value: what the port had.
    """
    truth = taps[point]
    if value.shape != truth.shape:
        return f"its shape is {list(value.shape)}, expected {list(truth.shape)}"
    path, _, what = point.partition(":")
    modules = dict(reference.named_modules())
    with torch.inference_mode():
        guesses = itertools.chain(
            _by_kind(modules, path, what, given, taps), _elsewhere(point, taps)
        )
        module = modules[path]
        eps = (
            _fitted_eps(module, given, value)
            if isinstance(module, nn.LayerNorm) and given is not None and not what
            else ""
        )
        return eps or _first(guesses, value) or _by_form(value, truth)


def explain_output(value: Tensor, truth: Tensor) -> str:
    """The same for an output, of which nothing more is known."""
    return (
        _by_form(value, truth)
        if value.shape == truth.shape
        else f"its shape is {list(value.shape)}"
    )


def explain_weight(value: Tensor, name: str, reference: Mapping[str, Tensor]) -> str:
    """The same for a tensor of parameters that is not the reference's."""
    truth = reference[name]
    if not value.any():
        return "all zero: not loaded?"
    for other, tensor in reference.items():
        if other != name and tensor.shape == value.shape and torch.equal(bits(tensor), bits(value)):
            return f"it is {other}"
    if value.ndim == 2 and value.shape[0] == value.shape[1] and torch.equal(value.T, truth):
        return "transposed"
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if torch.equal(truth.to(dtype).to(truth.dtype), value):
            return f"rounded to {str(dtype)[6:]}"
    same = value == truth
    if not value[~same].any():
        return f"{int((~same).sum())} elements are zero: a truncated file?"
    rows = value.flatten(1) if value.ndim > 1 else value[:, None]
    if torch.equal(
        rows.sort(dim=0).values,
        (truth.flatten(1) if truth.ndim > 1 else truth[:, None]).sort(dim=0).values,
    ):
        return "the same rows in another order"
    if torch.equal(value.flatten().sort().values, truth.flatten().sort().values):
        return "the same numbers in another order"
    return _scaled(value, truth)


# --- guesses by what stands at the tap ------------------------------------------------------------


def _by_kind(
    modules: Mapping[str, nn.Module],
    path: str,
    what: str,
    x: Tensor | None,
    taps: Mapping[str, Tensor],
) -> Iterator[Guess]:
    module: Any = modules[path]
    before = _before(taps, f"{path}:{what}" if what else path)
    truth = taps[f"{path}:{what}" if what else path]
    if what in ("q", "k", "v") and isinstance(module, nn.MultiheadAttention):
        yield from _inside(module, what, x, before, modules, path)
    elif what == "context" or (what == "input" and path.endswith("proj")):
        heads = _heads(modules[path if what == "context" else path.rpartition(".")[0]])
        if heads and len(before) >= 3:
            q, k, v = list(before.values())[-3:]
            yield from _attention(q, k, v, heads)
    elif what == "input" and isinstance(module, nn.Linear):
        given = next((t for t in reversed(list(before.values())) if t.shape == truth.shape), None)
        if given is not None:
            yield from _activation(given)
    elif what == "input":
        yield from _residual(before, truth)
    elif isinstance(module, nn.LayerNorm) and x is not None:
        yield from _layer_norm(module, x, truth)
        yield from _other_weights(
            modules, path, lambda m: F.layer_norm(x, m.normalized_shape, m.weight, m.bias, m.eps)
        )
    elif isinstance(module, nn.Linear) and x is not None:
        yield from _linear(module.weight, module.bias, x)
        yield from _other_weights(modules, path, lambda m: F.linear(x, m.weight, m.bias))
    elif isinstance(module, nn.Conv2d) and x is not None:
        yield from _convolution(module, x)
    elif not list(module.children()) and x is not None:
        yield from _activation(x)
    else:
        yield from _embeddings(before, truth)
        yield from _residual(before, truth)


def _activation(x: Tensor) -> Iterator[Guess]:
    for label, function in ACTIVATIONS.items():
        yield label, function(x)
        for dtype in (torch.bfloat16, torch.float16):
            yield f"{label} in {str(dtype)[6:]}", function(x.to(dtype)).double()


def _other_weights(
    modules: Mapping[str, nn.Module], path: str, run: Callable[[Any], Tensor]
) -> Iterator[Guess]:
    """The same module with the parameters of another one of its kind."""
    shapes = [p.shape for p in modules[path].parameters()]
    for name, module in modules.items():
        if (
            name != path
            and type(module) is type(modules[path])
            and [p.shape for p in module.parameters()] == shapes
        ):
            yield f"it has the weights of {name}", run(module)


def _inside(
    attention: nn.MultiheadAttention,
    what: str,
    x: Tensor | None,
    before: Mapping[str, Tensor],
    modules: Mapping[str, nn.Module],
    path: str,
) -> Iterator[Guess]:
    """q, k or v of an `nn.MultiheadAttention`: a Linear made of a third of its rows."""
    if what != "q":  # keys and values are made of the tokens, the last thing before the head
        x = next(
            (t for name, t in reversed(list(before.items())) if not name.startswith(path)), None
        )
    if x is None or attention.in_proj_weight is None:
        return
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    mine = "qkv".index(what)
    yield from _linear(weights[mine], biases[mine], x)
    for i, other in enumerate("qkv"):
        if i != mine:
            yield f"it is made with the weights of {other}", F.linear(x, weights[i], biases[i])
            yield f"it has the bias of {other}", F.linear(x, weights[mine], biases[i])
    fused = attention.in_proj_weight[mine::3], attention.in_proj_bias[mine::3]
    yield "the fused weights read as interleaved", F.linear(x, *fused)


def _embeddings(before: Mapping[str, Tensor], truth: Tensor) -> Iterator[Guess]:
    """For patches plus a table of positions."""
    patches = next((t for t in reversed(list(before.values())) if t.ndim == 4), None)
    if patches is None or truth.ndim != 3:
        return
    tokens = patches.flatten(2).transpose(1, 2)
    if tokens.shape != truth.shape:
        return
    table = (truth - tokens)[:1]
    n, h = truth.shape[1], patches.shape[2]
    grid = table.unflatten(1, (h, -1))
    yield "no position embedding", tokens
    yield "position embedding added twice", tokens + 2 * table
    yield "every token at position 0", tokens + table[:, :1]
    for shift in (1, -1):
        yield f"positions shifted by {shift}", tokens + table.roll(shift, 1)
    yield "positions reversed", tokens + table.flip(1)
    if h * h == n:
        yield "position grid transposed (x for y)", tokens + grid.transpose(1, 2).flatten(1, 2)
        yield "patches in columns", patches.transpose(2, 3).flatten(2).transpose(1, 2) + table
    yield "patches reversed", tokens.flip(1) + table
    yield (
        "patches flattened without the transpose",
        patches.flatten(2).reshape(tokens.shape) + table,
    )
    yield "position table rounded to bfloat16", tokens + table.float().bfloat16()


def _before(taps: Mapping[str, Tensor], point: str) -> dict[str, Tensor]:
    names = list(taps)
    return {name: taps[name] for name in names[: names.index(point)]}


def _heads(attention: nn.Module) -> int:
    return int(getattr(attention, "num_heads", 0) or getattr(attention, "num_attention_heads", 0))


def _layer_norm(norm: nn.LayerNorm, x: Tensor, truth: Tensor) -> Iterator[Guess]:
    width, eps = norm.normalized_shape, norm.eps
    gain, bias = norm.weight, norm.bias
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
    unit = (x - mean) / (var + eps).sqrt()
    yield "no LayerNorm", x
    yield "variance with N - 1", (x - mean) / (x.var(-1, keepdim=True) + eps).sqrt() * gain + bias
    yield "eps outside the square root", (x - mean) / (var.sqrt() + eps) * gain + bias
    yield (
        "RMSNorm: the mean is not taken out",
        x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain + bias,
    )
    yield "no gain", unit + bias
    yield "no bias", unit * gain
    yield "neither gain nor bias", unit
    yield "gain 1 + w", unit * (1 + gain) + bias
    yield "applied twice", F.layer_norm(truth, width, gain, bias, eps)
    yield "mean taken out, not divided by the deviation", (x - mean) * gain + bias
    for dtype in (torch.bfloat16, torch.float16):
        yield (
            f"LayerNorm in {str(dtype)[6:]}",
            F.layer_norm(x.to(dtype), width, gain.to(dtype), bias.to(dtype), eps).double(),
        )


def _fitted_eps(norm: nn.LayerNorm, x: Tensor, value: Tensor) -> str:
    """Solves a LayerNorm for the eps that gives the port's values, and tells it if it gives all of them."""
    unit = (value - norm.bias) / norm.weight
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
    factor = (unit * (x - mean)).mean(-1, keepdim=True) / var  # 1 / sqrt(var + eps)
    eps = float((factor**-2 - var).median())
    near = float(f"{eps:.0e}")  # What people write is a round number.
    eps = near if abs(eps - near) < 1e-3 * abs(near) else eps
    if (
        eps < 0
        or relative_error(
            F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, eps), value
        )
        > MATCH
    ):
        return ""
    return f"eps {eps:.3g} instead of {norm.eps:g}"


def _linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Iterator[Guess]:
    yield "no bias", F.linear(x, weight)
    yield "not applied", x
    if bias is not None:
        yield "no weight: the bias alone", bias.expand(*x.shape[:-1], -1)
        yield "bias added twice", F.linear(x, weight, 2 * bias)
        yield "bias subtracted", F.linear(x, weight, -bias)
    if weight.shape[0] == weight.shape[1]:
        yield "weight transposed", F.linear(x, weight.T, bias)
    for dtype in (torch.bfloat16, torch.float16):
        narrow, name = functools.partial(_rounded, dtype=dtype), str(dtype)[6:]
        yield (
            f"weights rounded to {name}",
            F.linear(x, narrow(weight), None if bias is None else narrow(bias)),
        )
        yield f"weight rounded to {name}", F.linear(x, narrow(weight), bias)
        yield f"its input rounded to {name}", F.linear(narrow(x), weight, bias)
    unnormed = F.layer_norm(x, x.shape[-1:])
    yield "its input normalised again", F.linear(unnormed, weight, bias)


def _rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).to(tensor.dtype)


def _convolution(conv: nn.Conv2d, x: Tensor) -> Iterator[Guess]:
    def convolve(weight: Tensor, bias: Tensor | None = conv.bias, pixels: Tensor = x) -> Tensor:
        return F.conv2d(pixels, weight, bias, conv.stride)

    weight = conv.weight
    yield "no bias", convolve(weight, None)
    yield "channels reversed (BGR for RGB)", convolve(weight.flip(1))
    yield "kernel transposed (x for y)", convolve(weight.transpose(2, 3))
    yield "kernel flipped", convolve(weight.flip(2, 3))
    c, h, w = weight.shape[1:]
    yield (
        "kernel read as (h, w, channel)",
        convolve(weight.flatten(1).unflatten(1, (h, w, c)).permute(0, 3, 1, 2)),
    )
    yield "picture transposed (x for y)", convolve(weight, pixels=x.transpose(2, 3))
    yield "picture mirrored", convolve(weight, pixels=x.flip(3))
    yield "picture shifted by one pixel", convolve(weight, pixels=x.roll((1, 1), (2, 3)))
    yield "pixels in [0, 1]", convolve(weight, pixels=(x + 1) / 2)
    yield "pixels in [0, 255]", convolve(weight, pixels=(x + 1) / 2 * 255)
    yield "pixels divided by 256 for 255", convolve(weight, pixels=(x + 1) * 255 / 256 - 1)
    for name, (mean, std) in MEANS.items():
        m, d = (torch.tensor(t, dtype=x.dtype, device=x.device)[:, None, None] for t in (mean, std))
        if x.shape[1] == len(mean):
            yield (
                f"pixels normalised with {name}'s mean and std",
                convolve(weight, pixels=((x + 1) / 2 - m) / d),
            )
    for dtype in (torch.bfloat16, torch.float16):
        narrow, kind = functools.partial(_rounded, dtype=dtype), str(dtype)[6:]
        yield f"pixels rounded to {kind}", convolve(weight, pixels=narrow(x))
        yield (
            f"weights rounded to {kind}",
            convolve(narrow(weight), None if conv.bias is None else narrow(conv.bias)),
        )
    yield (
        "pixels quantised to 8 bits",
        convolve(weight, pixels=((x + 1) * 127.5).round() / 127.5 - 1),
    )
    yield "pixels normalised twice", convolve(weight, pixels=(x - 0.5) / 0.5)


def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Iterator[Guess]:
    if q.shape[-1] % heads or q.ndim != 3:
        return

    def split(x: Tensor, h: int = heads) -> Tensor:
        heads_apart: Tensor = x.unflatten(-1, (h, -1)).transpose(1, 2)
        return heads_apart

    def merge(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)

    qh, kh, vh = split(q), split(k), split(v)
    width = qh.shape[-1]
    scores = qh @ kh.mT

    def attend(
        scale: float, change: Callable[[Tensor], Tensor] = lambda s: s, h: int = heads
    ) -> Tensor:
        return merge(change(split(q, h) @ split(k, h).mT * scale).softmax(-1) @ split(v, h))

    def masked(hide: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda s: s.masked_fill(hide, -math.inf)

    usual = width**-0.5
    for label, scale in {
        "attention not scaled": 1.0,
        "attention scaled by 1 / sqrt(width of all heads)": q.shape[-1] ** -0.5,
        "attention scaled by 1 / sqrt(number of heads)": heads**-0.5,
        "attention scaled twice": 1 / width,
        "attention scaled by sqrt(head_dim)": width**0.5,
    }.items():
        yield label, attend(scale)
    for padded in (16, 32, 64, 80, 96, 128, 256):
        if padded > width:
            yield f"attention scaled for a head_dim padded to {padded}", attend(padded**-0.5)
    n, m = scores.shape[-2:]
    causal = torch.ones(n, m, dtype=torch.bool, device=q.device).triu(1)
    yield "causal mask", attend(usual, masked(causal))
    for label, index in (("last", -1), ("first", 0)):
        hide = torch.zeros(m, dtype=torch.bool, device=q.device)
        hide[index] = True
        yield f"{label} key masked", attend(usual, masked(hide))
    yield "softmax over the queries", merge((scores * usual).softmax(-2) @ vh)
    yield "softmax with one added to the sum", merge(_softmax_plus_one(scores * usual) @ vh)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype)[6:]
        yield f"softmax in {name}", merge((scores * usual).to(dtype).softmax(-1).double() @ vh)
        yield (
            f"softmax in {name}, of scores in float64",
            merge((scores * usual).softmax(-1).to(dtype).double() @ vh),
        )
    for other in range(1, q.shape[-1] + 1):
        if other != heads and q.shape[-1] % other == 0:
            yield (
                f"{other} heads instead of {heads}",
                attend((q.shape[-1] // other) ** -0.5, h=other),
            )
    yield "uniform attention", merge(torch.full_like(scores, 1 / m) @ vh)
    context = (scores * usual).softmax(-1) @ vh
    yield "heads merged without the transpose", context.flatten(1).unflatten(1, (n, -1))
    yield "heads merged as (width, head)", context.permute(0, 2, 3, 1).flatten(2)
    if q.shape[1] == k.shape[1]:
        plain = [x.reshape(x.shape[0], heads, -1, width) for x in (q, k, v)]
        yield (
            "heads split without the transpose",
            merge((plain[0] @ plain[1].mT * usual).softmax(-1) @ plain[2]),
        )
    inside = [x.unflatten(-1, (-1, heads)).permute(0, 3, 1, 2) for x in (q, k, v)]
    weights = (inside[0] @ inside[1].mT * usual).softmax(-1)
    yield "heads split as (width, head)", merge(weights @ inside[2])
    yield (
        "heads split and merged as (width, head)",
        (weights @ inside[2]).permute(0, 2, 3, 1).flatten(2),
    )


def _softmax_plus_one(scores: Tensor) -> Tensor:
    return F.pad(scores, (0, 1)).softmax(-1)[..., :-1]


def _residual(before: Mapping[str, Tensor], truth: Tensor) -> Iterator[Guess]:
    """For the sum of two earlier tensors, x + y: which one is missing, or is another."""
    same = [(name, t) for name, t in before.items() if t.shape == truth.shape][-12:]
    for i, (second, y) in reversed(list(enumerate(same))):
        x = truth - y
        for first, t in same[:i]:
            if relative_error(t, x) < MATCH:
                yield f"without {second}", t
                yield f"without the residual connection from {first}", y
                yield f"{second} added twice", t + 2 * y
                yield f"{second} and {first} normalised", F.layer_norm(t + y, t.shape[-1:])
                for third, z in same:
                    if third not in (first, second):
                        yield f"the residual connection comes from {third}", z + y
                return


def _elsewhere(point: str, taps: Mapping[str, Tensor]) -> Iterator[Guess]:
    for name, tensor in taps.items():
        if name != point and tensor.shape == taps[point].shape:
            yield f"it is what the reference has at {name}", tensor


def _first(guesses: Iterable[Guess], value: Tensor) -> str:
    for label, candidate in guesses:
        if candidate.shape == value.shape and relative_error(candidate, value) < MATCH:
            return label
    return ""


# --- guesses by the numbers alone -----------------------------------------------------------------


def _by_form(value: Tensor, truth: Tensor) -> str:
    if not value.isfinite().all():
        return "not finite"
    if not value.any():
        return "all zero"
    return _scaled(value, truth) or _permuted(value, truth) or _narrow(value, truth)


def _scaled(value: Tensor, truth: Tensor) -> str:
    v, t = value.double(), truth.double()
    factor = float((v * t).sum() / t.square().sum())
    if factor and relative_error(v, factor * t) < MATCH and abs(factor - 1) > MATCH:
        return f"scaled by {factor:.6g}"
    if v.ndim > 1:
        lengths = v.norm(dim=-1, keepdim=True) / t.norm(dim=-1, keepdim=True)
        if relative_error(lengths * t, v) < MATCH and float(v.norm(dim=-1).std()) < MATCH:
            return f"every vector scaled to length {float(v.norm(dim=-1).mean()):.6g}"
    return ""


def _permuted(value: Tensor, truth: Tensor) -> str:
    for dim, what in enumerate(
        ("pictures", "tokens", "features") if value.ndim == 3 else ("pictures", "features")
    ):
        if dim >= value.ndim or value.shape[dim] < 2:
            continue
        n = value.shape[dim]
        orders = {"reversed": list(range(n - 1, -1, -1))}
        orders |= {f"shifted by {s}": [(i - s) % n for i in range(n)] for s in (1, -1)}
        side = math.isqrt(n)
        if side * side == n and side > 1:
            orders["transposed as a grid"] = [(i % side) * side + i // side for i in range(n)]
        for label, order in orders.items():
            if (
                relative_error(
                    truth.index_select(dim, torch.tensor(order, device=truth.device)), value
                )
                < MATCH
            ):
                return f"{what} {label}"
    if (
        value.ndim == 3
        and min(value.shape[1:]) > 1
        and relative_error(truth.transpose(1, 2).reshape(truth.shape), value) < MATCH
    ):
        return "reshaped where it should be transposed"
    return ""


def _narrow(value: Tensor, truth: Tensor) -> str:
    """A value that was cast lies on the grid of the narrower dtype."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if torch.equal(value.to(dtype).to(value.dtype), value) and not torch.equal(
            truth.to(dtype).to(truth.dtype), truth
        ):
            return f"cast to {str(dtype)[6:]}"
    return ""
