"""Linear layers whose weights are prepacked for oneDNN.

The operators are private to torch, so each use has a way around them. Source: torch 2.15
`aten/src/ATen/native/mkldnn/Linear.cpp`.
"""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F  # noqa: N812 (the name the field uses)
from torch import Tensor, nn

from siglip_port.model import MLP

ONEDNN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that oneDNN takes."""


class PrepackedLinear(nn.Linear):
    """A Linear that keeps its weight a second time, in the order in which oneDNN's kernels read it.

    On AMD, torch multiplies float32 matrices with MKL, which stays on AVX2 there; oneDNN uses
    everything that the processor has. With gradients, and where oneDNN cannot be used, it is an
    ordinary Linear.

    Attributes:
        activation: what follows in the same kernel: `none` or `gelu`.
        algorithm: of GELU: `none` (exact) or `tanh`.
    """

    activation = "none"
    algorithm = ""
    _prepacked: Tensor | None = None
    _prepacked_version: tuple[object, ...] = ()

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self:
        """Build one around the parameters of a Linear, [out, in] and [out]."""
        prepacked = cls.__new__(cls)
        nn.Module.__init__(prepacked)  # Linear's own draws weights first
        prepacked.in_features = linear.in_features
        prepacked.out_features = linear.out_features
        prepacked.weight = linear.weight
        prepacked.bias = linear.bias
        prepacked.training = linear.training
        return prepacked

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out], with the activation."""
        if not self.can_use_onednn(input):
            return self.forward_plain(input)
        output: Tensor = torch.ops.mkldnn._linear_pointwise(
            input, self.prepacked_weight(), self.bias, self.activation, [], self.algorithm
        )
        return output

    def forward_plain(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out], by torch's ordinary operators."""
        output = super().forward(input)
        if self.activation == "none":
            return output
        return F.gelu(output, approximate=self.algorithm)

    def can_use_onednn(self, input: Tensor) -> bool:
        """Whether the operator can be used: on the CPU, without gradients."""
        if torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad):
            return False
        return self.weight.device.type == "cpu" and self.weight.dtype in ONEDNN_DTYPES

    def prepacked_weight(self) -> Tensor:
        """Return the weight in oneDNN's order, prepacked again if the weight has changed."""
        version = weight_version(self.weight)
        if self._prepacked is None or self._prepacked_version != version:
            self._prepacked = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach())
            self._prepacked_version = version
        return self._prepacked

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied and pickled: everything but the prepacked weight."""
        return {**self.__dict__, "_prepacked": None, "_prepacked_version": ()}


def weight_version(weight: Tensor) -> tuple[object, ...]:
    """Return a value that changes when a weight is written to or replaced."""
    counter = None if weight.is_inference() else weight._version
    return weight.data_ptr(), weight.dtype, counter


def prepack_linears(model: nn.Module) -> None:
    """Replace every Linear of a model, in place, by one with a prepacked weight."""
    for module in model.modules():
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, PrepackedLinear.from_linear(child))


def fuse_gelu(model: nn.Module) -> None:
    """Compute GELU in the kernel of the prepacked Linear before it, in place."""
    for module in model.modules():
        if isinstance(module, MLP):
            linear = module.fc1
            assert isinstance(linear, PrepackedLinear)
            linear.activation = "gelu"
            linear.algorithm = "none" if module.activation is F.gelu else "tanh"
            module.activation = nn.Identity()


def prepacking_problem(dtype: torch.dtype) -> str:
    """Return why Linears of a dtype cannot be prepacked on this machine; empty if they can."""
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    with torch.inference_mode(), torch.random.fork_rng(devices=[]):  # a Linear draws its weights
        linear = nn.Linear(64, 32).to(dtype)
        inputs = torch.linspace(-1, 1, 16 * 64, dtype=dtype).reshape(16, 64)
        try:
            output = PrepackedLinear.from_linear(linear)(inputs).double()
            expected = linear(inputs).double()
        except (RuntimeError, AttributeError, NotImplementedError) as error:
            return f"oneDNN cannot do it here: {str(error).splitlines()[0]}"
    bound = 100 * torch.finfo(dtype).eps * expected.abs().max()
    if not (output - expected).abs().max() <= bound:
        return "oneDNN's result is not that of torch's own Linear"
    return ""
