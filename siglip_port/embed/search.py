"""Nearest pictures, by cosine, in a folder that `siglip_port.embed.run` has written."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from siglip_port.embed.run import EmbedError, read_settings
from siglip_port.image_processing import ImageProcessor
from siglip_port.model import SigLipVisionModel
from siglip_port.optimize import selection as inference


def vector_like(
    out: str | os.PathLike[str],
    picture: str | os.PathLike[str],
    *,
    source: str | None = None,
    local_files_only: bool = False,
) -> Tensor:
    """The vector of one picture, by the model and the preprocessing of a folder of `embed`: [D].

    Args:
        out: the folder.
        picture: a file.
        source: where the model is now; None for where it was.
        local_files_only: use the Hub's local cache only.

    Raises:
        EmbedError: the folder holds no vectors, or they are of other weights.
        siglip_port.image_processing.ImageError: the picture cannot be read.
        siglip_port.CheckpointError: the model cannot be loaded.
    """
    settings = read_settings(Path(out))
    if settings is None or settings.get("output") != "pooled":
        raise EmbedError(f"{out} holds no vectors; write them with `siglip-port embed`")
    model = SigLipVisionModel.from_hf(
        source or settings["source"], revision=settings["commit"], local_files_only=local_files_only
    )
    if inference.weights_hash(model)[:16] != settings["weights"]:
        raise EmbedError(
            f"the vectors in {out} are of other weights than those of "
            f"{source or settings['source']}"
        )
    processor = ImageProcessor.from_config(
        model.preprocessor_config, settings["processor"]["backend"]
    )
    if processor.fingerprint != settings["preprocess"]:
        raise EmbedError(
            f"the vectors in {out} were preprocessed in another way than this model says"
        )
    with torch.inference_mode():
        return model.embed(**processor(picture))[0]


def search(
    out: str | os.PathLike[str], query: Tensor, count: int = 10
) -> list[tuple[float, str, str]]:
    """Finds the pictures whose vectors are nearest to one, by cosine.

    Args:
        out: a folder of `embed`.
        query: [D].
        count: how many at most.

    Returns:
        (cosine, id, path), the nearest first.

    Raises:
        EmbedError: the folder holds no vectors.
    """
    from pyarrow import parquet

    wanted = torch.nn.functional.normalize(query.float().flatten(), dim=0).numpy()
    best: list[tuple[float, str, str]] = []
    paths = sorted(Path(out).glob("part-*.parquet"))
    if not paths:
        raise EmbedError(f"{out} holds no vectors; write them with `siglip-port embed`")
    for path in paths:
        table = parquet.read_table(path)
        good = table.column("error").is_null().to_numpy()
        if (beside := path.with_suffix(".npy")).exists():
            vectors = np.load(beside, mmap_mode="r")[good].astype(np.float32)
        else:
            column = table.column("embedding").combine_chunks()
            flat = column.filter(good).flatten().to_numpy(zero_copy_only=False)
            vectors = flat.astype(np.float32).reshape(int(good.sum()), -1)
        cosines = vectors @ wanted / np.maximum(np.linalg.norm(vectors, axis=1), 1e-30)
        names = (table.column(name).filter(good).to_pylist() for name in ("id", "path"))
        best = sorted(
            [*best, *zip(cosines.tolist(), *names, strict=True)], key=lambda row: -row[0]
        )[:count]
    return best
