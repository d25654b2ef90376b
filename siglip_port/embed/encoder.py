"""Embeddings of decoded images, in batches of one fixed size."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from siglip_port.checkpoint.json_files import read_word
from siglip_port.checkpoint.preprocessing import Preprocessing
from siglip_port.checkpoint.reader import Checkpoint
from siglip_port.config import SigLipVisionConfig
from siglip_port.embed.decode import DecodedImage
from siglip_port.embed.options import (
    EmbedOptions,
    validate_device_name,
    validate_engine,
    validate_output,
)
from siglip_port.hub import HubOptions, find_source
from siglip_port.image_processing import ImageError, ImageProcessor, Pixels, move_pixels
from siglip_port.model import SigLipVisionModel
from siglip_port.optimize import OptimizedModel, with_engine
from siglip_port.threads import torch_threads

IN_MEMORY = "in-memory model"
"""Name of a model that was not loaded from a checkpoint."""


@dataclass
class ModelSource:
    """A model in memory, or a checkpoint whose weights are loaded on first use.

    Pickled without the weights of a checkpoint, which are loaded again after unpickling.

    Attributes:
        name: Hub id or path of the checkpoint, for messages and metadata.
        commit: Commit of the Hub repository; None for local files.
        config: Model configuration.
        preprocessing: Content of `preprocessor_config.json`, and its source.
        model: Loaded model; None until its weights are loaded.
        in_memory: Whether the model has no checkpoint to load it from, so its weights are pickled.
        load_arguments: Keyword arguments of `SigLipVisionModel.from_hf`.
        pooling: How the model pools, for messages; None if unknown.
    """

    name: str
    commit: str | None
    config: SigLipVisionConfig
    preprocessing: Preprocessing
    model: SigLipVisionModel | None = None
    in_memory: bool = False
    load_arguments: dict[str, Any] = field(default_factory=dict)
    pooling: str | None = None

    @classmethod
    def from_model(cls, model: SigLipVisionModel) -> ModelSource:
        """Wrap a model that is in memory."""
        if isinstance(model, OptimizedModel):
            raise ValueError(
                "model is already optimized; pass the original model and select an engine= instead"
            )
        name, commit, pooling = IN_MEMORY, None, None
        if model.provenance is not None:
            name, commit = model.provenance.source, model.provenance.commit
            pooling = model.provenance.evidence.pooling
        return cls(
            name,
            commit,
            model.config,
            model.preprocessing,
            model,
            in_memory=True,
            pooling=pooling,
        )

    @classmethod
    def from_checkpoint(
        cls,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        layout: str | None = None,
        prefix: str | None = None,
        config: SigLipVisionConfig | None = None,
        local_files_only: bool = False,
        device: str | None = None,
        preprocessing: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    ) -> ModelSource:
        """Read the configuration and headers of a checkpoint, given as for `from_hf`."""
        word = read_word(preprocessing)
        options = HubOptions(revision=revision, local_files_only=local_files_only)
        files = find_source(source, options, subfolder)
        checkpoint = Checkpoint(
            files, layout=layout, prefix=prefix, config=config, preprocessing=word
        )
        load_arguments: dict[str, Any] = {
            "revision": files.commit or revision,
            "layout": layout,
            "prefix": prefix,
            "config": config,
            "local_files_only": local_files_only,
            "device": device,
        }
        if word is not None:  # its file may not exist where the weights are loaded
            load_arguments["preprocessing"] = checkpoint.preprocessing.config
        return cls(
            files.address,
            files.commit,
            checkpoint.config,
            checkpoint.preprocessing,
            load_arguments=load_arguments,
            pooling=checkpoint.evidence.pooling,
        )

    def load(self) -> SigLipVisionModel:
        """Return the model; load it on the first call."""
        if self.model is None:
            self.model = SigLipVisionModel.from_hf(self.name, **self.load_arguments)
        return self.model

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to pickle, without weights that can be loaded again."""
        if self.in_memory:
            return self.__dict__
        return {**self.__dict__, "model": None}


