"""Reads the tensors of a checkpoint with the libraries of the file formats."""

from __future__ import annotations

import io
import json
import re
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from scripts.fuzz.byte_edits import join, split
from scripts.fuzz.intact import NPZ, Files
from siglip_port.checkpoint.source import INDEX, WEIGHTS

OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Tensors = dict[str, Tensor]


class UnusableError(Exception):
    """The files do not describe a model; the message says why."""


def read_object(content: bytes, name: str) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        document = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UnusableError(f"{name} is not JSON") from error
    if not isinstance(document, dict):
        raise UnusableError(f"{name} is not a JSON object")
    return document


def read_tensors(files: Files, encoder: Iterable[str] = ()) -> Tensors:
    """Read all tensors of a file, or of the shards that contain the encoder, by name."""
    if NPZ in files:
        return read_npz(files[NPZ])
    if WEIGHTS in files:
        return read_safetensors(files[WEIGHTS], WEIGHTS)
    if INDEX in files:
        return read_shards(files, encoder)
    if OPEN_CLIP_WEIGHTS in files:
        return read_safetensors(files[OPEN_CLIP_WEIGHTS], OPEN_CLIP_WEIGHTS)
    raise UnusableError("no weights")


def read_shards(files: Files, encoder: Iterable[str]) -> Tensors:
    """Read the shards that contain the encoder; other tensors in the index are returned empty."""
    file_of = read_object(files[INDEX], INDEX).get("weight_map")
    if not isinstance(file_of, dict) or not all(isinstance(f, str) for f in file_of.values()):
        raise UnusableError("the index has no valid weight_map")
    for file in file_of.values():
        if re.search(r"[/\\\n\0]", file) or not file.endswith(".safetensors"):
            raise UnusableError(f"the index lists {file!r}, not a plain file name")
    tensors: Tensors = {}
    for shard in {file for name, file in file_of.items() if name in encoder or not encoder}:
        if shard not in files:
            raise UnusableError(f"{shard} is missing")
        shard_tensors = read_safetensors(files[shard], shard)
        # The index is the authority: what it does not list there is not part of the checkpoint.
        for name, tensor in shard_tensors.items():
            if file_of.get(name) == shard:
                tensors[name] = tensor
    unread = [name for name in file_of if name not in tensors and name not in encoder]
    return {**{name: torch.empty(0) for name in unread}, **tensors}


def read_safetensors(content: bytes, name: str) -> Tensors:
    """Read all tensors of a file, as strictly as the format is specified.

    Tensors with dtypes that are not supported in an encoder are returned empty.
    """
    try:
        entries = safetensors.deserialize(content)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        # Tensors outside the encoder may have a dtype that this release of safetensors rejects.
        readable = with_supported_dtypes(content)
        if "unknown variant" in str(error) and readable != content:
            return read_safetensors(readable, name)
        raise UnusableError(f"{name}: {error}") from error
    pairs = json.loads(split(content)[0], object_pairs_hook=list)
    if len([key for key, _ in pairs if key != "__metadata__"]) > len(entries):
        raise UnusableError(f"{name} has a tensor twice")  # safetensors accepts that
    tensors = {}
    for key, entry in entries:
        tensors[key] = torch.empty(0)
        if entry["dtype"] in DTYPES and entry["data"]:
            flat = torch.frombuffer(entry["data"], dtype=DTYPES[entry["dtype"]])
            tensors[key] = flat.reshape(entry["shape"])
    return tensors


def with_supported_dtypes(content: bytes) -> bytes:
    """Return the file with tensors of unsupported dtypes declared as bytes of the same size."""
    header, data = split(content)
    try:
        tensors = json.loads(header)
        for key, tensor in tensors.items():
            if key != "__metadata__" and tensor["dtype"] not in DTYPES:
                begin, end = tensor["data_offsets"]
                tensor |= {"dtype": "U8", "shape": [end - begin]}
    except (ValueError, TypeError, KeyError, AttributeError):
        return content
    return join(json.dumps(tensors).encode(), data)


def read_npz(content: bytes) -> Tensors:
    """Read all arrays of an archive with numpy.

    Arrays that numpy cannot read or that are not floating point are returned empty.
    """
    tensors: Tensors = {}
    try:
        with warnings.catch_warnings(), np.load(io.BytesIO(content), allow_pickle=False) as archive:
            warnings.simplefilter("ignore")
            for name in archive.files:
                tensors[name] = torch.empty(0)
                try:
                    array = archive[name]
                except Exception:  # zipfile, zlib and numpy share no base class
                    continue
                if array.dtype.kind == "f" and array.dtype.itemsize < 16:
                    tensors[name] = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
                elif array.dtype == np.dtype("V2"):
                    tensors[name] = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    except Exception as error:  # for the same reason
        raise UnusableError(f"not an .npz file: {error}") from error
    return tensors
