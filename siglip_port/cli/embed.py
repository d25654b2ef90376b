"""The commands on many images: `embed`, `search`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from siglip_port.cli.exit_codes import INCOMPLETE
from siglip_port.cli.options import (
    DEFAULT_MODEL,
    JsonOption,
    ModelOption,
    OfflineOption,
    RevisionOption,
    known_engine,
    named_dtype,
)
from siglip_port.cli.output import fail, print_json
from siglip_port.cli.progress import status_line
from siglip_port.extras import require

if TYPE_CHECKING:
    from siglip_port.embed import Progress
    from siglip_port.model import SigLipVisionModel

PHASES = ("model", "waiting", "writing", "decoding", "preprocessing")
"""Where the time of a run goes; the last two go on beside the others."""


def embed(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Folders, images, patterns in quotation marks, .txt lists, .tar or .parquet files."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("-o", "--out", help="The folder to be written; a run that it holds goes on."),
    ],
    source: ModelOption = DEFAULT_MODEL,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="To compute in; the file's own."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    form: Annotated[
        str | None,
        typer.Option(
            help="An engine of `siglip_port.optimize`, or fastest: measured once, for minutes.",
            callback=known_engine,
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of the CPU, for the model; as many as fit.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 16,
    shard_size: Annotated[
        int, typer.Option(min=1, help="Rows a file; also what an interruption can cost.")
    ] = 2048,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Processes that decode; with --engine ray, that hold the model. As many as fit.",
        ),
    ] = None,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Write all tokens, not one vector an image.")
    ] = False,
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Scale vectors to unit length.")
    ] = False,
    store: Annotated[
        Literal["float32", "float16"], typer.Option(help="As what numbers to write.")
    ] = "float32",
    file_format: Annotated[
        Literal["parquet", "npy"],
        typer.Option("--format", help="Vectors in the parquet files, or in arrays beside them."),
    ] = "parquet",
    backend: Annotated[
        Literal["pil", "torchvision"], typer.Option(help="What resizes; torchvision is an extra.")
    ] = "pil",
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="This machine, or a Ray cluster.")
    ] = "local",
    address: Annotated[
        str | None, typer.Option(help="Of the Ray cluster; the one that Ray finds, or a new one.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the vectors of many images as parquet files.

    Exit code 0: all images have a vector. 3: some could not be read: their rows say why. 1: it
    could not go on; what is complete stays, and the same command goes on from there. 2: wrong
    arguments. 130: interrupted, likewise.
    """
    options: dict[str, Any] = {
        "dtype": named_dtype(dtype),
        "form": form,
        "threads": threads,
        "batch_size": batch_size,
        "shard_size": shard_size,
        "workers": workers,
        "output": "tokens" if tokens else "pooled",
        "normalize": normalize,
        "store": store,
        "format": file_format,
        "backend": backend,
        "engine": engine,
        "address": address,
    }
    require("pyarrow")
    check_device(device)
    from siglip_port.model import SigLipVisionModel

    model = SigLipVisionModel.from_hf(
        source, revision=revision, local_files_only=offline, device=device
    )
    summary = run(inputs, out, model, options)
    if as_json:
        print_json({"out": str(out), **summary.to_json()})
    else:
        print_summary(summary, out)
    if summary.failed:
        raise typer.Exit(INCOMPLETE)


def check_device(device: str) -> None:
    """Refuse a device that this machine does not have."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise typer.BadParameter(f"--device {device} cannot be used here: {reason}") from error


def run(
    inputs: list[str], out: Path, model: SigLipVisionModel, options: dict[str, Any]
) -> Progress:
    """Embed images, with a line on the terminal that says how far it is.

    Args:
        inputs: where the images are.
        out: the folder to write to.
        model: on the device where it is to run.
        options: further arguments of `siglip_port.embed.embed`.
    """
    from siglip_port.embed import EmbedError
    from siglip_port.embed import embed as embed_images
    from siglip_port.optimize import EngineError

    try:
        with status_line() as show:
            measuring = ", and measuring which form is fastest"
            show(f"listing the images{measuring if options['form'] == 'fastest' else ''}")
            return embed_images(
                inputs, out, model, report=lambda each: show(describe_progress(each)), **options
            )
    except (EmbedError, EngineError) as error:
        fail(str(error))


def describe_progress(progress: Progress) -> str:
    """How far a run is, and what its time goes into, in a line."""
    minutes = 0.0
    if progress.rate:
        minutes = (progress.total - progress.done) / progress.rate / 60
    seconds = progress.seconds or 1
    shares = ", ".join(f"{phase} {getattr(progress, phase) / seconds:.0%}" for phase in PHASES)
    return (
        f"{progress.done}/{progress.total}, {progress.failed} failed, {progress.rate:.1f} "
        f"images/s, {minutes:.0f} min left: {shares}"
    )


def print_summary(summary: Progress, out: Path) -> None:
    """Print what a run has done, and where its time went."""
    typer.echo(
        f"{summary.done} of {summary.total} images in {out}, {summary.failed} of them with an "
        "error instead"
    )
    typer.echo(
        f"{summary.fresh} now, {summary.rate:.1f} a second; seconds: {summary.waiting:.1f} waiting "
        f"for images, {summary.model:.1f} model, {summary.writing:.1f} writing; beside all that, "
        f"in all processes together, {summary.decoding:.1f} decoding, "
        f"{summary.preprocessing:.1f} preprocessing"
    )


def search(
    out: Annotated[Path, typer.Argument(help="A folder that `embed` has written.")],
    query: Annotated[Path, typer.Argument(help="An image.")],
    count: Annotated[int, typer.Option("-k", "--count", min=1, help="How many images.")] = 10,
    source: Annotated[
        str | None, typer.Option("--model", help="Where the model is now, if it has moved.")
    ] = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find the images of a folder of vectors that are nearest to one, by cosine.

    Exit code 0: found. 1: there are no vectors, or the image or the model cannot be read.
    """
    require("pyarrow")
    from siglip_port.embed import EmbedError
    from siglip_port.embed.search import embed_query
    from siglip_port.embed.search import search as search_vectors

    try:
        vector = embed_query(out, query, source=source, local_files_only=offline)
        nearest = search_vectors(out, vector, count)
    except EmbedError as error:
        fail(str(error))
    if as_json:
        rows = [{"cosine": cosine, "id": name, "path": path} for cosine, name, path in nearest]
        print_json({"query": str(query), "nearest": rows})
        return
    for cosine, name, _ in nearest:
        typer.echo(f"{cosine:.4f}  {name}")
