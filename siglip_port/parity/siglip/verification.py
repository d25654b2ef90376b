"""Comparison of a checkpoint: loads port and reference, and runs all gates."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from siglip_port.checkpoint import CheckpointError, HubUnreachableError
from siglip_port.checkpoint.json_files import read_config
from siglip_port.checkpoint.source import Source
from siglip_port.config import SigLipVisionConfig
from siglip_port.extras import MissingExtraError
from siglip_port.hub import HubOptions, HubRepository, find_source, unreachable_reason
from siglip_port.hub.subfolder import Subfolder
from siglip_port.image_processing import ImageProcessor
from siglip_port.model import SigLipVisionModel
from siglip_port.parity import guard
from siglip_port.parity.gates.environment import exact_switches
from siglip_port.parity.results import Comparison, GateResult, Section
from siglip_port.parity.siglip import cases, pixels, reference
from siglip_port.parity.siglip.cases import Case
from siglip_port.parity.siglip.entrances.table import check_entrance_models
from siglip_port.parity.siglip.reference_process import References, load_processors
from siglip_port.parity.siglip.small_pixels import check_small_pixels
from siglip_port.parity.siglip.verify_options import DEFAULT_CHECKPOINT, VerifyOptions
from siglip_port.threads import torch_threads

DEFAULT_CONFIG = SigLipVisionConfig(pooling_head=True)
"""Architecture of the default checkpoint, known without a file."""

UNREACHABLE_REMEDY = (
    "check the spelling (no local path has this name), unset HF_HUB_OFFLINE if it is set, pass a "
    "local folder, or compare random weights with --weights random and no --checkpoint"
)

MEMORY_NOTE_BYTES = 4e9
"""A comparison that needs more memory prints a note."""

Track = Callable[[Iterator[GateResult], str], Iterator[GateResult]]
"""Progress display: (gate results, description) -> gate results."""


class PortNotLoadedError(Exception):
    """The port cannot load a checkpoint that was written for it, so that nothing else can run.

    Args:
        comparison: Comparison with this finding.
    """

    def __init__(self, comparison: Comparison) -> None:
        super().__init__(comparison.verdict)
        self.comparison = comparison


@dataclass(frozen=True)
class LoadedPort:
    """The port, and the source of its weights for the reference.

    Attributes:
        model: Port.
        source: Hub id, folder or file.
        commit: Commit of a Hub repository.
        subfolder: Subfolder of a Hub repository; empty for none.
        is_random: Whether the weights are random, written for this comparison.
    """

    model: SigLipVisionModel
    source: str
    commit: str | None = None
    subfolder: str = ""
    is_random: bool = False

    @property
    def place(self) -> dict[str, Any]:
        """Arguments that, beside the source, select the files for transformers."""
        # The other process has the cache of its own environment.
        cache = str(HubOptions().cache_root) if self.commit else None
        return {"revision": self.commit, "subfolder": self.subfolder, "cache_dir": cache}


def load_port(options: VerifyOptions, scratch: Path, references: References) -> LoadedPort:
    """Load the port through `from_hf`, with the checkpoint's weights or random ones.

    Args:
        options: Options of the comparison.
        scratch: Folder for random weights.
        references: Place of transformers, which writes them.

    Raises:
        siglip_port.CheckpointError: The checkpoint cannot be read or downloaded.
        PortNotLoadedError: The port cannot load random weights that were written for it.
    """
    source = open_source(options)
    repository = source.root if isinstance(source, Subfolder) else source
    is_on_hub = isinstance(repository, HubRepository)
    if is_on_hub and source.weights is not None:
        raise ValueError(
            f"{options.checkpoint}: transformers cannot load one file of a repository; pass the "
            "repository or a local folder"
        )
    is_default = is_on_hub and options.checkpoint == DEFAULT_CHECKPOINT and source is repository
    needs_hub = is_on_hub and not (is_default and options.weights == "random")
    needs_hub = needs_hub and not options.offline
    silence = unreachable_reason(source.name) if needs_hub else None
    offline = not needs_hub or silence is not None
    try:
        if options.weights != "random":
            return load_checkpoint(options, source, offline)
        contents = None if is_default else read_architecture(options, offline)
    except HubUnreachableError as error:
        reason = str(error)
        if silence is not None:
            reason = (
                f"{options.checkpoint} is not in the local cache, and the Hub cannot be reached "
                f"({silence})"
            )
        if options.weights != "auto" or not is_default:
            raise HubUnreachableError(f"{reason}; {UNREACHABLE_REMEDY}") from error
        note(f"{reason}; comparing random weights of the same architecture instead")
        contents = None
    write_random_weights(scratch, contents, references)
    model = guard.load(
        lambda: SigLipVisionModel.from_hf(scratch, dtype=options.torch_dtype, device=options.device)
    )
    if isinstance(model, GateResult):
        section = Section("checkpoint", "random weights, N1", (model,))
        raise PortNotLoadedError(Comparison((section,), "random weights"))
    return LoadedPort(model, str(scratch), is_random=True)


def open_source(options: VerifyOptions, offline: bool = False) -> Source:
    """Return the files of the checkpoint."""
    hub_options = HubOptions(options.revision, local_files_only=offline or options.offline)
    return find_source(options.checkpoint, hub_options, options.subfolder)


def load_checkpoint(options: VerifyOptions, source: Source, offline: bool) -> LoadedPort:
    """Load a checkpoint's weights from whole files, which the reference reads too."""
    model = SigLipVisionModel.from_hf(
        options.checkpoint,
        revision=options.revision,
        subfolder=options.subfolder,
        layout=options.layout,
        prefix=options.prefix,
        dtype=options.torch_dtype,
        device=options.device,
        local_files_only=offline,
        vision_only=False,
    )
    commit = model.provenance.commit if model.provenance else None
    if commit is None or not isinstance(source, Subfolder):
        return LoadedPort(model, absolute(source.address), commit)
    return LoadedPort(model, source.name, commit, source.subfolder)


