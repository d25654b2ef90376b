"""The error of a run over many images."""

from __future__ import annotations


class EmbedError(Exception):
    """A run cannot begin, or not go on; the message says why. What is complete stays."""
