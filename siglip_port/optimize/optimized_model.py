"""A model whose transformer may run in an engine, and how one is made of a loaded model."""

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
"""The dtypes that the parameters of an optimized model can have."""


class OptimizedModel(SigLipVisionModel):
    """A model in its fastest form for inference, as `optimize` returns it.

    It has the same methods and shapes as the model that it was made of, and no gradients for its
    parameters.

    Attributes:
        choice: the engine, and why it was chosen: `print(model.choice)`.
    """

    choice: Choice


class EngineTransformer(SigLipVisionTransformer):
    """Runs images of the model's own size in an engine, and all other input in its own modules.

    Copies, pickles, and transformers that were moved or cast afterwards run in their own modules
    alone, since an engine holds weights of its own, in one dtype, on one machine.

    Attributes:
        run: the engine, [B, C, S, S] -> [B, N, D] in the model's dtype; None for no engine.
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
        """[B, C, S, S] -> [B, N, D]; or packed patches."""
        has_patches = pixel_attention_mask is not None or spatial_shapes is not None
        if self.run is None or has_patches or not self.fits_engine(pixel_values):
            return super().forward(pixel_values, pixel_attention_mask, spatial_shapes)
        validate_images(pixel_values, self.embeddings.config)
        parameter = self.post_layernorm.weight
        inputs = pixel_values.detach().to(parameter.device, parameter.dtype)
        return self.run(inputs.contiguous())

    def fits_engine(self, pixel_values: object) -> bool:
        """Whether an engine can take this input: a batch of the model's own size, no gradients."""
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
        """Return what is copied and pickled: everything but the engine."""
        return {**self.__dict__, "run": None}


def inference_copy(model: SigLipVisionModel, dtype: torch.dtype | None) -> OptimizedModel:
    """Build a model for inference around the same parameters, or around casts of them.

    Args:
        model: not changed.
        dtype: of the copy's parameters; None to share the model's own.

    Raises:
        ValueError: the parameters are not those of a SigLIP model of one floating point dtype.
    """
    copy, _ = build_on_meta(model.config, "the configuration", OptimizedModel)
    state = {}
    for name, tensor in model.state_dict().items():
        state[name] = tensor.detach().to(dtype or tensor.dtype)
    try:
        copy.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(
            "the parameters are not those of a SigLIP encoder (it was wrapped, quantized, or given "
            "adapters); merge or remove what was added first"
        ) from error
    dtypes = {parameter.dtype for parameter in copy.parameters()}
    if len(dtypes) > 1 or not dtypes <= set(FLOAT_DTYPES):
        raise ValueError(
            f"the parameters are of {', '.join(map(str, dtypes))}: name one dtype with dtype="
        )
    copy.provenance = model.provenance
    copy.preprocessor_config = model.preprocessor_config
    return copy.requires_grad_(False).eval()