def absolute(address: str) -> str:
    """Return a local path as an absolute one, for another process; a Hub id as it is."""
    path = Path(address).expanduser()
    return str(path.absolute()) if path.exists() else address


def read_architecture(options: VerifyOptions, offline: bool) -> dict[str, Any]:
    """Read the `config.json` of a checkpoint."""
    contents = read_config(open_source(options, offline))
    if contents is None:
        raise ValueError(f"{options.checkpoint}: config.json is missing; --weights random needs it")
    return contents


def write_random_weights(
    folder: Path, contents: dict[str, Any] | None, references: References
) -> None:
    """Write random weights for the architecture in a `config.json`; None for the default one.

    Raises:
        ValueError: The file does not describe a SigLIP vision encoder.
    """
    config = DEFAULT_CONFIG if contents is None else SigLipVisionConfig.from_hf(contents)
    fields = reference.fields_of(config)
    references.call(reference.write_random_checkpoint, folder, fields, contents=contents)


def checkpoint_case(
    options: VerifyOptions, port: LoadedPort, image: Image.Image, references: References
) -> Case:
    """Return the checkpoint at full size; its inputs are the image and a noise image."""
    warn_of_memory(port.model, options.torch_dtype)
    check_layout(options, port.model)
    config = port.model.config
    loaded = references.load(
        port.source,
        dtype=options.torch_dtype,
        naflex=config.naflex,
        device=options.device,
        **port.place,
    )
    # NaFlex models get whole images; the gate `pixels` covers their preprocessing.
    processors = load_processors(
        references, replace(config, naflex=False), port.source, **port.place
    )
    inputs = with_noise(processors["pil"](image)["pixel_values"])
    return Case(
        name="checkpoint",
        weights="random weights, N1" if port.is_random else "checkpoint weights",
        source=port.source,
        reference=loaded,
        inputs=inputs.to(options.device),
        gates=cases.ALL_GATES if options.full else cases.LARGE_MODEL_GATES,
        dtypes=options.rounding_dtypes,
        attentions=options.attentions,
    )


def check_layout(options: VerifyOptions, model: SigLipVisionModel) -> None:
    """Raise ValueError unless transformers can load the model's checkpoint."""
    checkpoint = options.checkpoint
    if model.provenance is None:
        raise CheckpointError(f"{checkpoint}: not loaded from files")
    layout = model.provenance.layout
    name = layout.partition(",")[0]
    is_flat = layout.endswith(("no prefix", "prefix vision_model"))
    if name not in ("HuggingFace", "HuggingFace NaFlex") or not is_flat:
        raise ValueError(
            f"{checkpoint} (layout: {layout}): transformers cannot load it as a SigLIP vision "
            f"encoder; run `siglip-port extract {checkpoint} DIR{options.selection}` and pass "
            "--checkpoint DIR"
        )


