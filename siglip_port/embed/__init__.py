"""Many images to vectors on disk."""

from siglip_port.embed.embedder import Embedder
from siglip_port.embed.run import EmbedError, embed

__all__ = ["EmbedError", "Embedder", "embed"]
