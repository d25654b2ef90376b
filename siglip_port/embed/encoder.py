"""Decoded images to vectors, in batches of one fixed size."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from siglip_port.checkpoint.reader import Checkpoint
from siglip_port.config import SigLipVisionConfig
from siglip_port.embed.decode import DecodedImage
from siglip_port.embed.options import EmbedOptions, validate_engine, validate_output
from siglip_port.hub import HubOptions, find_source
from siglip_port.image_processing import ImageError, ImageProcessor, Pixels, move_pixels
from siglip_port.model import SigLipVisionModel
from siglip_port.optimize import OptimizedModel, with_engine
from siglip_port.threads import torch_threads


@dataclass
class ModelSource:
    """A model in memory, or one whose weights are loaded when they are first needed.

    Pickled without weights that can be loaded again.

    Attributes:
        name: where the model comes from, for people.
        commit: of the Hub repository, if it is one.
        config: of the model.
        preprocessor_config: of the model.
        model: None until it is needed.
        in_memory: whether the model cannot be loaded again.
        load_arguments: for `SigLipVisionModel.from_hf`.
    """

    name: str
    commit: str | None
    config: SigLipVisionConfig
    preprocessor_config: Mapping[str, Any]
    model: SigLipVisionModel | None = None
    in_memory: bool = False
    load_arguments: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_model(cls, model: SigLipVisionModel) -> ModelSource:
        """Take a model that is in memory."""
        if isinstance(model, OptimizedModel):
            raise ValueError(
                "the model is optimized already; pass the one that it was made of, and name form="
            )
        name, commit = "a model in memory", None
        if model.provenance is not None:
            name, commit = model.provenance.source, model.provenance.commit
        return cls(name, commit, model.config, model.preprocessor_config, model, in_memory=True)

    @classmethod
    def from_checkpoint(
        cls,
        source: str | os.PathLike[str],
        *,
        revision: str | None,
        local_files_only: bool,
        device: str | None,
    ) -> ModelSource:
        """Read the configuration and headers of a checkpoint, as `from_hf` takes it."""
        files = find_source(
            source, HubOptions(revision=revision, local_files_only=local_files_only)
        )
        checkpoint = Checkpoint(files)
        load_arguments = {
            "revision": files.commit or revision,
            "local_files_only": local_files_only,
            "device": device,
        }
        return cls(
            files.name,
            files.commit,
            checkpoint.config,
            checkpoint.preprocessor_config,
            load_arguments=load_arguments,
        )

    def load(self) -> SigLipVisionModel:
        """Return the model, loaded once."""
        if self.model is None:
            self.model = SigLipVisionModel.from_hf(self.name, **self.load_arguments)
        return self.model

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: no weights that can be loaded again."""
        if self.in_memory:
            return self.__dict__
        return {**self.__dict__, "model": None}


