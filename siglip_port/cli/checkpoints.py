"""The commands on checkpoints: `inspect`, `extract`, `list`."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from siglip_port.cli.options import (
    JsonOption,
    LayoutOption,
    OfflineOption,
    PrefixOption,
    RevisionOption,
    SourceArgument,
    named_dtype,
)
from siglip_port.cli.output import plain_table, print_json, print_labeled, print_table
from siglip_port.text import format_bytes

if TYPE_CHECKING:
    from siglip_port.checkpoint.inspect import Entry, Inspection
    from siglip_port.checkpoint.registry import Published

# --- inspect --------------------------------------------------------------------------------------


def inspect(
    source: SourceArgument,
    as_json: JsonOption = False,
    layout: LayoutOption = None,
    prefix: PrefixOption = None,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
) -> None:
    """Tell what a checkpoint holds, and whether it can be loaded.

    Of weights on the Hub, only headers are fetched.

    Of local files, the encoder is read as well, and NaN and infinite values are counted.

    Exit code 0: it can be loaded. 1: it cannot, or holds several encoders.
    """
    from siglip_port.checkpoint import CheckpointError
    from siglip_port.checkpoint.errors import MultipleEncodersError
    from siglip_port.checkpoint.inspect import inspect_checkpoint
    from siglip_port.hub import HubOptions, find_source

    files = find_source(source, HubOptions(revision=revision, local_files_only=offline))
    try:
        inspection = inspect_checkpoint(files, layout=layout, prefix=prefix)
    except MultipleEncodersError as error:
        if as_json:
            towers = [{"layout": tower.name, "prefix": place} for tower, place in error.towers]
            print_json(
                {
                    "source": files.name,
                    "commit": files.commit,
                    "towers": towers,
                    "problem": str(error),
                }
            )
        raise
    if as_json:
        print_json(inspection.to_json())
    else:
        print_inspection(inspection)
    if inspection.problem is not None:
        raise CheckpointError(inspection.problem)


def print_inspection(inspection: Inspection) -> None:
    """Print what a checkpoint holds."""
    tower, whole = inspection.tower, inspection.whole
    commit = f" at commit {inspection.commit}" if inspection.commit else ""
    unread = f", without {', '.join(inspection.unread)}" if inspection.unread else ""
    dropped = [f"{count} of the {reason}" for reason, count in inspection.dropped.items()]
    fit = "fit" if inspection.problem is None else "do not fit"
    config = asdict(inspection.config)
    print_labeled("source", [f"{inspection.source}{commit}"])
    print_labeled("files", [", ".join(inspection.files)])
    print_labeled("towers", [tower_options(*tower) for tower in inspection.towers])
    print_labeled("layout", [inspection.title])
    print_labeled("tower", [f"{tower.parameters:,} parameters, {format_bytes(tower.bytes)}"])
    print_labeled(
        "whole", [f"{whole.parameters:,} parameters, {format_bytes(whole.bytes)}{unread}"]
    )
    print_labeled("dropped", ["; ".join(dropped) or "nothing"])
    print_labeled("headers", [f"{fit} the encoder that the configuration describes"])
    print_labeled("values", [describe_values(inspection)])
    print_labeled("config", [f"{field}={value!r}" for field, value in config.items()])
    typer.echo()
    print_entries(inspection.entries)


def print_entries(entries: tuple[Entry, ...]) -> None:
    """Print the tensors of a checkpoint as a table."""
    table = plain_table("ours", "stored", "dtype", "shape", "form", "values")
    for entry in entries:
        shape = "missing" if entry.shape is None else str(list(entry.shape))
        values = f"{entry.nan} NaN, {entry.inf} infinite" if entry.nan or entry.inf else ""
        names = "\n".join(entry.ours)
        table.add_row(names, entry.stored, entry.dtype or "", shape, entry.form, values)
    print_table(table)


def describe_values(inspection: Inspection) -> str:
    """Whether the weights are finite, and which tensors are not."""
    if any(entry.nan is None for entry in inspection.entries):
        return "not read: only headers were"
    names = [entry.stored for entry in inspection.entries if entry.nan or entry.inf]
    if not names:
        return "all finite"
    return f"NaN or infinite in {', '.join(names)}: see the table below"


def tower_options(layout: str, prefix: str) -> str:
    """The options that choose one of a checkpoint's encoders."""
    return f"--layout {layout} --prefix {shlex.quote(prefix)}"


def describe_error(error: Exception) -> str:
    """An error as a sentence, with the options that would help."""
    from siglip_port.checkpoint.errors import MultipleEncodersError

    if not isinstance(error, MultipleEncodersError):
        return str(error)
    choices = "; ".join(tower_options(layout.name, prefix) for layout, prefix in error.towers)
    return f"the checkpoint holds more than one vision encoder; pass one of: {choices}"


# --- extract --------------------------------------------------------------------------------------


def extract(
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
        Literal["hf", "timm"], typer.Option("--format", help="For transformers, or for timm.")
    ] = "hf",
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Write into a folder that is not empty: files of the same names are lost.",
        ),
    ] = False,
) -> None:
    """Write the encoder of a checkpoint as a checkpoint of its own, and verify it bit for bit.

    Exit code 0: written and verified. 1: it cannot be loaded, written or verified. 2: wrong
    arguments.
    """
    from siglip_port.checkpoint.extract import extract_model
    from siglip_port.model import SigLipVisionModel

    check_folder(out, Path(source), force)
    model = SigLipVisionModel.from_hf(
        source,
        revision=revision,
        dtype=named_dtype(dtype),
        layout=layout,
        prefix=prefix,
        local_files_only=offline,
    )
    extraction = extract_model(model, out, written_as=written_as)
    outputs = f"tokens {list(extraction.tokens)}"
    if extraction.pooled:
        outputs += f" and vector {list(extraction.pooled)}"
    typer.echo(model.provenance)
    print_labeled(
        "written", [f"{file} ({format_bytes(file.stat().st_size)})" for file in extraction.files]
    )
    print_labeled(
        "verified",
        [f"{extraction.parameters} parameters, and {outputs} of an image of noise: the same bits"],
    )
    interpolation = model.config.interpolation
    if interpolation is not None:
        print_labeled("note", [f"the files cannot tell {interpolation=}: pass it to from_hf"])


def check_folder(out: Path, source: Path, force: bool) -> None:
    """Refuse a folder that must not be written to."""
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


# --- list -----------------------------------------------------------------------------------------


def list_published(as_json: JsonOption = False) -> None:
    """List the published checkpoints, and how much of each is the vision encoder."""
    from siglip_port.checkpoint.registry import PUBLISHED

    rows = [describe_published(published) for published in PUBLISHED]
    if as_json:
        print_json({"published": rows})
        return
    table = plain_table(
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
    print_table(table)


def describe_published(published: Published) -> dict[str, Any]:
    """A published checkpoint as a row of the list."""
    from siglip_port.checkpoint.preprocessor_config import RESAMPLE

    config = published.config
    filters = {number: name for name, number in RESAMPLE.items()}
    return {
        "repo": published.repo,
        "size": published.size,
        "image_size": config.image_size,
        "naflex": config.naflex,
        "patch_size": config.patch_size,
        "embed_dim": config.embed_dim,
        "resample": filters[published.resample],
        "vision_parameters": published.vision_parameters,
        "vision_bytes": published.vision_bytes,
        "total_parameters": published.total_parameters,
        "share": published.vision_parameters / published.total_parameters,
    }
