"""Embeddings as a function of a batch of rows, for Ray Data, Daft, Spark and others."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from siglip_port.config import SigLipVisionConfig
from siglip_port.embed.decode import decode
from siglip_port.embed.encoder import BatchEncoder, ModelSource
from siglip_port.embed.inputs import IMAGE_COLUMNS
from siglip_port.embed.options import EmbedOptions, OutputDtype
from siglip_port.image_processing import Backend
from siglip_port.model import SigLipVisionModel
from siglip_port.optimize.comparison import TOLERANCES
from siglip_port.validation import parse_dtype


class Embedder(BatchEncoder):
    """Function of a batch of rows: columns in, columns out.

    Can be pickled at any time; weights are loaded on first use. Every batch is padded to
    `batch_size` with blank images, so that an embedding does not depend on the number of images
    it is batched with.

    Args:
        source: Hub id or path, as for `from_hf`; the constructor reads only its configuration and
            headers. Or a model, which is pickled with its weights.
        revision: Branch, tag or commit of a Hub repository.
        subfolder: Folder of the checkpoint in the folder or repository; None for none.
        layout: Layout of the checkpoint; None to recognize it.
        prefix: Prefix of the encoder's names; None to find it.
        config: Architecture, if the checkpoint's is missing or wrong.
        local_files_only: Whether to use only the Hub's local cache.
        preprocessing: Preprocessing of a checkpoint, as for `from_hf`.
        dtype: Compute dtype or its name; None for the model's own.
        engine: Name in `siglip_port.optimize.ENGINES`.
        device: Device of the model; None for the model's own, or the CPU.
        threads: CPU threads for the model; None for torch's setting.
        batch_size: Images per forward pass.
        tokens: Whether to return all tokens of an image, row by row, instead of the pooled
            embedding.
        normalize: Whether to scale embeddings to unit length.
        output_dtype: Dtype of the returned embeddings.
        backend: Image backend, see `siglip_port.image_processing.ImageProcessor`.
        column: Name of the image column; None for the first of
            `siglip_port.embed.inputs.IMAGE_COLUMNS` in the batch.

    Attributes:
        config: Model configuration.
        processor: Image processor of the model.
        name: Hub id or path of the model.
        commit: Commit of the Hub repository; None for local files.

    Raises:
        ValueError: An argument is not supported, the model does not support the output, or its
            preprocessing is unknown.
        siglip_port.CheckpointError: The checkpoint cannot be read.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | SigLipVisionModel,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        layout: str | None = None,
        prefix: str | None = None,
        config: SigLipVisionConfig | None = None,
        local_files_only: bool = False,
        preprocessing: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        dtype: torch.dtype | str | None = None,
        engine: str = "eager",
        device: str | None = None,
        threads: int | None = None,
        batch_size: int = 16,
        tokens: bool = False,
        normalize: bool = False,
        output_dtype: OutputDtype = "float32",
        backend: Backend = "pil",
        column: str | None = None,
    ) -> None:
        options = EmbedOptions(
            dtype=parse_dtype(dtype, TOLERANCES),
            engine=engine,
            threads=threads,
            batch_size=batch_size,
            tokens=tokens,
            normalize=normalize,
            output_dtype=output_dtype,
            backend=backend,
        )
        if column is not None and not isinstance(column, str):
            raise ValueError(f"column must be the name of a column, got {column!r}")
        if isinstance(source, SigLipVisionModel):
            if revision is not None:
                raise ValueError(f"revision requires a Hub id, got {revision!r} with a model")
            model_source = ModelSource.from_model(source)
        else:
            model_source = ModelSource.from_checkpoint(
                source,
                revision=revision,
                subfolder=subfolder,
                layout=layout,
                prefix=prefix,
                config=config,
                local_files_only=local_files_only,
                device=device,
                preprocessing=preprocessing,
            )
        super().__init__(model_source, options, device)
        self.column = column

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Embed the images of a batch of rows.

        Args:
            batch: Columns of equal length. The image column contains paths, file contents, arrays,
                or structs of `bytes` and `path`.

        Returns:
            The columns of the batch, without the image column unless it contains paths, and
            `width` and `height` in pixels (int32, 0 on error), `embedding` [B, embedding_dim]
            (NaN on error) and `error` (empty on success).

        Raises:
            ValueError: The batch has no image column.
        """
        column = self.image_column(batch)
        images = list(batch[column])
        decoded = [decode(image, self.processor) for image in images]
        vectors = [np.zeros((0, self.embedding_dim), self.options.output_dtype)]
        errors: list[str] = []
        batch_size = self.options.batch_size
        for first in range(0, len(decoded), batch_size):
            batch_vectors, batch_errors = self.encode(decoded[first : first + batch_size])
            vectors.append(batch_vectors)
            errors += batch_errors
        columns = dict(batch)
        if not all(isinstance(image, str) for image in images):
            del columns[column]
        sizes = [image.size or (0, 0) for image in decoded]
        return {
            **columns,
            "width": np.array([width for _, width in sizes], np.int32),
            "height": np.array([height for height, _ in sizes], np.int32),
            "embedding": np.concatenate(vectors),
            "error": np.array(errors, dtype=object),
        }

    def image_column(self, batch: Mapping[str, Any]) -> str:
        """Return the name of the image column."""
        names = IMAGE_COLUMNS if self.column is None else (self.column,)
        for name in names:
            if name in batch:
                return name
        raise ValueError(
            f"batch has no column {' or '.join(names)}, only {', '.join(batch)}; pass column="
        )
