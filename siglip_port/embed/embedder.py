"""Images to vectors as one function of a batch of rows, for Ray Data, Daft, Spark and others."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from siglip_port.embed.decode import decode
from siglip_port.embed.encoder import BatchEncoder, ModelSource
from siglip_port.embed.inputs import IMAGE_COLUMNS
from siglip_port.embed.options import EmbedOptions, Output, OutputDtype
from siglip_port.image_processing import Backend
from siglip_port.model import SigLipVisionModel


class Embedder(BatchEncoder):
    """A function of a batch of rows: columns in, columns out.

    It can be pickled at any time; weights are loaded where and when they are first needed. All
    batches go through the model in one fixed size, filled up with blank images, so that a vector
    does not depend on how many others came with it.

    Args:
        source: a Hub id or a path, as `from_hf` takes it, of which only configuration and headers
            are read now; or a model, which is pickled along, so that others need not be able to
            find it.
        revision: branch, tag or commit of a Hub repository.
        local_files_only: use the Hub's local cache only.
        dtype: to compute in; None for the model's own.
        form: the engine, a name of `siglip_port.optimize.ENGINES`.
        device: where; None for the model's own, or the CPU.
        threads: of the CPU, for the model; None for as many as torch uses now.
        batch_size: images that go through the model at a time.
        output: `pooled`, one vector an image; or `tokens`, all of them, row by row.
        normalize: whether to scale vectors to unit length.
        store: dtype of the resulting numbers.
        backend: of `siglip_port.image_processing.ImageProcessor`.
        column: the column that holds the images; None for the first of
            `siglip_port.embed.inputs.IMAGE_COLUMNS` that is there.

    Attributes:
        config: of the model.
        processor: what makes pixels.
        name: of the model, for people.
        commit: of the Hub repository, if it is one.

    Raises:
        ValueError: an argument is not supported, or the model makes no such output.
        siglip_port.CheckpointError: there is no such checkpoint.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | SigLipVisionModel,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        dtype: torch.dtype | None = None,
        form: str = "eager",
        device: str | None = None,
        threads: int | None = None,
        batch_size: int = 16,
        output: Output = "pooled",
        normalize: bool = False,
        store: OutputDtype = "float32",
        backend: Backend = "pil",
        column: str | None = None,
    ) -> None:
        options = EmbedOptions(
            dtype=dtype,
            engine=form,
            threads=threads,
            batch_size=batch_size,
            output=output,
            normalize=normalize,
            output_dtype=store,
            backend=backend,
        )
        if isinstance(source, SigLipVisionModel):
            model_source = ModelSource.from_model(source)
        else:
            model_source = ModelSource.from_checkpoint(
                source, revision=revision, local_files_only=local_files_only, device=device
            )
        super().__init__(model_source, options, device)
        self.column = column

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Turn the images of a batch of rows into vectors.

        Args:
            batch: columns of one length. That of the images holds paths, contents of files, arrays,
                or structs of `bytes` and `path`.

        Returns:
            All columns but that of the images (paths stay), and `width`, `height` (0 where there is
            an error), `embedding`, [B, embedding_dim] (NaN there), and `error` (empty where there
            is none).

        Raises:
            ValueError: there is no column of images.
        """
        column = self.image_column(batch)
        images = list(batch[column])
        decoded = [decode(image, self.processor) for image in images]
        vectors = [np.zeros((0, self.embedding_dim), self.options.output_dtype)]
        errors: list[str] = []
        batch_size = self.options.batch_size
        for first in range(0, len(decoded), batch_size):
            batch_vectors, batch_errors = self.vectors(decoded[first : first + batch_size])
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
        """Return the name of the column of images."""
        names = IMAGE_COLUMNS if self.column is None else (self.column,)
        for name in names:
            if name in batch:
                return name
        raise ValueError(
            f"no column {' or '.join(names)}, but {', '.join(batch)}; name one by column="
        )
