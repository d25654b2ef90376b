"""A PyTorch SigLIP vision encoder that loads every published checkpoint layout, with its proof."""

import importlib
from typing import TYPE_CHECKING, Any

from siglip_port.config import SigLipVisionConfig
from siglip_port.model import (
    MLP,
    EncoderBlock,
    MultiheadAttention,
    PoolingHead,
    SigLipEncoder,
    SigLipVisionModel,
    SigLipVisionTransformer,
    VisionEmbeddings,
)
from siglip_port.patches import pack, patchify

if TYPE_CHECKING:
    from siglip_port.checkpoint import CheckpointError, HubUnreachableError, Provenance
    from siglip_port.optimize import OptimizedModel, optimize

__version__ = "0.1.0"

__all__ = [
    "MLP",
    "CheckpointError",
    "EncoderBlock",
    "HubUnreachableError",
    "MultiheadAttention",
    "OptimizedModel",
    "PoolingHead",
    "Provenance",
    "SigLipEncoder",
    "SigLipVisionConfig",
    "SigLipVisionModel",
    "SigLipVisionTransformer",
    "VisionEmbeddings",
    "optimize",
    "pack",
    "patchify",
]

# Imported when they are first asked for: the model itself needs no files, and nothing optimized.
_IMPORTED_LATER = {
    "CheckpointError": "siglip_port.checkpoint",
    "HubUnreachableError": "siglip_port.checkpoint",
    "Provenance": "siglip_port.checkpoint",
    "OptimizedModel": "siglip_port.optimize",
    "optimize": "siglip_port.optimize",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 (whatever has this name)
    if name not in _IMPORTED_LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_IMPORTED_LATER[name])
    if module.__name__ == f"{__name__}.{name}":  # a package that can be called
        return module
    return getattr(module, name)
