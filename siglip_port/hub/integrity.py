"""Verify files against the Hub's hashes; blocks are hashed in parallel."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

BLOCK_BYTES = 16 * 1024 * 1024
"""Size of the blocks of a whole file whose checksums are in its receipt."""

Span = tuple[int, int]
"""Byte range [first, stop) of a file."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Receipt:
    """Checksums of a whole file that matched the Hub's hash.

    Attributes:
        etag: ETag of the contents.
        block: Block size in bytes.
        checksums: SHA-256 of each block.
    """

    etag: str
    block: int
    checksums: tuple[str, ...]


def hash_spans(path: Path, spans: Iterable[Span]) -> list[str]:
    """Return the SHA-256 of byte ranges of a file.

    Raises:
        OSError: The file cannot be read.
    """

    def hash_span(span: Span) -> str:
        first, stop = span
        with path.open("rb") as file:
            file.seek(first)
            return hashlib.sha256(file.read(stop - first)).hexdigest()

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(hash_span, spans))


def verify_file(path: Path, etag: str) -> Receipt | None:
    """Compare a whole file with its ETag.

    The ETag is the SHA-256 of large files and the git blob hash of others. Some proxies send a
    plain SHA-1, or an ETag that is not a hash; the latter cannot be verified and matches any file.

    Args:
        path: File to verify.
        etag: ETag of the expected contents.

    Returns:
        Receipt of the file; None if it does not match.

    Raises:
        OSError: The file cannot be read.
    """
    size = path.stat().st_size
    blocks = [(first, first + BLOCK_BYTES) for first in range(0, size, BLOCK_BYTES)]
    # The blocks are hashed in parallel to the whole file, which keeps one core busy.
    with ThreadPoolExecutor(1) as pool:
        checksums = pool.submit(hash_spans, path, blocks)
        matches = matches_etag(path, etag)
    if not matches:
        return None
    return Receipt(etag, BLOCK_BYTES, tuple(checksums.result()))


def matches_etag(path: Path, etag: str) -> bool:
    """Return whether a file has this hash; an ETag that is not a hash matches any file."""
    if _SHA256.fullmatch(etag):
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == etag
    if _SHA1.fullmatch(etag):
        return etag in sha1_hashes(path)
    return True


def sha1_hashes(path: Path) -> tuple[str, str]:
    """Return the git blob hash and the plain SHA-1 of a file."""
    git = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    plain = hashlib.sha1(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            git.update(chunk)
            plain.update(chunk)
    return git.hexdigest(), plain.hexdigest()


def is_unchanged(path: Path, receipt: Receipt, spans: Iterable[Span]) -> bool:
    """Return whether byte ranges of a file still match its receipt.

    Raises:
        OSError: The file cannot be read.
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