class BatchEncoder:
    """Makes vectors of decoded images.

    It can be pickled at any time; weights are loaded where and when they are first needed. All
    batches go through the model in one fixed size, filled up with blank images, so that a vector
    does not depend on how many others came with it.

    Args:
        source: the model.
        options: how vectors are made of images; its engine must be one of
            `siglip_port.optimize.ENGINES`.
        device: where; None for the model's own, or the CPU.

    Attributes:
        options: as above.
        engine: that the model runs in.
        threads: CPU threads for the model.
        config: of the model.
        processor: what makes pixels.
        name: of the model, for people.
        commit: of the Hub repository, if it is one.

    Raises:
        ValueError: the model does not make the output of these options.
    """

    def __init__(
        self, source: ModelSource, options: EmbedOptions, device: str | None = None
    ) -> None:
        self.engine = validate_engine(options.engine)
        validate_output(options, source.config)
        self.source = source
        self.options = options
        self.device = device
        self.threads = torch.get_num_threads() if options.threads is None else options.threads
        self.config = source.config
        self.name = source.name
        self.commit = source.commit
        self.processor = ImageProcessor.from_config(source.preprocessor_config, options.backend)
        self._optimized: OptimizedModel | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: everything but the engine, which is of this process alone."""
        return {**self.__dict__, "_optimized": None}

    @property
    def embedding_dim(self) -> int:
        """Numbers a row; known before any weights are loaded."""
        if self.options.output == "tokens":
            return self.config.embed_dim * self.config.num_patches
        return self.config.embed_dim

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype to compute in; None for the model's own."""
        if self.engine == "int8" and self.options.dtype is None:
            return torch.int8
        return self.options.dtype

    @property
    def base_model(self) -> SigLipVisionModel:
        """The model as it was loaded."""
        return self.source.load()

    @property
    def model(self) -> OptimizedModel:
        """The model in its engine."""
        return self.load()

    def load(self) -> OptimizedModel:
        """Put the model into its engine, once.

        Raises:
            siglip_port.optimize.EngineError: the engine cannot be used here.
        """
        if self._optimized is None:
            with torch_threads(self.threads):
                model = self.base_model
                if self.device is not None:
                    model = model.to(self.device)
                self._optimized = with_engine(model, self.engine, dtype=self.dtype)
        return self._optimized

    @torch.inference_mode()
    def vectors(self, images: Sequence[DecodedImage]) -> tuple[NDArray[Any], list[str]]:
        """Run the model on at most `batch_size` images.

        Args:
            images: B of them.

        Returns:
            [B, embedding_dim], NaN where there is no vector; and why there is none, empty where
            there is one.
        """
        if not self.processor.do_resize:
            images = [self.reject_wrong_size(image) for image in images]
        vectors = self.run_model(self.pixel_batch(images))[: len(images)].float().cpu().numpy()
        vectors = vectors.astype(self.options.output_dtype)
        errors = []
        for image, vector in zip(images, vectors, strict=True):
            error = image.error
            if not error and not np.isfinite(vector).all():
                error = "the model gave what is no number"
            errors.append(error)
        vectors[[bool(error) for error in errors]] = np.nan
        return vectors, errors

    @property
    def blank_image(self) -> Tensor:
        """What stands in a batch for an image that is missing, [C, H, W]."""
        side = self.config.patch_size if self.config.naflex else self.config.image_size
        return torch.zeros(self.config.num_channels, side, side)

    def pixel_batch(self, images: Sequence[DecodedImage]) -> Pixels:
        """Put the pixels of images into a batch of the fixed size."""
        blank = self.blank_image
        pixels = []
        for image in images:
            pixels.append(blank if image.pixels is None else torch.from_numpy(image.pixels))
        pixels += [blank] * (self.options.batch_size - len(pixels))
        return self.processor.batch(pixels)

    def run_model(self, batch: Pixels) -> Tensor:
        """Return vectors [B, D], or tokens [B, N * D]."""
        # Pinned, so that the copy to a GPU runs while the next batch is prepared.
        batch = move_pixels(batch, self.model.device, pinned=self.model.device.type != "cpu")
        with torch_threads(self.threads):
            if self.options.output == "tokens":
                tokens: Tensor = self.model(**batch)
                return tokens.flatten(1)
            return self.model.embed(**batch, normalize=self.options.normalize)

    def reject_wrong_size(self, image: DecodedImage) -> DecodedImage:
        """Turn an image that does not fit the model, since none is resized, into an error."""
        if image.pixels is None:
            return image
        expected = self.blank_image.shape
        try:
            if not self.config.naflex and image.pixels.shape != expected:
                raise ImageError(
                    f"without resizing, an image must be {list(expected)}, got "
                    f"{list(image.pixels.shape)}"
                )
            self.processor.batch([torch.from_numpy(image.pixels)])
        except ImageError as error:
            return replace(image, pixels=None, size=None, error=str(error))
        return image
