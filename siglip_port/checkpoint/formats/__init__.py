"""Weights files: safetensors and big_vision's `.npz`, read without unpickling."""

from siglip_port.checkpoint.formats.headers import (
    DTYPES,
    Header,
    OtherFormatError,
    TensorInfo,
    UnreadableFileError,
)
from siglip_port.checkpoint.formats.other_formats import PICKLES_REFUSED
from siglip_port.checkpoint.formats.safetensors_header import header_length, parse_header
from siglip_port.checkpoint.formats.strict_json import MAX_JSON_BYTES, parse_json
from siglip_port.checkpoint.formats.weights_file import (
    SUFFIXES,
    open_tensors,
    read_header,
    readable,
)

__all__ = [
    "DTYPES",
    "MAX_JSON_BYTES",
    "PICKLES_REFUSED",
    "SUFFIXES",
    "Header",
    "OtherFormatError",
    "TensorInfo",
    "UnreadableFileError",
    "header_length",
    "open_tensors",
    "parse_header",
    "parse_json",
    "read_header",
    "readable",
]