class BatchEncoder:
    """Encoder of decoded images.

    Can be pickled at any time; weights are loaded on first use. Every batch is padded to
    `batch_size` with blank images, so that an embedding does not depend on the number of images
    it is batched with.

    Args:
        source: Source of the model.
        options: Options of the run; `engine` must be one of `siglip_port.optimize.ENGINES`.
        device: Device of the model; None for the model's own, or the CPU.

    Attributes:
        options: Options of the run.
        engine: Engine of the model.
        threads: CPU threads for the model.
        config: Model configuration.
        processor: Image processor of the model.
        name: Hub id or path of the model.
        commit: Commit of the Hub repository; None for local files.

    Raises:
        ValueError: The model does not support the requested output, or its preprocessing is
            unknown, or an argument is wrong.
    """

    def __init__(
        self, source: ModelSource, options: EmbedOptions, device: str | None = None
    ) -> None:
        self.engine = validate_engine(options.engine)
        validate_device_name(device)
        validate_output(options, source.config, source.pooling)
        self.source = source
        self.options = options
        self.device = device
        self.threads = torch.get_num_threads() if options.threads is None else options.threads
        self.config = source.config
        self.name = source.name
        self.commit = source.commit
        preprocessor_config = source.preprocessing.checked_config()
        self.processor = ImageProcessor.for_model(
            source.config, preprocessor_config, options.backend
        )
        self._optimized: OptimizedModel | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to pickle, without the engine, which belongs to this process."""
        return {**self.__dict__, "_optimized": None}

    @property
    def embedding_dim(self) -> int:
        """Length of an embedding; known before the weights are loaded."""
        if self.options.tokens:
            return self.config.embed_dim * self.config.num_patches
        return self.config.embed_dim

    @property
    def dtype(self) -> torch.dtype | None:
        """Compute dtype; None for the model's own."""
        if self.engine == "int8" and self.options.dtype is None:
            return torch.int8
        return self.options.dtype

    @property
    def base_model(self) -> SigLipVisionModel:
        """The original model."""
        return self.source.load()

    @property
    def model(self) -> OptimizedModel:
        """The model on its engine."""
        return self.load()

    @torch.inference_mode(False)  # `encode` calls it, and the model may be trained later
    def load(self) -> OptimizedModel:
        """Return the model on its engine; build it on the first call.

        Raises:
            siglip_port.optimize.EngineError: The engine is not available on this machine.
        """
        if self._optimized is None:
            with torch_threads(self.threads):
                model = self.base_model
                if self.device is not None:
                    model = model.to(self.device)
                self._optimized = with_engine(model, self.engine, dtype=self.dtype)
        return self._optimized

    @torch.inference_mode()
    def encode(self, images: Sequence[DecodedImage]) -> tuple[NDArray[Any], list[str]]:
        """Run the model on at most `batch_size` images.

        Args:
            images: B decoded images.

        Returns:
            Embeddings [B, embedding_dim] of dtype `output_dtype`, NaN on error; and the B error
            messages, empty on success.
        """
        if not self.processor.do_resize:
            images = [self.reject_wrong_size(image) for image in images]
        vectors = self.run_model(self.pixel_batch(images))[: len(images)].float().cpu().numpy()
        vectors = vectors.astype(self.options.output_dtype)
        errors = []
        for image, vector in zip(images, vectors, strict=True):
            error = image.error
            if not error and not np.isfinite(vector).all():
                error = "the model returned NaN or Inf"
            errors.append(error)
        vectors[[bool(error) for error in errors]] = np.nan
        return vectors, errors

    @property
    def blank_image(self) -> Tensor:
        """Padding of a batch, [C, H, W]: zeros."""
        side = self.config.patch_size if self.config.naflex else self.config.image_size
        return torch.zeros(self.config.num_channels, side, side)

    def pixel_batch(self, images: Sequence[DecodedImage]) -> Pixels:
        """Stack the pixels of images into a batch, padded to `batch_size`."""
        blank = self.blank_image
        pixels = []
        for image in images:
            pixels.append(blank if image.pixels is None else torch.from_numpy(image.pixels))
        pixels += [blank] * (self.options.batch_size - len(pixels))
        return self.processor.batch(pixels)

    def run_model(self, batch: Pixels) -> Tensor:
        """Return pooled embeddings [B, D], or tokens [B, N * D]."""
        # Pinned, so that the copy to a GPU runs while the next batch is prepared.
        batch = move_pixels(batch, self.model.device, pinned=self.model.device.type != "cpu")
        with torch_threads(self.threads):
            if self.options.tokens:
                tokens: Tensor = self.model(**batch)
                return tokens.flatten(1)
            return self.model.embed(**batch, normalize=self.options.normalize)

    def reject_wrong_size(self, image: DecodedImage) -> DecodedImage:
        """Return an image with an error if it was not resized and has a size that does not fit."""
        if image.pixels is None:
            return image
        expected = self.blank_image.shape
        try:
            if not self.config.naflex and image.pixels.shape != expected:
                raise ImageError(
                    f"image must have shape {list(expected)} if do_resize is false, got "
                    f"{list(image.pixels.shape)}"
                )
            self.processor.batch([torch.from_numpy(image.pixels)])
        except ImageError as error:
            return replace(image, pixels=None, size=None, error=str(error))
        return image
