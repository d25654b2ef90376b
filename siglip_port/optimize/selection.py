"""`optimize`: select the fastest engine for a model on this machine.

Every engine is built, compared with the original model and timed; the fastest within tolerance is
chosen. The choice and compiled files are cached for later processes.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from siglip_port.extras import MissingExtraError
from siglip_port.model import SigLipVisionModel
from siglip_port.optimize.cache import (
    load_choice,
    machine_name,
    model_cache_folder,
    save_choice,
    short_hash,
)
from siglip_port.optimize.choice import Choice
from siglip_port.optimize.comparison import (
    TOLERANCES,
    ModelOutputs,
    noise_images,
    relative_difference,
)
from siglip_port.optimize.engines import ENGINES, EngineError, last_line
from siglip_port.optimize.optimized_model import OptimizedModel, inference_copy
from siglip_port.validation import parse_dtype, validate_positive_int

MAX_RELATIVE_TIME = 0.97
"""Largest accepted time of an engine, relative to eager; else eager is chosen."""

ROUNDS = 5
"""Timed runs of each engine."""


@dataclass
class Candidates:
    """Engines that passed the comparison, and reasons why others were skipped.

    Attributes:
        models: Engine -> model.
        differences: Engine -> relative difference from eager.
        skipped: Engine -> reason.
    """

    models: dict[str, OptimizedModel]
    differences: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def optimize(
    model: SigLipVisionModel,
    *,
    dtype: torch.dtype | str | None = None,
    engines: Sequence[str] | None = None,
    batch_size: int = 1,
    cache_dir: str | os.PathLike[str] | None = None,
) -> OptimizedModel:
    """Optimize a model for inference on this machine.

    Builds every engine, compares it with the model and times it. Chooses the fastest within
    `TOLERANCES`, or `eager` if none is at least 3 % faster. The choice and compiled files are
    cached by weights, configuration, CPU and versions.

    Args:
        model: Model, unchanged. Its parameters are shared: do not modify them afterwards.
        dtype: float32, bfloat16, float16, or int8 for dynamic quantization with float32 outputs,
            as a dtype or its name; None for the model's.
        engines: Names in `ENGINES` to try besides `eager`; None for every engine for `dtype`.
        batch_size: Batch size to optimize for.
        cache_dir: Cache folder; compiled files in it are executed, so it must not be writable by
            others. None for `engines` of siglip_port in the user's cache.

    Returns:
        Optimized model in `eval()` mode; `print(model.choice)` shows the engine and measurements.

    Raises:
        ValueError: An argument is not supported, or the parameters do not match the configuration.
    """
    dtype = parse_dtype(dtype, TOLERANCES)
    names = validate_arguments(model, dtype, engines, batch_size, cache_dir)
    copy = inference_copy(model, parameter_dtype(dtype))
    folder = model_cache_folder(copy, cache_dir)
    precision = dtype or copy.dtype
    conditions = (
        f"{str(precision).removeprefix('torch.')}, batch {batch_size}, {machine_name(copy.device)}"
    )
    choice_file = folder / f"{short_hash(conditions, *names)}.json"
    choice = load_choice(choice_file)
    if choice is not None and choice.engine in ENGINES:
        try:
            ENGINES[choice.engine](copy, folder)
        except (EngineError, MissingExtraError):  # no longer available: measure again
            copy = inference_copy(copy, None)
        else:
            copy.choice = choice
            return copy
    fast = choose(copy, names, batch_size, folder, conditions, TOLERANCES[precision])
    save_choice(choice_file, fast.choice)
    return fast


def with_engine(
    model: SigLipVisionModel,
    engine: str,
    *,
    dtype: torch.dtype | str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> OptimizedModel:
    """Run a model in a given engine, without timing it or comparing results.

    Args:
        model: Model, unchanged.
        engine: Name in `ENGINES`.
        dtype: Dtype as for `optimize`.
        cache_dir: Cache folder as for `optimize`.

    Raises:
        ValueError: An argument is not supported, or the parameters do not match the configuration.
        EngineError: The engine is not available for this dtype or device.
        siglip_port.extras.MissingExtraError: A required package is not installed.
    """
    dtype = parse_dtype(dtype, TOLERANCES)
    validate_arguments(model, dtype, [engine], 1, cache_dir)
    copy = inference_copy(model, parameter_dtype(dtype))
    if engine != "eager":  # it changes nothing and needs no cache
        ENGINES[engine](copy, model_cache_folder(copy, cache_dir))
    return copy


def parameter_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    """Return the parameter dtype: float32 for int8, which the engine quantizes itself."""
    return torch.float32 if dtype == torch.int8 else dtype


def validate_arguments(
    model: SigLipVisionModel,
    dtype: torch.dtype | None,
    engines: Sequence[str] | None,
    batch_size: int,
    cache_dir: str | os.PathLike[str] | None,
) -> list[str]:
    """Validate the arguments of `optimize`; return the engines to try.

    Raises:
        ValueError: An argument is not supported.
    """
    if not isinstance(model, SigLipVisionModel):
        raise ValueError(f"model must be a SigLipVisionModel, got {type(model).__name__}")
    if isinstance(model, OptimizedModel):
        raise ValueError("model is already optimized; pass the original model")
    if cache_dir is not None and not isinstance(cache_dir, (str, os.PathLike)):
        raise ValueError(f"cache_dir must be a path, got {cache_dir!r}")
    validate_positive_int("batch_size", batch_size)
    supported = engines_for(dtype)
    if engines is None:
        return supported
    if not isinstance(engines, (list, tuple)) or not all(name in list(ENGINES) for name in engines):
        raise ValueError(f"engines must be a list of {', '.join(ENGINES)}, got {engines!r}")
    for name in engines:
        if name not in supported:
            raise ValueError(
                f"engine {name} does not support dtype={dtype}; the engine int8 and "
                "dtype=torch.int8 require each other"
            )
    return [name for name in supported if name == "eager" or name in engines]


def engines_for(dtype: torch.dtype | None) -> list[str]:
    """Return the engines that support a dtype: int8 has its own, which no other dtype uses."""
    if dtype == torch.int8:
        return ["eager", "int8"]
    return [name for name in ENGINES if name != "int8"]


@torch.inference_mode()
def choose(
    model: OptimizedModel,
    names: Sequence[str],
    batch_size: int,
    cache: Path,
    conditions: str,
    tolerance: float,
) -> OptimizedModel:
    """Build, compare and time engines; return the fastest.

    Args:
        model: Inference copy without an engine.
        names: Engines to try.
        batch_size: Batch size.
        cache: Cache folder of the model.
        conditions: Conditions for the choice.
        tolerance: Largest accepted relative difference from eager.
    """
    images = noise_images(model, batch_size)
    candidates = build_candidates(model, names, images, cache, tolerance)
    medians = median_seconds(candidates.models, images)
    fastest = min(medians, key=lambda name: medians[name], default="eager")
    if fastest != "eager" and medians[fastest] > MAX_RELATIVE_TIME * medians["eager"]:
        fastest = "eager"
    fast = candidates.models[fastest]
    fast.choice = Choice(
        engine=fastest,
        conditions=conditions,
        milliseconds={name: 1000 * seconds / batch_size for name, seconds in medians.items()},
        difference=candidates.differences[fastest],
        bound=tolerance,
        skipped=candidates.skipped,
    )
    return fast


def build_candidates(
    model: OptimizedModel, names: Sequence[str], images: Tensor, cache: Path, tolerance: float
) -> Candidates:
    """Build each engine and compare its outputs with those of eager."""
    candidates = Candidates({"eager": model}, {"eager": 0.0})
    expected = ModelOutputs(model)(images)
    for name in names:
        if name == "eager":
            continue
        candidate = inference_copy(model, None)
        try:
            ENGINES[name](candidate, cache)
            difference = relative_difference(ModelOutputs(candidate)(images), expected)
        except (EngineError, MissingExtraError, OSError, RuntimeError) as error:
            candidates.skipped[name] = last_line(error)
            continue
        if not difference <= tolerance:
            candidates.skipped[name] = (
                f"relative difference from eager is {difference:.1e}, bound {tolerance:.0e}"
            )
            continue
        candidates.models[name] = candidate
        candidates.differences[name] = difference
    return candidates


def median_seconds(models: Mapping[str, OptimizedModel], images: Tensor) -> dict[str, float]:
    """Time models interleaved, so that drift cancels; return nothing for a single model."""
    if len(models) < 2:
        return {}
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(ROUNDS):
        for name, model in models.items():
            times[name].append(seconds_per_batch(model, images))
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def seconds_per_batch(model: SigLipVisionModel, images: Tensor) -> float:
    """Time one forward pass in seconds, including the device."""
    start = time.perf_counter()
    ModelOutputs(model)(images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
