"""Search for the nearest images in existing embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from siglip_port import SigLipVisionModel
from siglip_port.embed import EmbedError, embed
from siglip_port.embed.search import embed_query, search
from tests.helpers.embedding import OPTIONS, read_rows, readable_rows
from tests.helpers.models import random_model


def write_embeddings(path: Path, vectors: list[list[float]], errors: list[str | None]) -> None:
    numbers = np.array(vectors, dtype=np.float32)
    ids = list("abcd")[: len(vectors)]
    columns = {
        "id": ids,
        "path": ids,
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(numbers.reshape(-1)), 2),
        "error": pa.array(errors, pa.string()),
    }
    parquet.write_table(pa.table(columns), path)


def test_nearest_by_cosine(tmp_path: Path) -> None:
    vectors = [[3.0, 0.0], [1.0, 1.0], [0.0, 2.0], [-1.0, 0.0]]
    write_embeddings(tmp_path / "part-000000.parquet", vectors, [None, None, None, "no"])
    nearest = search(tmp_path, torch.tensor([1.0, 0.9]), 2)
    assert [name for _, name, _ in nearest] == ["b", "a"]


def test_kinds_of_query(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "part-000000.parquet", [[3.0, 0.0], [1.0, 1.0]], [None, None])
    query = torch.tensor([1.0, 0.9])
    expected = search(tmp_path, query)
    for other in (query[None], query.numpy(), query.clone().requires_grad_(), query.double()):
        assert search(tmp_path, other) == expected


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (
            torch.ones(3),
            "query must have the length of the embeddings, 2, got 3; embed",
        ),
        (
            torch.ones(2, 2),
            r"query must be one embedding \[D\], got shape \[2, 2\]; search",
        ),
        (torch.ones(2, 1), r"query must be one embedding \[D\], got shape \[2, 1\]"),
        (torch.tensor([1, torch.nan]), "query must be an embedding, got NaN, Inf or only zeros"),
        (torch.zeros(2), "query must be an embedding, got NaN, Inf or only zeros"),
        ("cat.png", "query must be a tensor or an array, got str"),
    ],
)
def test_unusable_query(query: Any, message: str, tmp_path: Path) -> None:  # noqa: ANN401
    write_embeddings(tmp_path / "part-000000.parquet", [[3.0, 0.0], [1.0, 1.0]], [None, None])
    with pytest.raises(ValueError, match=message):
        search(tmp_path, query)


def test_count_of_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="top_k must be a positive integer, got 0"):
        search(tmp_path, torch.ones(2), 0)


def test_shard_with_only_errors(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "part-000000.parquet", [[3.0, 0.0], [1.0, 1.0]], ["no", "no"])
    message = "contains no embeddings: all rows have an error; see column error"
    with pytest.raises(EmbedError, match=message):
        search(tmp_path, torch.tensor([1.0, 0.9]), 2)


def test_npy_and_parquet_give_same_results(
    photos: Path, finished_run: Path, model: SigLipVisionModel, tmp_path: Path
) -> None:
    embed([photos], tmp_path, model, format="npy", **OPTIONS)
    query = torch.tensor(read_rows(finished_run)[1]["embedding"])
    assert search(tmp_path, query, 3) == search(finished_run, query, 3)


def test_folder_without_embeddings(tmp_path: Path) -> None:
    with pytest.raises(
        EmbedError, match="contains no embeddings; write them with siglip-port embed"
    ):
        search(tmp_path, torch.ones(2))
    with pytest.raises(
        EmbedError, match="contains no embeddings; write them with siglip-port embed"
    ):
        embed_query(tmp_path, "a.png")
    (tmp_path / "_run.json").write_text('{"version": 2}')
    with pytest.raises(EmbedError, match=r"_run\.json: not a settings file of siglip-port"):
        embed_query(tmp_path, "a.png")


def test_query_by_other_model(
    photos: Path, finished_run: Path, model: SigLipVisionModel, tmp_path: Path
) -> None:
    random_model(seed=1).save_hf(tmp_path / "weights")
    message = (
        r"finished_run.*: embeddings were computed with other weights than those of .*weights; "
        "pass the model as source=$"
    )
    with pytest.raises(EmbedError, match=message):
        embed_query(finished_run, photos / "a.png", source=str(tmp_path / "weights"))
    row = readable_rows(finished_run)[0]
    model.preprocessor_config = {**model.preprocessor_config, "image_mean": [0.1, 0.1, 0.1]}
    model.save_hf(tmp_path / "mean")
    query = embed_query(finished_run, row["path"], source=str(tmp_path / "mean"))
    assert torch.allclose(query, torch.tensor(row["embedding"]), atol=1e-5)
    assert not torch.allclose(query, model.embed_images(row["path"])[0], atol=1e-2)


def test_query_is_preprocessed_as_stored(
    photos: Path, model: SigLipVisionModel, tmp_path: Path
) -> None:
    """Even if the preprocessing of the loaded model was changed before the run."""
    model.preprocessor_config = {**model.preprocessor_config, "image_mean": [0.1, 0.1, 0.1]}
    embed([photos], tmp_path, model, **OPTIONS)
    row = readable_rows(tmp_path)[0]
    query = embed_query(tmp_path, row["path"])
    assert torch.allclose(query, torch.tensor(row["embedding"]), atol=1e-5)
    path = tmp_path / "_run.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "preprocessing": "0"}))
    message = "computed with the preprocessing of another version of siglip-port; search with that"
    with pytest.raises(EmbedError, match=message):
        embed_query(tmp_path, row["path"])
    path.write_text(json.dumps({**settings, "processor": {"future": True}}))
    with pytest.raises(EmbedError, match=message):
        embed_query(tmp_path, row["path"])


def test_query_of_tokens(photos: Path, model: SigLipVisionModel, tmp_path: Path) -> None:
    embed([photos], tmp_path, model, tokens=True, **OPTIONS)
    message = (
        "contains tokens, search needs pooled embeddings; run siglip-port embed without --tokens"
    )
    with pytest.raises(EmbedError, match=message):
        embed_query(tmp_path, photos / "a.png")