def warn_of_memory(model: SigLipVisionModel, dtype: torch.dtype) -> None:
    """Print the memory that a large model needs: two models in float64, all taps of two images."""
    config = model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    floats_per_token = 11 * config.embed_dim + 2 * config.mlp_hidden_dim
    taps = 2 * config.num_patches * config.num_encoder_blocks * floats_per_token
    need = (2 * parameters + taps) * 8 + 2 * parameters * dtype.itemsize + 1.0e9
    if need > MEMORY_NOTE_BYTES:
        note(
            f"{parameters / 1e6:.0f} M parameters: the comparison needs about "
            f"{need / 1e9:.0f} GB of memory"
        )


def with_noise(pixel_values: Tensor) -> Tensor:
    """Append an image of uniform noise in [-1, 1]: [1, C, S, S] -> [2, C, S, S]."""
    noise = torch.rand(pixel_values.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return torch.cat([pixel_values, noise])


def compare_pixels(port: LoadedPort, image: Image.Image, references: References) -> GateResult:
    """Compare the image processors of port and reference, configured by the checkpoint."""
    model = port.model
    expected = load_processors(references, model.config, port.source, **port.place)

    def check() -> GateResult:
        processors = {
            backend: ImageProcessor.from_config(model.preprocessor_config, backend)
            for backend in expected
        }
        embed = None if model.pooling_head is None else model.embed
        return pixels.check_pixels(processors, expected, image, embed)

    return guard.Guard(model).run("pixels", check)


def compare_small_pixels(naflex: bool, references: References) -> Section:
    """Compare image processors with default settings, of fixed-size or of NaFlex models."""
    name = "NaFlex preprocessing" if naflex else "preprocessing"
    return Section(name, "no weights", (check_small_pixels(naflex, references=references),))


@exact_switches()
def run_gates(
    options: VerifyOptions,
    port: LoadedPort,
    case: Case,
    image: Image.Image,
    references: References,
    track: Track,
) -> Comparison:
    """Run all gates on a checkpoint, and on small models with stress weights.

    Args:
        options: Options of the comparison.
        port: Port, loaded from the checkpoint.
        case: Checkpoint with its reference.
        image: Image for the gate `pixels`.
        references: Place of the references.
        track: Progress display.
    """
    results = [
        compare_pixels(port, image, references),
        *track(case.check(port.model), "checkpoint"),
    ]
    if options.optimized:
        results += track(engine_gates(case, port.model), "optimized")
    sections = [Section(case.name, case.weights, tuple(results))]
    sections += [compare_small_pixels(naflex, references) for naflex in (False, True)]
    # Free the runs in the other dtypes.
    case.reference_runs = {case.dtypes[0]: case.reference_run(case.dtypes[0])}
    small_cases = cases.small_cases(
        port.model.config,
        options.device,
        options.attentions,
        full=options.full,
        references=references,
    )
    for small_case in small_cases:
        with torch_threads(1), small_case as small:
            sections += run_small_model(options, small, track)
    with torch_threads(1):
        sections += check_entrance_models(references)
    return Comparison(tuple(sections), case.weights.split(",")[0])


def run_small_model(options: VerifyOptions, regimes: list[Case], track: Track) -> list[Section]:
    """Load the port of a small model and run its gates in every regime."""
    first = regimes[0]
    model = guard.load(lambda: SigLipVisionModel.from_hf(first.source, **first.load_options))
    if isinstance(model, GateResult):
        return [Section(first.name, first.weights, (model,))]
    sections = []
    for case in regimes:
        title = f"{case.name}, {case.weights}"
        results = list(track(case.check(model), title))
        if options.optimized and case.weights.startswith(("L7", "S1")):
            results += track(engine_gates(case, model), f"optimized {title}")
        sections.append(Section(case.name, case.weights, tuple(results)))
    return sections


def engine_gates(case: Case, model: SigLipVisionModel) -> Iterator[GateResult]:
    """Check the rounding of every available engine; print a note for each engine skipped."""
    from siglip_port.optimize import ENGINES, EngineError  # parity works without it

    for engine in ENGINES:
        if engine in ("eager", "int8"):  # eager is the port itself; int8 is not equal by design
            continue
        with tempfile.TemporaryDirectory(prefix="siglip_port-") as scratch:
            try:
                yield from cases.engine_gates(case, model, engine, Path(scratch))
            except (EngineError, MissingExtraError) as error:
                note(f"skipped {engine} on the {case.name}: {error}")


def note(text: str) -> None:
    """Print a line to stderr."""
    print(text, file=sys.stderr)
