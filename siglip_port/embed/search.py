"""Nearest images, by cosine, in a folder of vectors that `embed` has written."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name the field uses)
from torch import Tensor

from siglip_port.embed.errors import EmbedError
from siglip_port.embed.shards import read_settings, read_vectors
from siglip_port.extras import require
from siglip_port.image_processing import ImageProcessor
from siglip_port.model import SigLipVisionModel
from siglip_port.optimize.cache import weights_hash


def embed_query(
    folder: str | os.PathLike[str],
    image: str | os.PathLike[str],
    *,
    source: str | None = None,
    local_files_only: bool = False,
) -> Tensor:
    """Make the vector of one image, by the model and preprocessing of a folder of vectors.

    Args:
        folder: that `embed` has written.
        image: a file.
        source: where the model is now; None for where it was.
        local_files_only: use the Hub's local cache only.

    Returns:
        [D].

    Raises:
        EmbedError: the folder holds no vectors, or they are of other weights.
        siglip_port.image_processing.ImageError: the image cannot be read.
        siglip_port.CheckpointError: the model cannot be loaded.
    """
    settings = read_settings(Path(folder))
    if settings is None or settings.get("output") != "pooled":
        raise EmbedError(f"{folder} holds no vectors; write them with `siglip-port embed`")
    source = source or settings["source"]
    model = SigLipVisionModel.from_hf(
        source, revision=settings["commit"], local_files_only=local_files_only
    )
    if weights_hash(model)[:16] != settings["weights"]:
        raise EmbedError(f"the vectors in {folder} are of other weights than those of {source}")
    backend = settings["processor"]["backend"]
    processor = ImageProcessor.from_config(model.preprocessor_config, backend)
    if processor.fingerprint != settings["preprocess"]:
        raise EmbedError(
            f"the vectors in {folder} were preprocessed in another way than this model says"
        )
    with torch.inference_mode():
        return model.embed(**processor(image))[0]


def search(
    folder: str | os.PathLike[str], query: Tensor, count: int = 10
) -> list[tuple[float, str, str]]:
    """Find the images whose vectors are nearest to one, by cosine.

    Args:
        folder: that `embed` has written.
        query: [D].
        count: at most.

    Returns:
        (cosine, id, path), the nearest first.

    Raises:
        EmbedError: the folder holds no vectors.
    """
    require("pyarrow")
    shards = sorted(Path(folder).glob("part-*.parquet"))
    if not shards:
        raise EmbedError(f"{folder} holds no vectors; write them with `siglip-port embed`")
    unit_query = F.normalize(query.float().flatten(), dim=0).numpy()
    nearest: list[tuple[float, str, str]] = []
    for shard in shards:
        ids, paths, vectors = read_vectors(shard)
        lengths = np.maximum(np.linalg.norm(vectors, axis=1), 1e-30)
        cosines = vectors @ unit_query / lengths
        nearest += zip(cosines.tolist(), ids, paths, strict=True)
        nearest.sort(key=lambda row: -row[0])
        del nearest[count:]
    return nearest
