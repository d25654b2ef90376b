"""The commands of `siglip-port`.

Look into a checkpoint, take the tower out of it, use it, list what is published.

Imported by the entry point alone: it needs typer and rich, which the library does not.
"""

from __future__ import annotations

import importlib
import json
import os
import shlex
import shutil
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import torch
import typer
import typer.core
from rich.console import Console
from rich.table import Table

from siglip_port.checkpoint import layouts as key_map
from siglip_port.checkpoint.errors import CheckpointError, SeveralTowersError
from siglip_port.checkpoint.extract import Format, extract_model
from siglip_port.checkpoint.inspect import Inspection, inspect_checkpoint
from siglip_port.checkpoint.preprocessor_config import RESAMPLE
from siglip_port.checkpoint.registry import PUBLISHED, Published
from siglip_port.hub import HubOptions, find_source
from siglip_port.image_processing import ImageError, to_rgb
from siglip_port.model import SigLipVisionModel
from siglip_port.text import format_bytes

_WIDTH = 100_000  # columns: nothing is cut off or broken; a narrower terminal wraps by itself


class _Sentences(typer.core.TyperGroup):
    """Says what went wrong in a sentence.

    What is not foreseen here is a fault of ours, and keeps its traceback.
    """

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 (typer's own, which releases call differently)
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader has seen enough, as in `siglip-port list | head`
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 (what is left unwritten would raise again at the end)
            raise typer.Exit from None
        except SeveralTowersError as error:
            choices = "; ".join(_arguments(layout.name, prefix) for layout, prefix in error.towers)
            _fail(f"the checkpoint holds more than one vision tower; pass one of: {choices}", 1)
        except (CheckpointError, ValueError, OSError) as error:
            _fail(str(error), 1)
        except KeyboardInterrupt:
            _fail("interrupted", 130)


app = typer.Typer(
    cls=_Sentences,
    help="Looks into checkpoints that hold a SigLIP vision tower, and takes the tower out of them.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"siglip-port {version('siglip-port')}")
        raise typer.Exit


def _known_layout(name: str | None) -> str | None:
    known = [layout.name for layout in key_map.LAYOUTS]
    if name is not None and name not in known:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(known)}")
    return name


def _known_form(name: str | None) -> str | None:
    from siglip_port.optimize import ENGINES

    known = [*ENGINES, "fastest"]
    if name is not None and name not in known:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(known)}")
    return name


SourceArgument = Annotated[
    str, typer.Argument(help="A Hub id, a folder, or a .safetensors or .npz file.")
]
LayoutOption = Annotated[
    str | None,
    typer.Option(help="Name of the layout, instead of recognising it.", callback=_known_layout),
]
PrefixOption = Annotated[
    str | None,
    typer.Option(help="What stands before the tower's names, such as 'vision_model.'; may be ''."),
]
RevisionOption = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")
]
OfflineOption = Annotated[bool, typer.Option("--offline", help="Use the Hub's local cache only.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object, and nothing else.")
]


