"""The fast path: one call that turns a model into its fastest form on the machine at hand.

Every engine is built, compared with the model itself and timed beside it; the fastest whose results
stay within a tolerance is chosen. The choice is kept, and so is what was compiled: the next process
starts with it at once.
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
from siglip_port.validation import validate_positive_int

MAX_RELATIVE_TIME = 0.97
"""An engine that needs more than this share of the model's own time is not worth it."""

ROUNDS = 5


@dataclass
class Candidates:
    """The engines that could be built, and the reasons against the others.

    Attributes:
        models: by engine.
        differences: from the model itself, by engine.
        left_out: the reason against each other engine.
    """

    models: dict[str, OptimizedModel]
    differences: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def optimize(
    model: SigLipVisionModel,
    *,
    dtype: torch.dtype | None = None,
    engines: Sequence[str] | None = None,
    batch_size: int = 1,
    cache_dir: str | os.PathLike[str] | None = None,
) -> OptimizedModel:
    """Turn a loaded model into its fastest form for inference on the machine at hand.

    Every engine is built, compared with the model itself and timed beside it. The fastest that
    stays within `TOLERANCES` is chosen; the model itself, if none is faster. The choice for these
    weights is kept, and what was compiled, so that the next process starts with it.

    Args:
        model: not changed. Its parameters are shared, so let them be.
        dtype: float32, bfloat16 or float16; None for the model's own. Results change by rounding
            where it is another. int8 for Linears of 8 bits around results of float32: what that
            costs stands in docs/performance.md.
        engines: which of `ENGINES` may be chosen, besides the model itself; None for all of the
            dtype. `[]` for none.
        batch_size: images at a time that the choice is for.
        cache_dir: where to keep what was compiled and chosen; None for `siglip_port` in the user's
            cache folder. What is in there is trusted: let it be a folder that nobody else writes
            to.

    Returns:
        The same model in another form, in `eval()` mode: `print(fast.choice)` says in which, and
        why.

    Raises:
        ValueError: an argument is not supported, or the parameters are no longer those of the
            model's configuration.
    """
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
        except (EngineError, MissingExtraError):  # it could be used before: measure again
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
    dtype: torch.dtype | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> OptimizedModel:
    """Put a model into one engine, whether that is fast here or not, and without comparing results.

    Args:
        model: as for `optimize`.
        engine: a name of `ENGINES`.
        dtype: as for `optimize`.
        cache_dir: as for `optimize`.

    Raises:
        ValueError: as for `optimize`.
        EngineError: the engine cannot be used here.
        MissingExtraError: what it needs is not installed.
    """
    validate_arguments(model, dtype, [engine], 1, cache_dir)
    copy = inference_copy(model, parameter_dtype(dtype))
    ENGINES[engine](copy, model_cache_folder(copy, cache_dir))
    return copy


def parameter_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    """Return the dtype of the parameters: float32 for int8, which engines quantize themselves."""
    return torch.float32 if dtype == torch.int8 else dtype


def validate_arguments(
    model: SigLipVisionModel,
    dtype: torch.dtype | None,
    engines: Sequence[str] | None,
    batch_size: int,
    cache_dir: str | os.PathLike[str] | None,
) -> list[str]:
    """Check the arguments of `optimize`; return the names of the engines to try.

    Raises:
        ValueError: an argument is not supported.
    """
    if not isinstance(model, SigLipVisionModel):
        raise ValueError(f"model must be a SigLipVisionModel, got a {type(model).__name__}")
    if isinstance(model, OptimizedModel):
        raise ValueError("the model is optimized already; pass the one that it was made of")
    if dtype is not None and dtype not in TOLERANCES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, TOLERANCES))}, got {dtype!r}")
    if cache_dir is not None and not isinstance(cache_dir, (str, os.PathLike)):
        raise ValueError(f"cache_dir must be a path, got {cache_dir!r}")
    validate_positive_int("batch_size", batch_size)
    supported = engines_for(dtype)
    if engines is None:
        return supported
    if not isinstance(engines, (list, tuple)) or not all(name in list(ENGINES) for name in engines):
        raise ValueError(f"engines must be a list of some of {', '.join(ENGINES)}, got {engines!r}")
    for name in engines:
        if name not in supported:
            raise ValueError(
                f"engine {name} does not go with dtype {dtype}: int8 goes with torch.int8, and "
                "nothing else"
            )
    return [name for name in supported if name == "eager" or name in engines]


def engines_for(dtype: torch.dtype | None) -> list[str]:
    """Return the names of the engines that go with a dtype: int8 for int8, and no other."""
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
    """Build the engines that can be built, and choose the fastest.

    Args:
        model: an inference copy, in no engine.
        names: of the engines.
        batch_size: images at a time.
        cache: the folder that belongs to the model.
        conditions: for the choice.
        tolerance: the largest difference from the model.
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
        left_out=candidates.left_out,
    )
    return fast


def build_candidates(
    model: OptimizedModel, names: Sequence[str], images: Tensor, cache: Path, tolerance: float
) -> Candidates:
    """Put copies of a model into engines, and compare the results of each with the model's own."""
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
            candidates.left_out[name] = last_line(error)
            continue
        if not difference <= tolerance:
            candidates.left_out[name] = (
                f"its results differ from the encoder's own by {difference:.1e}, "
                f"bound {tolerance:.0e}"
            )
            continue
        candidates.models[name] = candidate
        candidates.differences[name] = difference
    return candidates


def median_seconds(models: Mapping[str, OptimizedModel], images: Tensor) -> dict[str, float]:
    """Time models in turns, so that drift cancels; nothing where there is no choice."""
    if len(models) < 2:
        return {}
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(ROUNDS):
        for name, model in models.items():
            times[name].append(seconds_per_batch(model, images))
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def seconds_per_batch(model: SigLipVisionModel, images: Tensor) -> float:
    """Time one pass, that of the device included."""
    started = time.perf_counter()
    ModelOutputs(model)(images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started
