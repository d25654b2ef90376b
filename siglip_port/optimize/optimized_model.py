"""A model whose transformer may run in an engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from siglip_port.checkpoint import build_on_meta
from siglip_port.model import SigLipVisionModel, SigLipVisionTransformer
from siglip_port.optimize.choice import Choice
from siglip_port.patches import Mask, Shapes
from siglip_port.validation import validate_images

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Supported parameter dtypes of optimized models."""


class OptimizedModel(SigLipVisionModel):
    """Model for inference, returned by `optimize`.

    It has the methods and shapes of the original model. Parameters do not require gradients.

    Attributes:
        choice: The engine with its measurements: `print(model.choice)`.
    """

    choice: Choice


class EngineTransformer(SigLipVisionTransformer):
    """Transformer that runs images of `config.image_size` in an engine, other input in its modules.

    Copies, unpickled models, and models that were moved or cast lose the engine, because it holds
    its own weights for one dtype and machine.

    Attributes:
        run: The engine, [B, C, S, S] -> [B, N, D] in the model's dtype; None to run the modules.
    """

    run: Callable[[Tensor], Tensor] | None

    def __init__(
        self, transformer: SigLipVisionTransformer, run: Callable[[Tensor], Tensor]
    ) -> None:
        nn.Module.__init__(self)
        self.embeddings = transformer.embeddings
        self.encoder = transformer.encoder
        self.post_layernorm = transformer.post_layernorm
        self.run = run

    def forward(
        self, pixel_values: Tensor, pixel_attention_mask: Mask = None, spatial_shapes: Shapes = None
    ) -> Tensor:
        """Encode images [B, C, S, S] or packed patches [B, N, P * P * C] into tokens [B, N, D]."""
        has_patches = pixel_attention_mask is not None or spatial_shapes is not None
        if self.run is None or has_patches or not self.fits_engine(pixel_values):
            return super().forward(pixel_values, pixel_attention_mask, spatial_shapes)
        validate_images(pixel_values, self.embeddings.config)
        parameter = self.post_layernorm.weight
        inputs = pixel_values.detach().to(parameter.device, parameter.dtype)
        return self.run(inputs.contiguous())

    def fits_engine(self, pixel_values: object) -> bool:
        """Return whether an engine supports the input.

        That is a nonempty batch of images of `config.image_size`, without gradients.
        """
        size = self.embeddings.config.image_size
        if not isinstance(pixel_values, Tensor) or pixel_values.shape[2:] != (size, size):
            return False
        if torch.is_grad_enabled() and pixel_values.requires_grad:
            return False
        return len(pixel_values) > 0

    def _apply(self, *args: Any, **kwargs: Any) -> Self:  # noqa: ANN401 (torch's own signature)
        before = [(p.data_ptr(), p.dtype) for p in self.parameters()]
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        if before != [(p.data_ptr(), p.dtype) for p in self.parameters()]:
            self.run = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to copy and pickle, without the engine."""
        return {**self.__dict__, "run": None}


@torch.inference_mode(False)  # gradients of pixels need parameters that are not inference tensors
def inference_copy(model: SigLipVisionModel, dtype: torch.dtype | None) -> OptimizedModel:
    """Copy a model for inference; parameters are shared unless cast.

    Args:
        model: Model, unchanged.
        dtype: Parameter dtype of the copy; None for the model's.

    Raises:
        ValueError: The parameters do not match the configuration, or have several or unsupported
            dtypes.
    """
    copy, _ = build_on_meta(model.config, "the configuration", OptimizedModel)
    state = {}
    for name, tensor in model.state_dict().items():
        state[name] = tensor.detach().to(dtype or tensor.dtype)
    try:
        copy.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(
            "the parameters do not match the model's configuration; unwrap the model, merge "
            "adapters and undo quantization first"
        ) from error
    dtypes = {parameter.dtype for parameter in copy.parameters()}
    if len(dtypes) > 1 or not dtypes <= set(FLOAT_DTYPES):
        raise ValueError(
            f"parameters must have one dtype of {', '.join(map(str, FLOAT_DTYPES))}, got "
            f"{', '.join(sorted(map(str, dtypes)))}; pass dtype="
        )
    copy.provenance = model.provenance
    copy.preprocessing = model.preprocessing
    return copy.requires_grad_(False).eval()
