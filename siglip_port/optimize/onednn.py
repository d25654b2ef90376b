"""What torch can do but does not promise to keep.

The only file that uses its private parts, each with a way around.

Sources: torch 2.15 `aten/src/ATen/native/mkldnn/Linear.cpp`, `torch/csrc/inductor/aoti_package`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any, Self, cast

import torch
import torch.nn.functional as F  # noqa: N812 (the name the field uses)
from torch import Tensor, nn

from siglip_port.model import MLP

PACKED = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that oneDNN takes."""


class PackedLinear(nn.Linear):
    """A Linear whose weight is kept a second time, in the order in which oneDNN's kernels read it.

    On AMD, torch multiplies float32 matrices with MKL, which stays on AVX2 there; oneDNN uses all
    that the processor has. With gradients, and where the operator is missing, it is an ordinary
    Linear.

    Attributes:
        activation: what follows in the same kernel: `none`, or `gelu` with the `algorithm` `none`
            (exact) or `tanh`.
    """

    activation, algorithm = "none", ""
    _packed: Tensor | None = None
    _packed_from: tuple[object, ...] = ()

    @classmethod
    def of(cls, linear: nn.Linear) -> Self:
        """Takes over the parameters of a Linear, [out, in] and [out]."""
        packed = cls.__new__(cls)
        nn.Module.__init__(packed)  # Linear's own draws weights first
        packed.in_features, packed.out_features = linear.in_features, linear.out_features
        packed.weight, packed.bias, packed.training = linear.weight, linear.bias, linear.training
        return packed

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out], with the activation."""
        tracked = torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad)
        if tracked or self.weight.device.type != "cpu" or self.weight.dtype not in PACKED:
            return self._plain(input)
        if self._packed is None or self._packed_from != _identity(self.weight):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach())
            self._packed_from = _identity(self.weight)
        return torch.ops.mkldnn._linear_pointwise(  # type: ignore[no-any-return]
            input, self._packed, self.bias, self.activation, [], self.algorithm
        )

    def _plain(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        return output if self.activation == "none" else F.gelu(output, approximate=self.algorithm)

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: all but the packed weight."""
        return {**self.__dict__, "_packed": None, "_packed_from": ()}


def _identity(weight: Tensor) -> tuple[object, ...]:
    """Changes when a weight is written to, or replaced."""
    return weight.data_ptr(), weight.dtype, None if weight.is_inference() else weight._version


def pack(model: nn.Module, *, fuse: bool) -> None:
    """Packs every Linear of a model, in place.

    Args:
        model: any.
        fuse: whether to compute GELU in the kernel of the Linear before it.
    """
    for part in model.modules():
        for name, child in list(part.named_children()):
            if type(child) is nn.Linear:
                setattr(part, name, PackedLinear.of(child))
    for part in model.modules() if fuse else ():
        if isinstance(part, MLP):
            exact = part.activation is F.gelu
            first = cast("PackedLinear", part.fc1)
            first.activation, first.algorithm = "gelu", "none" if exact else "tanh"
            part.activation = nn.Identity()


def why_not_packed(dtype: torch.dtype) -> str:
    """Says why Linears of a dtype cannot be packed on this machine; empty if they can."""
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    with torch.inference_mode(), torch.random.fork_rng(devices=[]):  # a Linear draws its weights
        linear, ones = (
            nn.Linear(64, 32).to(dtype),
            torch.linspace(-1, 1, 16 * 64, dtype=dtype).reshape(16, 64),
        )
        try:
            packed, plain = PackedLinear.of(linear)(ones).double(), linear(ones).double()
        except (RuntimeError, AttributeError, NotImplementedError) as error:
            return f"oneDNN cannot do it here: {str(error).splitlines()[0]}"
    if not (packed - plain).abs().max() <= 100 * torch.finfo(dtype).eps * plain.abs().max():
        return "oneDNN's result is not that of torch's own Linear"
    return ""


def quantise(model: nn.Module) -> str:
    """Turns every Linear of a float32 model, in place, into one of int8 weights.

    Inputs are quantised as they come.

    By `torch.ao.quantization`, which torch means to drop in favour of torchao; torchao's int8 needs
    a compiler on CPUs.

    Returns:
        Why it cannot be done here; empty if it is done.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from torch.ao.quantization import quantize_dynamic

            quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=True)
        except (ImportError, AttributeError, RuntimeError, NotImplementedError) as error:
            return f"this torch cannot do it: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
    return ""


def load_package(path: str | os.PathLike[str]) -> Callable[[Tensor], list[Tensor]]:
    """Loads what `siglip_port.optimize.export.export_package` wrote.

    [B, C, S, S] -> tokens [B, N, D] and pooled [B, D].

    By the class behind `torch._inductor.aoti_load_package`, since that imports the whole compiler
    first: seconds.

    Args:
        path: a `.pt2` file of this machine's own making: loading one runs what is in it.

    Raises:
        RuntimeError: it is no package, or not one for this torch and this processor.
    """
    try:
        loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
    except (AttributeError, TypeError):
        from torch._inductor import aoti_load_package

        return aoti_load_package(str(path))
    return lambda pixel_values: list(loader.boxed_run([pixel_values]))
