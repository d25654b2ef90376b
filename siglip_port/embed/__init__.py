"""Embeddings of many images, written to Parquet."""

from siglip_port.embed.embedder import Embedder
from siglip_port.embed.errors import EmbedError
from siglip_port.embed.options import FASTEST, EmbedOptions
from siglip_port.embed.run import Progress, embed

__all__ = ["FASTEST", "EmbedError", "EmbedOptions", "Embedder", "Progress", "embed"]