@app.callback()
def options(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Takes the options that belong to no command."""


@app.command("inspect")
def inspect_command(
    source: SourceArgument,
    as_json: JsonOption = False,
    layout: LayoutOption = None,
    prefix: PrefixOption = None,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
) -> None:
    """Tell what a checkpoint holds, and whether it can be loaded.

    Of weights on the Hub, only headers are fetched.

    Of files on this machine, the tower is read, too, and it is told what in it is NaN or infinite.

    Exit code 0: it can be loaded. 1: it cannot, or holds several towers.
    """
    files = find_source(source, HubOptions(revision=revision, local_files_only=offline))
    try:
        found = inspect_checkpoint(files, layout=layout, prefix=prefix)
    except SeveralTowersError as error:
        if as_json:
            towers = [{"layout": tower.name, "prefix": place} for tower, place in error.towers]
            _print_json(
                {
                    "source": files.name,
                    "commit": files.commit,
                    "towers": towers,
                    "problem": str(error),
                }
            )
        raise
    if as_json:
        _print_json(found.to_json())
    else:
        _print_inspection(found)
    if found.problem is not None:
        raise CheckpointError(found.problem)


@app.command("extract")
def extract_command(
    source: SourceArgument,
    out: Annotated[
        Path,
        typer.Argument(help="The folder to be written: one that does not exist, or an empty one."),
    ],
    layout: LayoutOption = None,
    prefix: PrefixOption = None,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16", "float64"] | None,
        typer.Option(help="Of the parameters, instead of the file's own."),
    ] = None,
    written_as: Annotated[
        Format, typer.Option("--format", help="For transformers, or for timm.")
    ] = "hf",
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Write into a folder that is not empty: files of the same names are lost.",
        ),
    ] = False,
) -> None:
    """Write the tower of a checkpoint as a checkpoint of its own, and verify it bit for bit.

    Exit code 0: written and verified. 1: it cannot be loaded, written or verified. 2: wrong
    arguments.
    """
    _check_out(out, Path(source), force)
    model = SigLipVisionModel.from_hf(
        source,
        revision=revision,
        dtype=None if dtype is None else getattr(torch, dtype),
        layout=layout,
        prefix=prefix,
        local_files_only=offline,
    )
    done = extract_model(model, out, written_as=written_as)
    typer.echo(model.provenance)
    for number, file in enumerate(done.files):
        typer.echo(f"{'' if number else 'written':9}{file} ({format_bytes(file.stat().st_size)})")
    what = f"tokens {list(done.tokens)}" + (
        f" and vector {list(done.pooled)}" if done.pooled else ""
    )
    typer.echo(
        f"verified {done.parameters} parameters, and {what} of a picture of noise: the same bits"
    )
    if model.config.interpolation is not None:
        typer.echo(
            f"note     the files cannot tell interpolation={model.config.interpolation!r}: pass it "
            "to from_hf"
        )


@app.command("export")
def export_command(
    source: SourceArgument,
    out: Annotated[
        Path,
        typer.Argument(help="The file to be written: *.onnx, or *.pt2. Replaced if it is there."),
    ],
    kind: Annotated[
        Literal["onnx", "program", "package"],
        typer.Option(
            "--format",
            help="ONNX; a torch.export program; or an AOTInductor package for processors such as this one.",
        ),
    ] = "onnx",
    layout: LayoutOption = None,
    prefix: PrefixOption = None,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
) -> None:
    """Write the tower for other programs, run what was written, and compare it with the tower.

    Input pixel_values [batch, 3, size, size], outputs tokens and pooled, for every batch size.

    Exit code 0: written and compared. 1: it cannot be loaded, written or is not equal. 2: wrong
    arguments.
    """
    from siglip_port.optimize.export import EXPORTS, ExportError

    write, suffix = EXPORTS[kind]
    if out.suffix != suffix:
        raise typer.BadParameter(
            f"OUT must be named *{suffix} for --format {kind}, got {str(out)!r}"
        )
    if not out.parent.is_dir():
        raise typer.BadParameter(
            f"the folder {out.parent}, in which it is to be written, does not exist"
        )
    model = SigLipVisionModel.from_hf(
        source,
        revision=revision,
        layout=layout,
        prefix=prefix,
        local_files_only=offline,
        dtype=torch.float32,
    )
    try:
        far = write(model, out)
    except ExportError as error:
        _fail(str(error), 1)
    typer.echo(model.provenance)
    typer.echo(f"written  {out} ({format_bytes(out.stat().st_size)})")
    typer.echo(f"compared with the tower, in batches of 1, 2 and 5: differs by {far:.1e}")


@app.command("embed")
def embed_command(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Folders, pictures, patterns in quotation marks, .txt lists, .tar or .parquet files."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("-o", "--out", help="The folder to be written; a run that it holds goes on."),
    ],
    source: Annotated[
        str, typer.Option("--model", help="A Hub id, a folder, or a file.")
    ] = PUBLISHED[0].repo,
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
            callback=_known_form,
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of the CPU, for the model; as many as fit.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 16,
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
        bool, typer.Option("--tokens", help="Write all tokens, not one vector a picture.")
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
    """Write the vectors of many pictures as parquet files.

    Exit code 0: all pictures have a vector. 3: some could not be read: their rows say why. 1: it
    could not go on; what is complete stays, and the same command goes on from there. 2: wrong
    arguments. 130: interrupted, likewise.
    """
    from siglip_port.optimize import EngineError

    embedding = _embedding()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(
            f"--device {device} cannot be used here: {str(error).splitlines()[0]}"
        ) from error
    model = SigLipVisionModel.from_hf(
        source, revision=revision, local_files_only=offline, device=device
    )
    line = _Line()
    line.show(
        "listing the pictures"
        + (", and measuring which form is fastest" if form == embedding.FASTEST else "")
    )
    try:
        done = embedding.embed(
            inputs,
            out,
            model,
            dtype=None if dtype is None else getattr(torch, dtype),
            form=form,
            threads=threads,
            batch_size=batch_size,
            shard_size=shard_size,
            workers=workers,
            output="tokens" if tokens else "pooled",
            normalize=normalize,
            store=store,
            format=file_format,
            backend=backend,
            engine=engine,
            address=address,
            report=lambda progress: line.show(_progress(progress)),
        )
    except (embedding.EmbedError, EngineError) as error:
        line.clear()
        _fail(str(error), 1)
    line.clear()
    if as_json:
        _print_json({"out": str(out), **done.to_json()})
    else:
        typer.echo(
            f"{done.done} of {done.total} pictures in {out}, {done.failed} of them with an error "
            "instead"
        )
        typer.echo(
            f"{done.fresh} now, {done.rate:.1f} a second; seconds: {done.waiting:.1f} waiting for "
            "pictures, "
            f"{done.model:.1f} model, {done.writing:.1f} writing; beside all that, in all "
            "processes "
            f"together, {done.decoding:.1f} decoding, {done.preprocessing:.1f} preprocessing"
        )
    if done.failed:
        raise typer.Exit(3)


@app.command("search")
def search_command(
    out: Annotated[Path, typer.Argument(help="A folder that `embed` has written.")],
    query: Annotated[Path, typer.Argument(help="A picture.")],
    count: Annotated[int, typer.Option("-k", "--count", min=1, help="How many pictures.")] = 10,
    source: Annotated[
        str | None, typer.Option("--model", help="Where the model is now, if it has moved.")
    ] = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find the pictures of a folder of vectors that are nearest to one, by cosine.

    Exit code 0: found. 1: there are no vectors, or the picture or the model cannot be read.
    """
    embedding, nearest = _embedding(), importlib.import_module("siglip_port.embed.search")
    try:
        vector = nearest.embed_query(out, query, source=source, local_files_only=offline)
        found = nearest.search(out, vector, count)
    except embedding.EmbedError as error:
        _fail(str(error), 1)
    if as_json:
        rows = [{"cosine": cosine, "id": name, "path": path} for cosine, name, path in found]
        _print_json({"query": str(query), "nearest": rows})
        return
    for cosine, name, _ in found:
        typer.echo(f"{cosine:.4f}  {name}")


@app.command("figures")
def figures_command(
    image: Annotated[Path, typer.Argument(help="A picture.")],
    out: Annotated[
        Path, typer.Option("-o", "--out", file_okay=False, help="The folder to be written.")
    ],
    source: Annotated[
        str, typer.Option("--model", help="A Hub id, a folder, or a file.")
    ] = PUBLISHED[0].repo,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
) -> None:
    """Draw what the tower has learned, and what it makes of a picture, as PNG files.

    Its patches, filters, positions, tokens, and what its pooling head attends to. Files of the same
    names are replaced.

    Exit code 0: drawn. 1: the picture or the model cannot be read, or the folder not be written. 2:
    wrong arguments.
    """
    figures = _drawing()
    try:
        picture = to_rgb(image)  # before a model is fetched for it
    except ImageError as error:
        _fail(f"{image}: {error}", 1)
    model = SigLipVisionModel.from_hf(
        source, revision=revision, local_files_only=offline, dtype=torch.float32
    )
    for file in figures.draw(model, picture, out):
        typer.echo(file)
    if model.pooling_head is None:
        typer.echo(
            f"{figures.POOLING_PLOT} is left out: the tower has no attention pooling head", err=True
        )


def _drawing() -> Any:  # noqa: ANN401 (the module, which needs an extra)
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        _fail("this needs matplotlib, which is not installed: install siglip-port[figures]", 2)
    from siglip_port import visualize as figures

    return figures


def _embedding() -> Any:  # noqa: ANN401 (the module, which needs an extra)
    try:
        import pyarrow  # noqa: F401
    except ModuleNotFoundError:
        _fail("this needs pyarrow, which is not installed: install siglip-port[embed]", 2)
    from siglip_port import embed

    return embed


class _Line:
    """One line on the terminal that is written over; nothing where there is no terminal."""

    def __init__(self) -> None:
        self.terminal, self.last = sys.stderr.isatty(), 0.0

    def show(self, text: str) -> None:
        if self.terminal and time.monotonic() > self.last + 0.2:
            self.last = time.monotonic()
            text = text[
                : shutil.get_terminal_size().columns - 1
            ]  # what is wrapped cannot be written over
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _progress(progress: Any) -> str:  # noqa: ANN401
    left = (progress.total - progress.done) / progress.rate if progress.rate else 0.0
    names = (
        "model",
        "waiting",
        "writing",
        "decoding",
        "preprocessing",
    )  # the last two beside the others
    where = ", ".join(
        f"{name} {getattr(progress, name) / (progress.seconds or 1):.0%}" for name in names
    )
    return (
        f"{progress.done}/{progress.total}, {progress.failed} failed, {progress.rate:.1f} "
        "pictures/s, "
        f"{left / 60:.0f} min left: {where}"
    )


@app.command("list")
def list_command(as_json: JsonOption = False) -> None:
    """List the published checkpoints, and how much of each is the vision tower."""
    rows = [_published(published) for published in PUBLISHED]
    if as_json:
        _print_json({"published": rows})
        return
    table = _table(
        "repository",
        "size",
        "image",
        "patch",
        "width",
        "resample",
        "parameters",
        "in float32",
        "share",
    )
    for column in table.columns[2:5] + table.columns[6:]:
        column.justify = "right"
    for row in rows:
        table.add_row(
            row["repo"],
            row["size"],
            "any" if row["naflex"] else str(row["image_size"]),
            str(row["patch_size"]),
            str(row["embed_dim"]),
            row["resample"],
            f"{row['vision_parameters']:,}",
            format_bytes(row["vision_bytes"]),
            f"{row['share']:.0%}",
        )
    _print(table)


def _published(published: Published) -> dict[str, Any]:
    config = published.config
    return {
        "repo": published.repo,
        "size": published.size,
        "image_size": config.image_size,
        "naflex": config.naflex,
        "patch_size": config.patch_size,
        "embed_dim": config.embed_dim,
        "resample": next(name for name, number in RESAMPLE.items() if number == published.resample),
        "vision_parameters": published.vision_parameters,
        "vision_bytes": published.vision_bytes,
        "total_parameters": published.total_parameters,
        "share": published.vision_parameters / published.total_parameters,
    }


def _check_out(out: Path, source: Path, force: bool) -> None:
    if not out.name:
        raise typer.BadParameter("OUT must name a folder")
    if not out.parent.is_dir():
        raise typer.BadParameter(
            f"the folder {out.parent}, in which it is to be made, does not exist"
        )
    if out.exists() and not out.is_dir():
        raise typer.BadParameter(f"{out} is a file")
    if out.exists() and any(out.iterdir()) and not force:
        raise typer.BadParameter(f"{out} exists and is not empty; pass another folder, or --force")
    if source.exists() and out.resolve() in (source.resolve(), *source.resolve().parents):
        raise typer.BadParameter(f"{out} holds the checkpoint itself; pass another folder")


def _print_inspection(found: Inspection) -> None:
    typer.echo(f"source   {found.source}" + (f" at commit {found.commit}" if found.commit else ""))
    typer.echo(f"files    {', '.join(found.files)}")
    for number, tower in enumerate(found.towers):
        typer.echo(f"{'' if number else 'towers':9}{_arguments(*tower)}")
    typer.echo(f"layout   {found.title}")
    typer.echo(f"tower    {found.tower.parameters:,} parameters, {format_bytes(found.tower.bytes)}")
    unread = f", without {', '.join(found.unread)}" if found.unread else ""
    typer.echo(
        f"whole    {found.whole.parameters:,} parameters, {format_bytes(found.whole.bytes)}{unread}"
    )
    dropped = "; ".join(f"{count} of the {reason}" for reason, count in found.dropped.items())
    typer.echo(f"dropped  {dropped or 'nothing'}")
    typer.echo(
        f"headers  {'fit' if found.problem is None else 'do not fit'} the tower that the "
        "configuration describes"
    )
    typer.echo(f"values   {_values(found)}")
    for number, (field, value) in enumerate(asdict(found.config).items()):
        typer.echo(f"{'' if number else 'config':9}{field}={value!r}")
    table = _table("ours", "stored", "dtype", "shape", "form", "values")
    for entry in found.entries:
        shape = "missing" if entry.shape is None else str(list(entry.shape))
        values = f"{entry.nan} NaN, {entry.inf} infinite" if entry.nan or entry.inf else ""
        table.add_row(
            "\n".join(entry.ours), entry.stored, entry.dtype or "", shape, entry.form, values
        )
    typer.echo()
    _print(table)


def _values(found: Inspection) -> str:
    """Whether the tower's numbers are any, and which tensors hold others."""
    if any(entry.nan is None for entry in found.entries):
        return "not read: only headers were"
    bad = [entry.stored for entry in found.entries if entry.nan or entry.inf]
    return f"NaN or infinite in {', '.join(bad)}: see the table below" if bad else "all finite"


def _arguments(layout: str, prefix: str) -> str:
    """What to pass to mean this tower."""
    return f"--layout {layout} --prefix {shlex.quote(prefix)}"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _print(table: Table) -> None:
    console = Console(width=_WIDTH, markup=False, highlight=False)
    with console.capture() as printed:
        console.print(table)
    for line in printed.get().splitlines():
        typer.echo(line.rstrip())  # without the spaces that fill the last column


def _print_json(content: dict[str, Any]) -> None:
    typer.echo(json.dumps(content, indent=2))


def _fail(sentence: str, code: int) -> NoReturn:
    typer.echo(sentence, err=True)
    raise typer.Exit(code)
