"""The error of an embedding run."""

from __future__ import annotations


class EmbedError(Exception):
    """A run cannot start or continue; the message gives the reason. Complete files are kept."""
