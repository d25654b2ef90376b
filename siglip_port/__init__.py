"""PyTorch SigLIP vision encoder that loads every published checkpoint and matches transformers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from siglip_port.checkpoint import CheckpointError, HubUnreachableError, Provenance
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
    from siglip_port.optimize import OptimizedModel, optimize
    from siglip_port.patches import pack, patchify

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

# Imported on first use: torch alone takes seconds, and `siglip-port --help` needs none of it.
_MODULES = {
    "siglip_port.checkpoint": ("CheckpointError", "HubUnreachableError", "Provenance"),
    "siglip_port.config": ("SigLipVisionConfig",),
    "siglip_port.model": (
        "MLP",
        "EncoderBlock",
        "MultiheadAttention",
        "PoolingHead",
        "SigLipEncoder",
        "SigLipVisionModel",
        "SigLipVisionTransformer",
        "VisionEmbeddings",
    ),
    "siglip_port.optimize": ("OptimizedModel", "optimize"),
    "siglip_port.patches": ("pack", "patchify"),
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 (whatever has this name)
    for module_name, names in _MODULES.items():
        if name in names:
            module = importlib.import_module(module_name)
            if name == "optimize":  # a package that can be called
                return module
            value = globals()[name] = getattr(module, name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
