"""Damages `.npz` files: valid zip archives with one damaged array or name."""

from __future__ import annotations

import io
import pickle
import re
import warnings
import zipfile
from random import Random
from typing import Any

from scripts.fuzz.byte_edits import edit_data, noise

TRAP = "SIGLIP_PORT_TRAP"
"""Environment variable that `PICKLE` sets when it is loaded."""


class Trap:
    """An object whose pickle runs code when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"import os; os.environ[{TRAP!r}] = 'a pickle was loaded'",)


PICKLE = pickle.dumps(Trap())

DTYPES = (">f4", "<i4", "<f8", "<f2", "|O", "|V4", "|V2", "<U1", "<c8", "f4,f4", "x")
SHAPES = (
    "(4,)",
    "(2, 2)",
    "(-1,)",
    "(1000000000, 1000000000)",
    "4",
    "(4.0,)",
    "((),)",
    "(True,)",
)
HEADER_BYTES = 128  # size of the header of a small array


def edit_npz(rng: Random, content: bytes) -> bytes:
    """Rewrite the archive with one fault."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [(name, archive.read(name)) for name in archive.namelist()]
        index = rng.randrange(len(members))
    except Exception:  # damaged by another edit; the exceptions of zipfile share no base class
        return noise(rng, content)
    name, array = members[index]
    fault = rng.randrange(8)
    if fault == 5:
        other = rng.choice(members)[0]
        name = rng.choice((name + "x", name.removesuffix(".npy"), "../" + name, other, ""))
    elif fault == 7:
        position = rng.randrange(len(members))
        members.insert(position, rng.choice(members))
    else:
        array = edit_array(rng, array, fault)
    members[index] = (name, array)
    if rng.random() < 0.1:
        members = [member for member in members if "MAPHead" not in member[0]]
    compression = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    if rng.random() < 0.9:
        members = list(dict(members).items())
    else:
        del members[-1:]
    return write_archive(members, compression)


def edit_array(rng: Random, array: bytes, fault: int) -> bytes:
    """Damage an array: dtype, shape, order, header, data, or the whole file."""
    header = array[:HEADER_BYTES]
    data = array[HEADER_BYTES:]
    match fault:
        case 0:
            return array.replace(b"'<f4'", repr(rng.choice(DTYPES)).encode())
        case 1:
            shape = f"'shape': {rng.choice(SHAPES)}"
            return re.sub(rb"'shape': \([^)]*\)", shape.encode(), array)
        case 2:
            return array.replace(b"False", b"True")
        case 3:
            return noise(rng, header) + data
        case 4:
            return header + edit_data(rng, data)
        case _:
            newer = array[:6] + bytes([3, 0]) + array[8:]
            return rng.choice((b"", PICKLE, newer, array + bytes(1 << 22)))


def write_archive(members: list[tuple[str, bytes]], compression: int) -> bytes:
    """Write an archive, which may contain duplicate names."""
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", compression) as archive:
        warnings.simplefilter("ignore")  # duplicate names
        for name, array in members:
            archive.writestr(zipfile.ZipInfo(name), array)
    return file.getvalue()
