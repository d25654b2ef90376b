"""The commands `embed` and `search`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from siglip_port.cli.exit_codes import INCOMPLETE
from siglip_port.cli.options import (
    DEFAULT_MODEL,
    JsonOption,
    LoadArguments,
    ModelOption,
    PreprocessingOption,
    check_engine,
    named_dtype,
    with_checkpoint_options,
)
from siglip_port.cli.output import fail, print_json
from siglip_port.cli.progress import status_line
from siglip_port.extras import require

if TYPE_CHECKING:
    from siglip_port.embed import Progress
    from siglip_port.model import SigLipVisionModel

# --- arguments and options ------------------------------------------------------------------------

InputsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="INPUTS", help="Folders, images, quoted globs, .txt, .tar, .parquet files."
    ),
]
OutputOption = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="DIR", help="Output folder; resumes a run in it."),
]
DtypeOption = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="Compute dtype. [default: the checkpoint's]"),
]
DeviceOption = Annotated[
    str, typer.Option(metavar="DEVICE", help="Device of the model: cpu, cuda, cuda:1, ...")
]
EngineOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Engine, or fastest. [default: eager, or the resumed run's]",
        callback=check_engine,
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="CPU threads. [default: all cores, or the resumed run's]",
    ),
]
BatchSizeOption = Annotated[int, typer.Option(min=1, metavar="N", help="Images per forward pass.")]
ShardSizeOption = Annotated[
    int, typer.Option(min=1, metavar="N", help="Rows per file; unfinished files are recomputed.")
]
NumWorkersOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="N",
        help="Decoding processes. [default: one per CPU core]",
    ),
]
TokensOption = Annotated[
    bool, typer.Option("--tokens", help="Write all tokens instead of pooled embeddings.")
]
NormalizeOption = Annotated[
    bool, typer.Option("--normalize", help="Scale embeddings to unit length.")
]
OutputDtypeOption = Annotated[
    Literal["float32", "float16"], typer.Option(help="dtype of the stored embeddings.")
]
FormatOption = Annotated[
    Literal["parquet", "npy"],
    typer.Option("--format", help="Embeddings in Parquet files, or in .npy beside them."),
]
BackendOption = Annotated[
    Literal["pil", "torchvision"],
    typer.Option(help="Image backend (`torchvision` needs the extra)."),
]
ExecutorOption = Annotated[
    Literal["local", "ray"], typer.Option(help="Run on this machine or on a Ray cluster.")
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Ray cluster. [default: detected, or a new local one]",
    ),
]
EmbeddingsArgument = Annotated[
    Path, typer.Argument(metavar="EMBEDDINGS", help="Output folder of `embed`.")
]
ImageArgument = Annotated[Path, typer.Argument(metavar="IMAGE", help="Query image.")]
TopKOption = Annotated[
    int, typer.Option("--top-k", "-k", min=1, metavar="N", help="Number of images.")
]
MovedModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="Hub id or path. [default: the model of the embeddings]",
    ),
]

# --- embed ----------------------------------------------------------------------------------------

MAX_ERRORS_SHOWN = 3

PHASES = {
    "model": "model_seconds",
    "waiting": "wait_seconds",
    "writing": "write_seconds",
    "decoding": "decode_seconds",
    "preprocessing": "preprocess_seconds",
}
"""Phases of a run -> attributes of `Progress`; the last two overlap with the others."""


@with_checkpoint_options
def embed(
    inputs: InputsArgument,
    output: OutputOption,
    source: ModelOption = DEFAULT_MODEL,
    preprocessing: PreprocessingOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    engine: EngineOption = None,
    threads: ThreadsOption = None,
    batch_size: BatchSizeOption = 16,
    shard_size: ShardSizeOption = 2048,
    num_workers: NumWorkersOption = None,
    tokens: TokensOption = False,
    normalize: NormalizeOption = False,
    output_dtype: OutputDtypeOption = "float32",
    file_format: FormatOption = "parquet",
    backend: BackendOption = "pil",
    executor: ExecutorOption = "local",
    address: AddressOption = None,
    as_json: JsonOption = False,
    *,
    load: LoadArguments,
) -> None:
    """Write embeddings of images to Parquet files."""
    options: dict[str, Any] = {
        "dtype": named_dtype(dtype),
        "engine": engine,
        "threads": threads,
        "batch_size": batch_size,
        "shard_size": shard_size,
        "num_workers": num_workers,
        "tokens": tokens,
        "normalize": normalize,
        "output_dtype": output_dtype,
        "format": file_format,
        "backend": backend,
        "executor": executor,
        "address": address,
    }
    require("pyarrow")
    check_device(device)
    check_options(options)
    from siglip_port.model import SigLipVisionModel

    model = SigLipVisionModel.from_hf(source, **load, preprocessing=preprocessing, device=device)
    summary = run(inputs, output, model, options)
    if as_json:
        print_json({"output": str(output), **summary.to_json()})
    else:
        print_summary(summary, output)
    if summary.failed == summary.done:
        print_first_errors(output)
    if summary.failed:
        raise typer.Exit(INCOMPLETE)


def check_device(device: str) -> None:
    """Raise BadParameter if this machine does not have the device."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise typer.BadParameter(f"--device {device} is not available: {reason}") from error


