"""The header of a safetensors file: JSON with dtype, shape and position of every tensor."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping

from siglip_port.checkpoint.formats.headers import Header, TensorInfo, count_elements
from siglip_port.checkpoint.formats.other_formats import refuse_other_formats
from siglip_port.checkpoint.formats.strict_json import MAX_JSON_BYTES, parse_json

LENGTH_BYTES = 8  # the file starts with the length of the JSON, a little-endian uint64


def header_length(first: bytes, size: int) -> int:
    """Return the length of the JSON that follows the first 8 bytes of a safetensors file.

    Args:
        first: The first 8 bytes of the file.
        size: Size of the file in bytes.

    Raises:
        OtherFormatError: The file is in another known format.
        ValueError: The length exceeds the file or `MAX_JSON_BYTES`.
    """
    if not first:
        raise ValueError("file is empty")
    # A plausible length is accepted, even if other formats start with the same bytes.
    length = size
    if len(first) == LENGTH_BYTES:
        (length,) = struct.unpack("<Q", first)
    if length > min(size - LENGTH_BYTES, MAX_JSON_BYTES):
        refuse_other_formats(first)
        raise ValueError(f"header is {length} bytes, file is {size}")
    return length


def parse_header(content: bytes, size: int) -> Header:
    """Parse and check the JSON of a safetensors file.

    Args:
        content: The JSON.
        size: Size of the file in bytes.

    Raises:
        ValueError: The JSON is invalid, or does not match the size of the file.
    """
    document = parse_json(content)
    if not isinstance(document, dict):
        raise ValueError("header is not a JSON object")
    metadata = parse_metadata(document.pop("__metadata__", None))
    tensors: dict[str, TensorInfo] = {}
    begins: dict[str, int] = {}
    for name, entry in document.items():
        tensors[name], begins[name] = parse_entry(name, entry)
    data_start = LENGTH_BYTES + len(content)
    end = data_start + contiguous_size(tensors, begins)
    if end != size:
        raise ValueError(f"tensors end at byte {end}, file is {size}")
    offsets = {name: data_start + begin for name, begin in begins.items()}
    return Header(tensors, size, offsets, metadata)


def parse_metadata(metadata: object) -> dict[str, str]:
    """Return the `__metadata__` of a header; empty if there is none."""
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(t, str) for t in metadata.values()):
        raise ValueError("__metadata__ must map strings to strings")
    return metadata


def parse_entry(name: str, entry: object) -> tuple[TensorInfo, int]:
    """Parse the entry of one tensor; return its description and its offset in the data."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} must have exactly the keys dtype, shape and data_offsets")
    dtype = entry["dtype"]
    shape = entry["shape"]
    offsets = entry["data_offsets"]
    is_pair = isinstance(offsets, list) and len(offsets) == 2
    if not isinstance(dtype, str) or not isinstance(shape, list) or not is_pair:
        raise ValueError(
            f"{name} must have a dtype, a shape and two data_offsets, got {str(entry)[:200]}"
        )
    count = count_elements(name, shape)
    begin, end = offsets
    if type(begin) is not int or type(end) is not int or not 0 <= begin <= end:
        raise ValueError(f"{name} has invalid data_offsets [{begin!r}, {end!r}]")
    # The size of an unknown dtype cannot be checked; such a tensor is never read.
    bits = re.fullmatch(r"BOOL|B?[FIUC](\d{1,3})(_\w+)?", dtype)
    if bits and (end - begin) * 8 != count * int(bits[1] or 8):
        raise ValueError(
            f"{name} is {end - begin} bytes, which does not match {dtype} of shape {shape}"
        )
    return TensorInfo(tuple(shape), dtype, end - begin), begin


def contiguous_size(tensors: Mapping[str, TensorInfo], begins: Mapping[str, int]) -> int:
    """Return the total size of the tensors, which must be contiguous."""
    end = 0
    for name in sorted(tensors, key=lambda name: (begins[name], tensors[name].nbytes)):
        if begins[name] != end:
            raise ValueError(f"{name} starts at byte {begins[name]} of the data, expected {end}")
        end += tensors[name].nbytes
    return end
