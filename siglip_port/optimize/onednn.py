"""Linear layers with weights prepacked for oneDNN.

The operators are private to torch, so every use has a fallback. Source: torch 2.15
`aten/src/ATen/native/mkldnn/Linear.cpp`.
"""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F  # noqa: N812 (the name the field uses)
from torch import Tensor, nn

from siglip_port.model import MLP

ONEDNN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that oneDNN supports."""


class PrepackedLinear(nn.Linear):
    """`nn.Linear` with a second copy of its weight in oneDNN's blocked layout.

    On AMD CPUs, torch multiplies float32 matrices with MKL, which is limited to AVX2 there; oneDNN
    also uses AVX-512. With gradients, or without oneDNN, it behaves as `nn.Linear`.

    Attributes:
        activation: Fused activation, `none` or `gelu`.
        algorithm: GELU variant, `none` (exact) or `tanh`.
    """

    activation = "none"
    algorithm = ""
    _prepacked: Tensor | None = None
    _prepacked_version: tuple[object, ...] = ()

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self:
        """Share the parameters of an `nn.Linear`: weight [out, in] and bias [out]."""
        prepacked = cls.__new__(cls)
        nn.Module.__init__(prepacked)  # nn.Linear.__init__ would initialize new weights
        prepacked.in_features = linear.in_features
        prepacked.out_features = linear.out_features
        prepacked.weight = linear.weight
        prepacked.bias = linear.bias
        prepacked.training = linear.training
        return prepacked

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer and the fused activation: [..., in] -> [..., out]."""
        if not self.can_use_onednn(input):
            return self.forward_plain(input)
        output: Tensor = torch.ops.mkldnn._linear_pointwise(
            input, self.prepacked_weight(), self.bias, self.activation, [], self.algorithm
        )
        return output

    def forward_plain(self, input: Tensor) -> Tensor:
        """Apply both with torch's public operators: [..., in] -> [..., out]."""
        output = super().forward(input)
        if self.activation == "none":
            return output
        return F.gelu(output, approximate=self.algorithm)

    def can_use_onednn(self, input: Tensor) -> bool:
        """Return whether oneDNN supports the call: on a CPU, without gradients."""
        if torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad):
            return False
        return self.weight.device.type == "cpu" and self.weight.dtype in ONEDNN_DTYPES

    def prepacked_weight(self) -> Tensor:
        """Return the weight in oneDNN's layout, prepacked again if the weight has changed."""
        version = weight_version(self.weight)
        if self._prepacked is None or self._prepacked_version != version:
            self._prepacked = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach())
            self._prepacked_version = version
        return self._prepacked

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to copy and pickle, without the prepacked weight."""
        return {**self.__dict__, "_prepacked": None, "_prepacked_version": ()}


def weight_version(weight: Tensor) -> tuple[object, ...]:
    """Return a key that changes when a weight is modified or replaced."""
    counter = None if weight.is_inference() else weight._version
    return weight.data_ptr(), weight.dtype, counter


def prepack_linears(model: nn.Module) -> None:
    """Replace every `nn.Linear` of a model by a `PrepackedLinear`, in place."""
    for module in model.modules():
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, PrepackedLinear.from_linear(child))


class FusedMLP(nn.Module):
    """MLP whose activation is a part of its first layer: [..., D] -> [..., D].

    Args:
        mlp: MLP with prepacked layers, whose parts it shares.
        algorithm: GELU variant, `none` (exact) or `tanh`.
    """

    def __init__(self, mlp: MLP, algorithm: str) -> None:
        super().__init__()
        self.fc1 = PrepackedLinear.from_linear(mlp.fc1)
        self.fc1.activation = "gelu"
        self.fc1.algorithm = algorithm
        self.fc2 = mlp.fc2
        self.activation = mlp.activation
        self.train(mlp.training)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Apply both layers: [..., D] -> [..., D]."""
        output: Tensor = self.fc2(self.fc1(hidden_states))
        return output


def fuse_gelu(model: nn.Module, hidden_act: str) -> None:
    """Replace every MLP of a model by a `FusedMLP`, in place.

    Args:
        model: Model with prepacked layers.
        hidden_act: Its activation, as in `SigLipVisionConfig`.
    """
    algorithm = "none" if hidden_act == "gelu" else "tanh"
    for module in model.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, MLP):
                setattr(module, name, FusedMLP(child, algorithm))


def prepacking_problem(dtype: torch.dtype) -> str:
    """Return why weights of a dtype cannot be prepacked on this machine; empty if they can."""
    if not torch.backends.mkldnn.is_available():
        return "torch is built without oneDNN"
    with torch.inference_mode(), torch.random.fork_rng(devices=[]):  # nn.Linear draws its weights
        linear = nn.Linear(64, 32).to(dtype)
        inputs = torch.linspace(-1, 1, 16 * 64, dtype=dtype).reshape(16, 64)
        try:
            output = PrepackedLinear.from_linear(linear)(inputs).double()
            expected = linear(inputs).double()
        except (RuntimeError, AttributeError, NotImplementedError) as error:
            return f"oneDNN failed: {str(error).splitlines()[0]}"
    bound = 100 * torch.finfo(dtype).eps * expected.abs().max()
    if not (output - expected).abs().max() <= bound:
        return "oneDNN and nn.Linear give different results"
    return ""
