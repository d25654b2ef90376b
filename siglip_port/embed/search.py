"""Search for the nearest images, by cosine similarity, in embeddings written by `embed`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name the field uses)
from numpy.typing import NDArray
from torch import Tensor

from siglip_port.config import SigLipVisionConfig
from siglip_port.embed.errors import EmbedError
from siglip_port.embed.shards import read_settings, read_vectors
from siglip_port.embed.stored_model import PASS_SOURCE, load_model, stored_processor
from siglip_port.extras import require
from siglip_port.optimize.cache import weights_hash
from siglip_port.validation import validate_positive_int


def embed_query(
    embeddings: str | os.PathLike[str],
    image: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    layout: str | None = None,
    prefix: str | None = None,
    config: SigLipVisionConfig | None = None,
    local_files_only: bool = False,
) -> Tensor:
    """Embed one image with the model and preprocessing of existing embeddings.

    Args:
        embeddings: Output folder of `embed`.
        image: Path of the image.
        source: Hub id or path of the model; None for the one in the settings of the embeddings.
        revision: Branch, tag or commit of a Hub repository; None for the stored commit, or, with
            `source`, for `main`.
        subfolder: Folder of the checkpoint in `source`; None for none.
        layout: Layout of the checkpoint; None for the stored one, or to recognize it.
        prefix: Prefix of the encoder's names; None for the stored one, or to find it.
        config: Architecture; None for the stored one, or the checkpoint's.
        local_files_only: Whether to use only the Hub's local cache.

    Returns:
        Pooled embedding, [D].

    Raises:
        EmbedError: The folder contains no pooled embeddings, or those of other weights, or the
            stored model cannot be loaded.
        siglip_port.image_processing.ImageError: The image cannot be read.
        siglip_port.CheckpointError: The model cannot be loaded.
    """
    settings = read_settings(Path(embeddings))
    if settings is None:
        raise no_embeddings(embeddings)
    if settings["tokens"]:
        raise EmbedError(
            f"{embeddings}: contains tokens, search needs pooled embeddings; run siglip-port embed "
            "without --tokens"
        )
    processor = stored_processor(Path(embeddings), settings)
    options = {
        "revision": revision,
        "subfolder": subfolder,
        "layout": layout,
        "prefix": prefix,
        "config": config,
    }
    passed = {name: value for name, value in options.items() if value is not None}
    model = load_model(
        Path(embeddings), settings, source=source, passed=passed, local_files_only=local_files_only
    )
    if weights_hash(model)[:16] != settings["weights"]:
        raise EmbedError(
            f"{embeddings}: embeddings were computed with other weights than those of "
            f"{source or settings['source']}; {PASS_SOURCE}"
        )
    with torch.inference_mode(False), torch.no_grad():
        return model.embed(**processor(image))[0]


def search(
    embeddings: str | os.PathLike[str], query: Tensor | NDArray[Any], top_k: int = 10
) -> list[tuple[float, str, str]]:
    """Find the images whose embeddings are nearest to a query, by cosine similarity.

    Args:
        embeddings: Output folder of `embed`.
        query: Embedding [D] or [1, D], a tensor or an array.
        top_k: Maximum number of images.

    Returns:
        (cosine similarity, id, path) of each image, nearest first.

    Raises:
        EmbedError: The folder contains no embeddings, only rows with an error, or embeddings of
            another format version.
        ValueError: `query` is not one finite embedding of the length of those in the folder.
    """
    require("pyarrow")
    validate_positive_int("top_k", top_k)
    vector = query_vector(query)
    read_settings(Path(embeddings))  # refuses other format versions
    shards = sorted(Path(embeddings).glob("part-*.parquet"))
    if not shards:
        raise no_embeddings(embeddings)
    unit_query = F.normalize(vector, dim=0).numpy()
    nearest: list[tuple[float, str, str]] = []
    for shard in shards:
        ids, paths, vectors = read_vectors(shard)
        if vectors.shape[1] != len(vector):
            raise ValueError(
                f"query must have the length of the embeddings, {vectors.shape[1]}, got "
                f"{len(vector)}; embed it with embed_query(embeddings, image)"
            )
        lengths = np.maximum(np.linalg.norm(vectors, axis=1), 1e-30)
        cosines = vectors @ unit_query / lengths
        nearest += zip(cosines.tolist(), ids, paths, strict=True)
        nearest.sort(key=lambda row: -row[0])
        del nearest[top_k:]
    if not nearest:
        raise EmbedError(
            f"{embeddings}: contains no embeddings: all rows have an error; see column error"
        )
    return nearest


def query_vector(query: object) -> Tensor:
    """Return a query [D] or [1, D] as a float32 tensor [D] on the CPU.

    Raises:
        ValueError: It is not one embedding, or contains NaN or Inf, or only zeros.
    """
    if not isinstance(query, (Tensor, np.ndarray)):
        raise ValueError(f"query must be a tensor or an array, got {type(query).__name__}")
    vector = torch.as_tensor(query).detach().cpu().float()
    if vector.ndim == 2 and len(vector) == 1:
        vector = vector[0]
    if vector.ndim != 1:
        raise ValueError(
            f"query must be one embedding [D], got shape {list(vector.shape)}; search for one "
            "image at a time"
        )
    if not vector.isfinite().all() or not vector.any():
        raise ValueError("query must be an embedding, got NaN, Inf or only zeros")
    return vector


def no_embeddings(folder: str | os.PathLike[str]) -> EmbedError:
    """Return the error of a folder without embeddings."""
    return EmbedError(f"{folder}: contains no embeddings; write them with siglip-port embed")
