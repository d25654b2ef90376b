"""The comparison of one checkpoint, from its files to the results of all gates."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from siglip_port.checkpoint import CheckpointError, HubUnreachableError
from siglip_port.checkpoint.json_files import read_config
from siglip_port.config import SigLipVisionConfig
from siglip_port.extras import MissingExtraError
from siglip_port.hub import HubOptions, HubRepository, find_source, unreachable_reason
from siglip_port.image_processing import ImageProcessor
from siglip_port.model import SigLipVisionModel
from siglip_port.parity.results import Comparison, GateResult, Section
from siglip_port.parity.siglip import cases, pixels, reference
from siglip_port.parity.siglip.cases import Case
from siglip_port.parity.siglip.verify_options import DEFAULT_CHECKPOINT, VerifyOptions
from siglip_port.threads import torch_threads

DEFAULT_CONFIG = SigLipVisionConfig(pooling_head=True)
"""The architecture of the default checkpoint: no file is needed to know it."""

UNREACHABLE_REMEDY = (
    "check the spelling (there is no such path here), unset HF_HUB_OFFLINE if it is set, pass a "
    "folder that holds it, or compare random weights: --weights random, without --checkpoint"
)

MEMORY_WORTH_A_NOTE = 4e9
"""Bytes; a comparison that needs more says so before it begins."""

Track = Callable[[Iterator[GateResult], str], Iterator[GateResult]]
"""Passes the gates of a checkpoint on, and shows how far they are; the text says which they are."""


@dataclass(frozen=True)
class LoadedPort:
    """The port, and where the reference finds the same weights.

    Attributes:
        model: the port.
        source: a Hub id, a folder or a file.
        commit: of a Hub repository.
        is_random: whether the weights are random ones, written for this comparison.
    """

    model: SigLipVisionModel
    source: str
    commit: str | None = None
    is_random: bool = False


def load_port(options: VerifyOptions, scratch: Path) -> LoadedPort:
    """Load the port through `from_hf`, as a user does, with the weights that can be had.

    Args:
        options: of the comparison.
        scratch: the folder for random weights, which the reference writes.

    Raises:
        siglip_port.CheckpointError: the checkpoint cannot be read, or not be fetched.
    """
    source = find_source(options.checkpoint)
    is_on_hub = isinstance(source, HubRepository)
    if isinstance(source, HubRepository) and source.weights is not None:
        raise ValueError(
            f"{options.checkpoint} names one file, which the reference cannot be told; pass the "
            "repository, or a folder"
        )
    is_default = is_on_hub and options.checkpoint == DEFAULT_CHECKPOINT
    needs_hub = is_on_hub and not (is_default and options.weights == "random")
    silence = unreachable_reason(source.name) if needs_hub else None
    offline = not needs_hub or silence is not None
    try:
        if options.weights != "random":
            return load_checkpoint(options, source.name, offline)
        config = DEFAULT_CONFIG if is_default else read_architecture(options.checkpoint, offline)
    except HubUnreachableError as error:
        reason = str(error)
        if offline:
            reason = (
                f"{options.checkpoint} is not in the local cache, and the Hub cannot be reached "
                f"({silence})"
            )
        if options.weights != "auto" or not is_default:
            raise HubUnreachableError(f"{reason}; {UNREACHABLE_REMEDY}") from error
        note(f"{reason}: comparing random weights of the same architecture instead.")
        config = DEFAULT_CONFIG
    reference.write_random_checkpoint(scratch, config)
    return LoadedPort(load_model(str(scratch), options), str(scratch), is_random=True)


def load_checkpoint(options: VerifyOptions, source: str, offline: bool) -> LoadedPort:
    """Load a checkpoint's own weights: whole files, since the reference reads the same ones."""
    model = load_model(options.checkpoint, options, local_files_only=offline, vision_only=False)
    commit = model.provenance.commit if model.provenance else None
    return LoadedPort(model, source, commit)


def load_model(
    source: str,
    options: VerifyOptions,
    *,
    local_files_only: bool = False,
    vision_only: bool = True,
) -> SigLipVisionModel:
    """Load a checkpoint in the dtype and on the device of the comparison."""
    return SigLipVisionModel.from_hf(
        source,
        dtype=options.torch_dtype,
        device=options.device,
        local_files_only=local_files_only,
        vision_only=vision_only,
    )


def read_architecture(checkpoint: str, offline: bool) -> SigLipVisionConfig:
    """Read the architecture of a checkpoint from its `config.json`."""
    contents = read_config(find_source(checkpoint, HubOptions(local_files_only=offline)))
    if contents is None:
        raise ValueError(f"{checkpoint} has no config.json, which tells the architecture")
    return SigLipVisionConfig.from_hf(contents)


