"""Everything about files: nothing here runs the model."""

from siglip_port.checkpoint.model_io import (
    LoadOptions,
    build_on_meta,
    load_model,
    save_hf,
    save_timm,
)
from siglip_port.checkpoint.preprocessor_config import default as default_preprocessor_config
from siglip_port.checkpoint.reader import CheckpointError, HubUnreachableError, Provenance

__all__ = [
    "CheckpointError",
    "HubUnreachableError",
    "LoadOptions",
    "Provenance",
    "build_on_meta",
    "default_preprocessor_config",
    "load_model",
    "save_hf",
    "save_timm",
]
