"""Pictures to vectors as one function of a batch.

What `siglip-port embed` runs, and Ray Data, Daft and Spark call.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from siglip_port.checkpoint.reader import Checkpoint
from siglip_port.embed.inputs import COLUMNS, contents
from siglip_port.hub.repository import find_source
from siglip_port.image_processing import Backend, ImageError, ImageProcessor, Pixels, to_rgb
from siglip_port.model import SigLipVisionModel
from siglip_port.optimize import selection as inference
from siglip_port.optimize.selection import OptimizedModel

Output = Literal["pooled", "tokens"]
Store = Literal["float32", "float16"]


@dataclass(frozen=True)
class Decoded:
    """What becomes of a picture before the model sees it.

    Attributes:
        pixels: [3, H, W], float32; None where it cannot be read.
        size: (height, width) of the picture itself, turned upright.
        error: why it cannot be read; empty if it can.
        decoding: seconds that reading and decoding took.
        preprocessing: seconds that all else took.
    """

    pixels: NDArray[np.float32] | None
    size: tuple[int, int] | None
    error: str
    decoding: float
    preprocessing: float = 0.0


def decode(picture: Any, processor: ImageProcessor) -> Decoded:  # noqa: ANN401 (whatever stands in a column)
    """Reads and resizes a picture; whatever is wrong with it becomes `error`.

    Args:
        picture: what `siglip_port.embed.inputs.contents` takes.
        processor: how.
    """
    started = time.perf_counter()
    try:
        rgb = to_rgb(contents(picture), processor.backend)
        decoded = time.perf_counter()
        pixels = processor.one(rgb).numpy()
    except (ImageError, MemoryError) as error:
        return Decoded(None, None, str(error) or "out of memory", time.perf_counter() - started)
    return Decoded(
        pixels, (rgb.shape[1], rgb.shape[2]), "", decoded - started, time.perf_counter() - decoded
    )


class Embedder:
    """A function of a batch of rows: columns in, columns out; for Ray Data, Daft, Spark and others.

    It can be pickled at any time; weights are loaded where and when they are first needed. All
    batches go through the model in one fixed size, with blank pictures to fill them up, so that a
    vector does not depend on how many others came with it.

    Args:
        source: a Hub id or a path, as `from_hf` takes it, of which only configuration and headers
            are read now; or a model, which is pickled along, so that others need not be able to
            find it.
        revision: branch, tag or commit of a Hub repository.
        local_files_only: use the Hub's local cache only.
        dtype: to compute in; None for the model's own.
        form: a name of `siglip_port.optimize.selection.ENGINES`.
        device: where; None for the model's own, or the CPU.
        threads: of the CPU, for the model; None for as many as torch uses now.
        batch_size: pictures that go through the model at a time.
        output: `pooled`, a vector a picture; or `tokens`, all of them, row by row.
        normalize: whether to scale vectors to unit length.
        store: as what numbers.
        backend: of `siglip_port.image_processing.ImageProcessor`.
        column: which column holds the pictures; None for the first of
            `siglip_port.embed.inputs.COLUMNS` that is there.

    Attributes:
        config: of the tower.
        processor: what makes pixels.
        name: of the model, for people.
        commit: of the Hub repository, if it is one.

    Raises:
        ValueError: an argument is none that there is, or the tower makes no such output.
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
        store: Store = "float32",
        backend: Backend = "pil",
        column: str | None = None,
    ) -> None:
        self._plain: SigLipVisionModel | None = None
        self._fast: OptimizedModel | None = None
        self._in_memory = isinstance(source, SigLipVisionModel)
        if isinstance(source, SigLipVisionModel):
            if isinstance(source, OptimizedModel):
                raise ValueError(
                    "the model is optimized already; pass the one that it was made of, and name "
                    "form="
                )
            self._plain, self.config, told = source, source.config, source.preprocessor_config
            self.name = source.provenance.source if source.provenance else "a model in memory"
            self.commit = source.provenance.commit if source.provenance else None
        else:
            files = find_source(source, revision=revision, local_files_only=local_files_only)
            checkpoint = Checkpoint(files)
            self.config, told, self.name, self.commit = (
                checkpoint.config,
                checkpoint.preprocessor_config,
                files.name,
                files.commit,
            )
        self._load: dict[str, Any] = {
            "revision": self.commit or revision,
            "local_files_only": local_files_only,
            "device": device,
        }
        self.processor = ImageProcessor.from_config(told, backend)
        self.dtype = torch.int8 if form == "int8" and dtype is None else dtype
        self.form, self.device, self.column = form, device, column
        self.threads = torch.get_num_threads() if threads is None else threads
        self.batch_size, self.output, self.normalize, self.store = (
            batch_size,
            output,
            normalize,
            store,
        )
        self._check()

    def _check(self) -> None:
        for name, value in (("batch_size", self.batch_size), ("threads", self.threads)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number from 1 on, got {value!r}")
        if self.form not in inference.ENGINES:
            raise ValueError(
                f"form must be one of {', '.join(inference.ENGINES)}, got {self.form!r}"
            )
        if self.output not in ("pooled", "tokens") or self.store not in ("float32", "float16"):
            raise ValueError(
                f"output must be pooled or tokens, store float32 or float16, got {self.output!r} "
                f"and {self.store!r}"
            )
        if self.output == "tokens" and (self.config.naflex or self.normalize):
            raise ValueError(
                "tokens are written of towers with pictures of one size, and are not normalised"
            )
        if (
            self.output == "pooled"
            and not self.config.pooling_head
            and not self.config.mean_pooling
        ):
            raise ValueError(
                "the model has no pooling head, so it makes no vectors; take output='tokens'"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Without the form that it runs in, which is of this process alone, and without weights that can be found."""
        return {**self.__dict__, "_fast": None, "_plain": self._plain if self._in_memory else None}

    @property
    def embedding_dim(self) -> int:
        """Numbers a row; known before any weights are loaded."""
        return self.config.embed_dim * (self.config.num_patches if self.output == "tokens" else 1)

    @property
    def plain(self) -> SigLipVisionModel:
        """The model as it was loaded."""
        if self._plain is None:
            self._plain = SigLipVisionModel.from_hf(self.name, **self._load)
        return self._plain

    @property
    def model(self) -> OptimizedModel:
        """The model in the form that it runs in."""
        if self._fast is None:
            with inference.threads(self.threads):
                plain = self.plain.to(self.device) if self.device is not None else self.plain
                self._fast = inference.in_form(plain, self.form, dtype=self.dtype)
        return self._fast

    @torch.inference_mode()
    def vectors(self, decoded: Sequence[Decoded]) -> tuple[NDArray[Any], list[str]]:
        """Runs the model.

        Args:
            decoded: B pictures, at most `batch_size`.

        Returns:
            [B, embedding_dim], NaN where there is no vector; and why there is none, empty where
            there is one.
        """
        side = self.config.patch_size if self.config.naflex else self.config.image_size
        blank = torch.zeros(self.config.num_channels, side, side)
        if not self.processor.do_resize:
            decoded = [self._fitting(d, blank.shape) for d in decoded]
        pixels = [blank if d.pixels is None else torch.from_numpy(d.pixels) for d in decoded]
        pixels += [blank] * (self.batch_size - len(pixels))
        model, batch = self.model, self.processor.batch(pixels)
        home = model.transformer.post_layernorm.weight.device
        if home.type != "cpu":  # so that the copy goes on while the next pictures are looked at
            batch = cast(
                Pixels,
                {k: part.pin_memory().to(home, non_blocking=True) for k, part in batch.items()},  # type: ignore[attr-defined]
            )
        with inference.threads(self.threads):
            if self.output == "tokens":
                found: Tensor = model(**batch).flatten(1)
            else:
                found = model.embed(**batch, normalize=self.normalize)
        rows = found[: len(decoded)].float().cpu().numpy().astype(self.store)
        errors = [
            d.error or ("" if np.isfinite(row).all() else "the model gave what is no number")
            for d, row in zip(decoded, rows, strict=True)
        ]
        rows[[bool(error) for error in errors]] = np.nan
        return rows, errors

    def _fitting(self, decoded: Decoded, shape: torch.Size) -> Decoded:
        """Without resizing, a picture may not fit the tower.

        That is an error of this picture alone.
        """
        if decoded.pixels is None:
            return decoded
        try:
            if not self.config.naflex and decoded.pixels.shape != shape:
                raise ImageError(
                    f"without resizing, a picture must be {list(shape)}, got "
                    f"{list(decoded.pixels.shape)}"
                )
            self.processor.batch([torch.from_numpy(decoded.pixels)])
        except ImageError as error:
            return replace(decoded, pixels=None, size=None, error=str(error))
        return decoded

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Turns the pictures of a batch of rows into vectors.

        Args:
            batch: columns of one length. That of the pictures holds paths, contents of files,
                arrays, or structs of `bytes` and `path`.

        Returns:
            All columns but that of the pictures (paths stay), and `width`, `height` (0 where there
            is an error), `embedding`, [B, embedding_dim] (NaN there), and `error` (empty where
            there is none).

        Raises:
            ValueError: there is no column of pictures.
        """
        name = self.column or next((name for name in COLUMNS if name in batch), None)
        if name is None or name not in batch:
            raise ValueError(
                f"no column {self.column or ' or '.join(COLUMNS)}, but {', '.join(batch)}; name "
                "one by column="
            )
        pictures = list(batch[name])
        decoded = [decode(picture, self.processor) for picture in pictures]
        vectors, errors = [np.zeros((0, self.embedding_dim), self.store)], list[str]()
        for first in range(0, len(decoded), self.batch_size):
            some, why = self.vectors(decoded[first : first + self.batch_size])
            vectors.append(some)
            errors += why
        paths = all(isinstance(picture, str) for picture in pictures)
        return {
            **{other: column for other, column in batch.items() if other != name or paths},
            "width": np.array([d.size[1] if d.size else 0 for d in decoded], np.int32),
            "height": np.array([d.size[0] if d.size else 0 for d in decoded], np.int32),
            "embedding": np.concatenate(vectors),
            "error": np.array(errors, dtype=object),
        }