def checkpoint_case(options: VerifyOptions, port: LoadedPort, image: Image.Image) -> Case:
    """The checkpoint itself, at full size: an image, and an image of noise."""
    warn_of_memory(port.model, options.torch_dtype)
    check_layout(options.checkpoint, port.model)
    config = port.model.config
    model = reference.load(
        port.source,
        pooling_head=port.model.pooling_head is not None,
        dtype=options.torch_dtype,
        naflex=config.naflex,
        device=options.device,
        revision=port.commit,
        local_files_only=True,
    )
    # A NaFlex model gets whole images here; its own pixels are the matter of another gate.
    processors = reference.image_processors(
        replace(config, naflex=False), port.source, revision=port.commit, local_files_only=True
    )
    inputs = with_noise(processors["pil"](image)["pixel_values"])
    return Case(
        name="checkpoint",
        weights="random weights, N1" if port.is_random else "checkpoint weights",
        source=port.source,
        reference=model,
        inputs=inputs.to(options.device),
        gates=cases.ALL_GATES,
        dtypes=options.rounding_dtypes,
        attentions=options.attentions,
    )


def check_layout(checkpoint: str, model: SigLipVisionModel) -> None:
    """Raise ValueError unless transformers loads the checkpoint that a model was loaded from."""
    if model.provenance is None:
        raise CheckpointError(f"{checkpoint} was not loaded from files")
    layout = model.provenance.layout
    name = layout.partition(",")[0]
    is_flat = layout.endswith(("no prefix", "prefix vision_model"))
    if name not in ("HuggingFace", "HuggingFace NaFlex") or not is_flat:
        raise ValueError(
            f"{checkpoint} (layout: {layout}) is no checkpoint that transformers loads as a "
            f"SigLIP encoder; take the encoder out, `siglip-port extract {checkpoint} FOLDER`, and "
            "compare that folder"
        )


def warn_of_memory(model: SigLipVisionModel, dtype: torch.dtype) -> None:
    """State the need of a large model before the comparison begins.

    Two models in float64, and all taps of two images.
    """
    config = model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    floats_per_token = 11 * config.embed_dim + 2 * config.mlp_hidden_dim
    taps = 2 * config.num_patches * config.num_encoder_blocks * floats_per_token
    need = (2 * parameters + taps) * 8 + 2 * parameters * dtype.itemsize + 1.0e9
    if need > MEMORY_WORTH_A_NOTE:
        note(
            f"this encoder has {parameters / 1e6:.0f} M parameters: needs about {need / 1e9:.0f} GB"
        )


def with_noise(pixel_values: Tensor) -> Tensor:
    """Put an image of uniform noise in [-1, 1] beside another: [1, C, S, S] -> [2, C, S, S]."""
    noise = torch.rand(pixel_values.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return torch.cat([pixel_values, noise])


def compare_pixels(port: LoadedPort, image: Image.Image) -> GateResult:
    """Compare what both sides' image processors make of images, as the checkpoint says."""
    model = port.model
    reference_processors = reference.image_processors(
        model.config, port.source, revision=port.commit, local_files_only=True
    )
    port_processors = {
        backend: ImageProcessor.from_config(model.preprocessor_config, backend)
        for backend in reference_processors
    }
    embed = None if model.pooling_head is None else model.embed
    return pixels.check_pixels(port_processors, reference_processors, image, embed)


def run_gates(
    options: VerifyOptions, port: LoadedPort, case: Case, image: Image.Image, track: Track
) -> Comparison:
    """Run all gates on a checkpoint, and on small models of its kind.

    The weights of the small models are such that bugs are loud.

    Args:
        options: of the comparison.
        port: loaded from the checkpoint.
        case: the checkpoint, with its reference.
        image: for the gate on pixels.
        track: shows how far it is.
    """
    results = [compare_pixels(port, image), *track(case.check(port.model), "checkpoint")]
    if options.optimized:
        results += track(engine_gates(case, port.model), "optimized")
    sections = [Section(case.name, case.weights, tuple(results))]
    # What the others computed is not needed again, and takes memory.
    case.reference_runs = {case.dtypes[0]: case.reference_run(case.dtypes[0])}
    small_cases = cases.small_cases(
        port.model.config, options.device, options.attentions, full=options.full
    )
    for small_case in small_cases:
        with torch_threads(1), small_case as small:
            sections.append(run_small_case(options, small, track))
    return Comparison(tuple(sections), case.weights.split(",")[0])


def run_small_case(options: VerifyOptions, case: Case, track: Track) -> Section:
    """Run the gates of a small model, whose port is loaded from the case's source."""
    model = SigLipVisionModel.from_hf(case.source, device=options.device)
    title = f"{case.name}, {case.weights}"
    results = list(track(case.check(model), title))
    if options.optimized and "rounding" in case.gates:
        results += track(engine_gates(case, model), f"optimized {title}")
    return Section(case.name, case.weights, tuple(results))


def engine_gates(case: Case, model: SigLipVisionModel) -> Iterator[GateResult]:
    """Judge every engine that the model can run in; say which it cannot, and why."""
    from siglip_port.optimize import ENGINES, EngineError  # parity works without it

    for engine in ENGINES:
        if engine in ("eager", "int8"):  # the port itself; not meant to be equal
            continue
        with tempfile.TemporaryDirectory(prefix="siglip_port-") as scratch:
            try:
                yield from cases.engine_gates(case, model, engine, Path(scratch))
            except (EngineError, MissingExtraError) as error:
                note(f"{engine} is not judged on the {case.name}: {error}")


def note(text: str) -> None:
    """Print a line to stderr."""
    print(text, file=sys.stderr)
