"""Shared by the ports of other models: attention, MLP, and copying of weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from siglip_port.parity import Comparison
from siglip_port.parity.results import Finding

Bug = Callable[[Any], None]
"""Function that breaks a port in place."""


class Attention(nn.Module):
    """Self-attention: [B, N, D] -> [B, N, D].

    Args:
        width: D.
        heads: Number of heads.
        fused: Whether one Linear projects to q, k and v.
        key_bias: Whether keys have a bias.
    """

    def __init__(
        self, width: int, heads: int, *, fused: bool = False, key_bias: bool = True
    ) -> None:
        super().__init__()
        self.num_heads = heads
        self.scale = (width // heads) ** -0.5
        self.fused = fused
        if fused:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.q = nn.Linear(width, width)
            self.k = nn.Linear(width, width, bias=key_bias)
            self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1) if self.fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        output: Tensor = self.out(context.transpose(1, 2).flatten(2))
        return output


class MLP(nn.Module):
    """Two Linears with an activation in between: [..., D] -> [..., D]."""

    def __init__(self, width: int, hidden: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.fc2(self.activation(self.fc1(x)))
        return output


def load(port: nn.Module, reference: nn.Module, renames: Mapping[str, str]) -> None:
    """Copy the reference's tensors to a port; unused ones of the reference are left out.

    Args:
        port: Port, possibly with fused projections `qkv`.
        reference: Reference.
        renames: Parts of names of the reference -> of the port, replaced in order.
    """
    tensors = {}
    for name, tensor in reference.state_dict().items():
        for old, new in renames.items():
            name = name.replace(old, new)
        tensors[name] = tensor
    for name, expected in port.state_dict().items():
        if ".qkv." in name:
            parts = [tensors.get(name.replace(".qkv.", f".{part}.")) for part in "qkv"]
            zeros = torch.zeros(len(expected) // 3)  # Whisper's keys have no bias
            tensors[name] = torch.cat([zeros if part is None else part for part in parts])
    port.load_state_dict({name: tensors[name] for name in port.state_dict()})


def suitable(taps: Mapping[str, str], port: nn.Module) -> dict[str, str]:
    """Leave out the taps of q, k and v if the port projects to all of them at once."""
    is_fused = any(name.endswith("qkv.weight") for name, _ in port.named_parameters())
    parts = ("attention.q", "attention.k", "attention.v")
    return {
        point: port_point
        for point, port_point in taps.items()
        if not (is_fused and port_point.endswith(parts))
    }


def change(port: nn.Module, path: str, **values: object) -> None:
    """Change attributes of a module of a port."""
    module = port.get_submodule(path)
    for name, value in values.items():
        setattr(module, name, value)


def first_finding(comparison: Comparison) -> Finding:
    """Finding that the verdict names; the comparison must be DIFFERENT."""
    assert not comparison.equal, comparison
    return comparison.findings[0][2]


def assert_first(comparison: Comparison, place: str, hint: str) -> None:
    """Assert that the first finding is at a place, and that its hint contains some text."""
    finding = first_finding(comparison)
    assert finding.reference == place, finding
    assert hint in finding.hint


def in_float32(module: nn.Module) -> None:
    """Make a module without children compute in float32 at every dtype."""
    forward = module.forward

    def run(x: Tensor) -> Tensor:
        tensors = dict(module.named_parameters())
        originals = {name: tensor.data for name, tensor in tensors.items()}
        for tensor in tensors.values():
            tensor.data = tensor.data.float()
        output: Tensor = forward(x.float())
        for name, tensor in tensors.items():
            tensor.data = originals[name]
        return output.to(x.dtype)

    module.forward = run
