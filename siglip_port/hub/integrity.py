"""Whether files are as the Hub says: hashes, taken by blocks, with all cores."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

BLOCK_BYTES = 16 * 1024 * 1024
"""Of a whole file, hashed at once, and noted in its receipt."""

Span = tuple[int, int]
"""A part of a file: the first byte, and one after the last."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Receipt:
    """What a whole file was when it was as the Hub says.

    Attributes:
        etag: the Hub's identifier of the contents.
        block: how many bytes are hashed at once.
        checksums: SHA-256 of each of these blocks.
    """

    etag: str
    block: int
    checksums: tuple[str, ...]


def hash_spans(path: Path, spans: Iterable[Span]) -> list[str]:
    """Return the SHA-256 of parts of a file.

    Raises:
        OSError: it cannot be read.
    """

    def hash_span(span: Span) -> str:
        first, stop = span
        with path.open("rb") as file:
            file.seek(first)
            return hashlib.sha256(file.read(stop - first)).hexdigest()

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(hash_span, spans))


def verify_file(path: Path, etag: str) -> Receipt | None:
    """Compare a whole file with the Hub's identifier of it.

    That is the SHA-256 of large files; of others git's own hash, or, from some proxies, SHA-1.
    There are proxies whose identifier is no hash at all, and tells nothing of the file.

    Args:
        path: of the file.
        etag: the Hub's identifier.

    Returns:
        What it is; None where it is not what it should be.

    Raises:
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    blocks = [(first, first + BLOCK_BYTES) for first in range(0, size, BLOCK_BYTES)]
    # The blocks are hashed beside the whole, which one core can take at a time.
    with ThreadPoolExecutor(1) as pool:
        checksums = pool.submit(hash_spans, path, blocks)
        matches = matches_etag(path, etag)
    if not matches:
        return None
    return Receipt(etag, BLOCK_BYTES, tuple(checksums.result()))


def matches_etag(path: Path, etag: str) -> bool:
    """Whether a whole file has this hash; an identifier that is no hash matches all."""
    if _SHA256.fullmatch(etag):
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == etag
    if _SHA1.fullmatch(etag):
        return etag in sha1_hashes(path)
    return True


def sha1_hashes(path: Path) -> tuple[str, str]:
    """Return git's own hash of a file, and its SHA-1."""
    git = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    plain = hashlib.sha1(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            git.update(chunk)
            plain.update(chunk)
    return git.hexdigest(), plain.hexdigest()


def is_unchanged(path: Path, receipt: Receipt, spans: Iterable[Span]) -> bool:
    """Whether parts of a whole file are what they were.

    Raises:
        OSError: it cannot be read.
    """
    touched: set[int] = set()
    for first, stop in spans:
        last = max(stop, first + 1) - 1
        touched.update(range(first // BLOCK_BYTES, last // BLOCK_BYTES + 1))
    numbers = sorted(touched)
    if not numbers or numbers[-1] >= len(receipt.checksums):
        return False
    blocks = [(number * BLOCK_BYTES, (number + 1) * BLOCK_BYTES) for number in numbers]
    return hash_spans(path, blocks) == [receipt.checksums[number] for number in numbers]