def check_options(options: dict[str, Any]) -> None:
    """Raise BadParameter if options of `embed` conflict."""
    from siglip_port.embed import EmbedOptions

    try:
        EmbedOptions(**options)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def run(
    inputs: list[str], output: Path, model: SigLipVisionModel, options: dict[str, Any]
) -> Progress:
    """Embed images while showing progress on the terminal.

    Args:
        inputs: Folders, files and patterns.
        output: Output folder.
        model: SigLIP vision encoder, on the device to use.
        options: Keyword arguments of `siglip_port.embed.embed`.
    """
    from siglip_port.embed import EmbedError
    from siglip_port.embed import embed as embed_images
    from siglip_port.optimize import EngineError

    try:
        with status_line() as show:
            is_measuring = options["engine"] == "fastest"
            show("listing images, measuring engines" if is_measuring else "listing images")
            return embed_images(
                inputs,
                output,
                model,
                on_progress=lambda progress: show(describe_progress(progress)),
                **options,
            )
    except (EmbedError, EngineError) as error:
        fail(str(error))


def describe_progress(progress: Progress) -> str:
    """Describe the progress of a run and the share of each phase in its time, in one line."""
    minutes = 0.0
    rate = progress.images_per_second
    if rate:
        minutes = (progress.total - progress.done) / rate / 60
    seconds = progress.seconds or 1
    shares = [f"{phase} {getattr(progress, name) / seconds:.0%}" for phase, name in PHASES.items()]
    return (
        f"{progress.done:,}/{progress.total:,} images, {progress.failed:,} failed, "
        f"{rate:.1f} images/s, {minutes:.0f} min left: {', '.join(shares)}"
    )


def print_summary(summary: Progress, output: Path) -> None:
    """Print the result of a run and its times."""
    embedded = summary.done - summary.failed
    result = f"{embedded:,} {'image' if embedded == 1 else 'images'} embedded"
    if summary.failed:
        result += f", {summary.failed:,} failed (see column error)"
    typer.echo(result)
    if not summary.processed:
        typer.echo(f"{output}: already complete")
        return
    typer.echo(
        f"{output}: {summary.processed:,} new rows in {summary.seconds:.1f} s "
        f"({summary.images_per_second:.1f} images/s)"
    )
    seconds = [f"{phase} {getattr(summary, name):.1f} s" for phase, name in PHASES.items()]
    typer.echo(f"time: {', '.join(seconds[:3])}; all workers: {', '.join(seconds[3:])}")


def print_first_errors(output: Path) -> None:
    """Print to stderr why the first images failed."""
    from siglip_port.embed.shards import first_errors

    typer.echo("all images failed; the first errors:", err=True)
    for error in first_errors(output, MAX_ERRORS_SHOWN):
        typer.echo(error, err=True)


# --- search ---------------------------------------------------------------------------------------


@with_checkpoint_options
def search(
    embeddings: EmbeddingsArgument,
    image: ImageArgument,
    top_k: TopKOption = 10,
    source: MovedModelOption = None,
    as_json: JsonOption = False,
    *,
    load: LoadArguments,
) -> None:
    """Find the images most similar to a query image."""
    require("pyarrow")
    from siglip_port.embed import EmbedError
    from siglip_port.embed.search import embed_query
    from siglip_port.embed.search import search as search_embeddings

    try:
        query = embed_query(embeddings, image, source=source, **load)
        nearest = search_embeddings(embeddings, query, top_k)
    except EmbedError as error:
        fail(str(error))
    if as_json:
        rows = [{"cosine": cosine, "id": name, "path": path} for cosine, name, path in nearest]
        print_json({"query": str(image), "nearest": rows})
        return
    for cosine, name, _ in nearest:
        typer.echo(f"{cosine:.4f}  {name}")
