"""Reading, checking and writing checkpoint files."""

from siglip_port.checkpoint.errors import (
    CheckpointError,
    HubUnreachableError,
    MultipleEncodersError,
)
from siglip_port.checkpoint.extract import Extraction, extract_model
from siglip_port.checkpoint.inspect import Inspection, inspect_checkpoint
from siglip_port.checkpoint.layouts import LAYOUTS
from siglip_port.checkpoint.preprocessor_config import default as default_preprocessor_config
from siglip_port.checkpoint.pretrained import LoadOptions, build_on_meta, load_model
from siglip_port.checkpoint.provenance import Provenance
from siglip_port.checkpoint.reader import Checkpoint
from siglip_port.checkpoint.registry import PUBLISHED, Published
from siglip_port.checkpoint.source import Source
from siglip_port.checkpoint.writer import save_hf, save_timm

__all__ = [
    "LAYOUTS",
    "PUBLISHED",
    "Checkpoint",
    "CheckpointError",
    "Extraction",
    "HubUnreachableError",
    "Inspection",
    "LoadOptions",
    "MultipleEncodersError",
    "Provenance",
    "Published",
    "Source",
    "build_on_meta",
    "default_preprocessor_config",
    "extract_model",
    "inspect_checkpoint",
    "load_model",
    "save_hf",
    "save_timm",
]
