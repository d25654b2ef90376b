"""Options of an embedding run, validated once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from siglip_port.config import SigLipVisionConfig
from siglip_port.image_processing import Backend
from siglip_port.optimize import ENGINES
from siglip_port.optimize.comparison import TOLERANCES
from siglip_port.validation import NO_POOLING, explain_no_pooling, validate_positive_int

OutputDtype = Literal["float32", "float16"]
FileFormat = Literal["parquet", "npy"]
Executor = Literal["local", "ray"]

FASTEST = "fastest"
"""Value of `engine` that stands for the engine chosen by `siglip_port.optimize`."""


@dataclass(frozen=True)
class EmbedOptions:
    """Options of an embedding run.

    Attributes:
        dtype: Compute dtype; None for the model's own.
        engine: Name in `siglip_port.optimize.ENGINES`, or `FASTEST`; None for the engine of the
            run being resumed, or else `eager`.
        threads: CPU threads for the model; None for those of the run being resumed, or else
            torch's setting.
        batch_size: Images per forward pass.
        tokens: Whether to store all tokens of an image, row by row, instead of the pooled
            embedding.
        normalize: Whether to scale embeddings to unit length.
        output_dtype: Dtype of the stored embeddings.
        backend: Image backend, see `siglip_port.image_processing.ImageProcessor`.
        shard_size: Rows per file, rounded up to whole batches.
        num_workers: Decoding processes; 0 decodes in this process, as does None in a daemonic
            process; elsewhere None starts one per CPU core.
            On a Ray cluster: processes that hold the model; None fills the cluster.
        format: `parquet`; or `npy`, which stores embeddings in an array beside each Parquet file.
        executor: `local` for this machine, `ray` for a Ray cluster.
        address: Address of the Ray cluster; None for a detected one, or else a new one on this
            machine.

    Raises:
        ValueError: An option is not supported.
    """

    dtype: torch.dtype | None = None
    engine: str | None = None
    threads: int | None = None
    batch_size: int = 16
    tokens: bool = False
    normalize: bool = False
    output_dtype: OutputDtype = "float32"
    backend: Backend = "pil"
    shard_size: int = 2048
    num_workers: int | None = None
    format: FileFormat = "parquet"
    executor: Executor = "local"
    address: str | None = None

    def __post_init__(self) -> None:
        validate_positive_int("shard_size", self.shard_size)
        validate_positive_int("batch_size", self.batch_size)
        if self.threads is not None:
            validate_positive_int("threads", self.threads)
        if self.num_workers is not None:
            validate_num_workers(self.num_workers)
        if self.engine is not None:
            validate_choice("engine", self.engine, (*ENGINES, FASTEST))
        validate_engine_dtype(self.engine, self.dtype)
        for name in ("tokens", "normalize"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be True or False, got {value!r}")
        if self.tokens and self.normalize:
            raise ValueError(
                "normalize cannot be combined with tokens: it scales pooled embeddings"
            )
        validate_choice("output_dtype", self.output_dtype, get_args(OutputDtype))
        validate_choice("format", self.format, get_args(FileFormat))
        validate_choice("executor", self.executor, get_args(Executor))
        if self.address is not None and self.executor != "ray":
            raise ValueError(
                f"address requires the executor ray, got {self.executor!r}; pass executor='ray' "
                "(--executor ray)"
            )

    @property
    def batches_per_shard(self) -> int:
        """Batches per file."""
        return -(-self.shard_size // self.batch_size)


def validate_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def validate_num_workers(num_workers: object) -> None:
    """Raise ValueError unless `num_workers` is a non-negative integer."""
    if not isinstance(num_workers, int) or isinstance(num_workers, bool) or num_workers < 0:
        raise ValueError(f"num_workers must be a non-negative integer, got {num_workers!r}")


def validate_engine(engine: str | None) -> str:
    """Return `engine`; raise ValueError unless it is a name of `siglip_port.optimize.ENGINES`."""
    if engine is None or engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    return engine


def validate_device_name(device: str | None) -> None:
    """Raise ValueError unless torch knows the device; another machine may be the one to have it."""
    if device is None:
        return
    try:
        is_meta = torch.device(device).type == "meta"
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device must be the name of a device, such as 'cpu' or 'cuda:1', got {device!r}"
        ) from error
    if is_meta:
        raise ValueError("device must hold data, got 'meta'")


def validate_engine_dtype(engine: str | None, dtype: torch.dtype | None) -> None:
    """Raise ValueError unless an engine supports a compute dtype: only `int8` runs in int8."""
    if dtype is not None and dtype not in TOLERANCES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, TOLERANCES))}, got {dtype!r}")
    if engine == "int8" and dtype not in (None, torch.int8):
        raise ValueError(f"the engine int8 computes in int8, got dtype {dtype}; omit the dtype")
    if dtype == torch.int8 and engine not in (None, "int8"):
        raise ValueError(f"dtype int8 requires the engine int8, got {engine!r}")


def validate_output(
    options: EmbedOptions, config: SigLipVisionConfig, pooling: str | None = None
) -> None:
    """Raise ValueError unless a model of this configuration supports the requested output.

    Args:
        options: Options of the run.
        config: Configuration of the model.
        pooling: `Evidence.pooling` of the model, for the message; None if unknown.
    """
    if options.tokens and config.naflex:
        raise ValueError(
            "tokens of a NaFlex model cannot be stored: their number differs between images"
        )
    if not options.tokens and not config.has_pooled_output:
        reason = "the model has no pooling head, so there is no pooled embedding"
        if pooling is not None and pooling.startswith(NO_POOLING):
            reason = explain_no_pooling(pooling).partition(";")[0]
        raise ValueError(f"{reason}; pass tokens=True")
