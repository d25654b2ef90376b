"""The header of a safetensors file: JSON that says of every tensor what it is and where it lies."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping

from siglip_port.checkpoint.formats.headers import Header, TensorInfo, count_elements
from siglip_port.checkpoint.formats.other_formats import refuse_other_formats
from siglip_port.checkpoint.formats.strict_json import MAX_JSON_BYTES, parse_json

LENGTH_BYTES = 8  # of the number that begins the file, the length of the JSON


def header_length(first: bytes, size: int) -> int:
    """Return how many bytes of JSON follow the first 8 bytes of a safetensors file.

    Args:
        first: these 8 bytes.
        size: of the whole file.

    Raises:
        OtherFormatError: they are the first of a file of another format.
        ValueError: there cannot be as many, or more than anybody needs.
    """
    if not first:
        raise ValueError("it is empty")
    # What is long enough to be the length of a header is one, whatever else begins like it.
    length = size
    if len(first) == LENGTH_BYTES:
        (length,) = struct.unpack("<Q", first)
    if length > min(size - LENGTH_BYTES, MAX_JSON_BYTES):
        refuse_other_formats(first)
        raise ValueError(f"its header is said to have {length} bytes, the file has {size}")
    return length


def parse_header(content: bytes, size: int) -> Header:
    """Understand the JSON at the beginning of a safetensors file.

    Args:
        content: the JSON.
        size: of the whole file.

    Raises:
        ValueError: it describes no file of this size.
    """
    document = parse_json(content)
    if not isinstance(document, dict):
        raise ValueError("its header is no JSON object")
    metadata = parse_metadata(document.pop("__metadata__", None))
    tensors: dict[str, TensorInfo] = {}
    begins: dict[str, int] = {}
    for name, entry in document.items():
        tensors[name], begins[name] = parse_entry(name, entry)
    data_start = LENGTH_BYTES + len(content)
    end = data_start + contiguous_size(tensors, begins)
    if end != size:
        raise ValueError(f"its tensors take {end} bytes, the file has {size}")
    offsets = {name: data_start + begin for name, begin in begins.items()}
    return Header(tensors, size, offsets, metadata)


def parse_metadata(metadata: object) -> dict[str, str]:
    """Return the texts by name; none where there are none."""
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(t, str) for t in metadata.values()):
        raise ValueError("its __metadata__ must be texts by name")
    return metadata


def parse_entry(name: str, entry: object) -> tuple[TensorInfo, int]:
    """Understand what a header says of one tensor: what it is, and where it begins in the data."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} must have a dtype, a shape and data_offsets, and nothing else")
    dtype = entry["dtype"]
    shape = entry["shape"]
    offsets = entry["data_offsets"]
    is_pair = isinstance(offsets, list) and len(offsets) == 2
    if not isinstance(dtype, str) or not isinstance(shape, list) or not is_pair:
        raise ValueError(
            f"{name} must have a dtype, a shape and two data_offsets, found {str(entry)[:200]}"
        )
    count = count_elements(name, shape)
    begin, end = offsets
    if type(begin) is not int or type(end) is not int or not 0 <= begin <= end:
        raise ValueError(f"{name} is said to lie from {begin!r} to {end!r}")
    # A dtype that is unknown here says nothing of its size; such a tensor is never read.
    bits = re.fullmatch(r"BOOL|B?[FIUC](\d{1,3})(_\w+)?", dtype)
    if bits and (end - begin) * 8 != count * int(bits[1] or 8):
        raise ValueError(
            f"{name} is said to have {end - begin} bytes, which {dtype} of shape {shape} has not"
        )
    return TensorInfo(tuple(shape), dtype, end - begin), begin


def contiguous_size(tensors: Mapping[str, TensorInfo], begins: Mapping[str, int]) -> int:
    """Return the size of all tensors, which must lie one after the other without a gap."""
    end = 0
    for name in sorted(tensors, key=lambda name: (begins[name], tensors[name].nbytes)):
        if begins[name] != end:
            raise ValueError(
                f"{name} is said to begin at {begins[name]}, but the tensors before it end at {end}"
            )
        end += tensors[name].nbytes
    return end
