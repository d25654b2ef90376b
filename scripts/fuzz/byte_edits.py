"""Damages bytes of any content."""

from __future__ import annotations

import struct
from random import Random


def noise(rng: Random, content: bytes) -> bytes:
    """Damage a few bytes at a random position."""
    start = rng.randrange(len(content) + 1)
    length = rng.choice((1, 1, 1, 2, 4, 8, 64))
    before = content[:start]
    damaged = content[start : start + length]
    after = content[start + length :]
    match rng.randrange(7):
        case 0:
            flipped = bytes(byte ^ 1 << rng.randrange(8) for byte in damaged[:1])
            return before + flipped + content[start + 1 :]
        case 1:
            return before + after
        case 2:
            return before + rng.randbytes(length) + content[start:]
        case 3:
            return before + rng.randbytes(len(damaged)) + after
        case 4:
            return before + bytes(len(damaged)) + after
        case 5:
            other = rng.randrange(len(content) + 1)
            rest = rng.choice((after, content[start:]))
            return before + content[other : other + length] + rest
        case _:
            return before


def edit_data(rng: Random, content: bytes) -> bytes:
    """Damage the bytes of tensors: their values or their number."""
    noisy = noise(rng, content)
    longer = content + rng.randbytes(rng.choice((1, 4, 4096)))
    return rng.choice((noisy, longer, bytes(len(content))))


def split(content: bytes) -> tuple[bytes, bytes]:
    """Split a safetensors file into header, without its length, and data."""
    (length,) = struct.unpack("<Q", content[:8].ljust(8, b"\0"))
    return content[8 : 8 + length], content[8 + length :]


def join(header: bytes, data: bytes) -> bytes:
    """Join header and data to a safetensors file; the inverse of `split`."""
    return struct.pack("<Q", len(header)) + header + data


def edit_length(rng: Random, content: bytes) -> bytes:
    """Change the header length that the file states."""
    length = len(split(content)[0])
    size = len(content)
    near = (0, 1, 2, length - 1, length + 1, length + 8, size - 8, size - 7, size)
    large = (25_000_001, 2**31, 2**63, 2**64 - 1)
    if rng.random() < 0.3:
        return noise(rng, content[:8]) + content[8:]
    return struct.pack("<Q", max(rng.choice(near + large), 0)) + content[8:]
