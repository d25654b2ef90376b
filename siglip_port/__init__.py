"""The SigLIP vision tower in PyTorch, loaded from HuggingFace checkpoints, and proven against transformers."""

from siglip_port.checkpoint.reader import CheckpointError, HubUnreachableError, Provenance
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
from siglip_port.optimize.selection import OptimizedModel, optimize
from siglip_port.patches import pack, patchify

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
