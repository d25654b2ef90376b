"""The checkpoint commands: `inspect`, `extract` and `list`."""

from __future__ import annotations

import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from siglip_port.cli import advice
from siglip_port.cli.options import (
    CHECKPOINT_OPTIONS,
    JsonOption,
    LoadArguments,
    SourceArgument,
    named_dtype,
    with_checkpoint_options,
)
from siglip_port.cli.output import plain_table, print_json, print_labeled, print_table
from siglip_port.text import format_bytes

if TYPE_CHECKING:
    from siglip_port.checkpoint.inspect import Entry, Inspection
    from siglip_port.checkpoint.registry import Published

# --- inspect --------------------------------------------------------------------------------------


@with_checkpoint_options
def inspect(
    source: SourceArgument,
    as_json: JsonOption = False,
    *,
    load: LoadArguments,
) -> None:
    """Show a checkpoint's contents and check that it loads.

    From the Hub, only the configuration and the headers of the weights are downloaded.

    In local files, NaN and Inf values of the vision encoder are counted.
    """
    from siglip_port.checkpoint import CheckpointError
    from siglip_port.checkpoint.errors import MultipleEncodersError
    from siglip_port.checkpoint.inspect import inspect_checkpoint
    from siglip_port.hub import HubOptions, find_source

    options = HubOptions(load["revision"], local_files_only=load["local_files_only"])
    files = find_source(source, options, load["subfolder"])
    try:
        inspection = inspect_checkpoint(
            files, layout=load["layout"], prefix=load["prefix"], config=load["config"]
        )
    except MultipleEncodersError as error:
        if as_json:
            encoders = [
                {"layout": layout.name, "prefix": prefix} for layout, prefix in error.encoders
            ]
            print_json(
                {
                    "source": files.address,
                    "commit": files.commit,
                    "encoders": encoders,
                    "problem": describe_error(error),
                }
            )
        raise
    if inspection.problem is not None:
        names = [f"--{name}" for name in CHECKPOINT_OPTIONS]
        problem = advice.in_options(inspection.problem, names)
        inspection = replace(inspection, problem=problem)
    if as_json:
        print_json(inspection.to_json())
    else:
        print_inspection(inspection)
    if inspection.problem is not None:
        raise CheckpointError(inspection.problem)


def print_inspection(inspection: Inspection) -> None:
    """Print the contents of a checkpoint."""
    encoder, total = inspection.encoder, inspection.total
    commit = f" at commit {inspection.commit}" if inspection.commit else ""
    unread = f", without {', '.join(inspection.unread)}" if inspection.unread else ""
    ignored = [f"{reason} ({count})" for reason, count in inspection.ignored.items()]
    match = "match" if inspection.problem is None else "do not match"
    config = asdict(inspection.config)
    print_labeled("source", [f"{inspection.source}{commit}"])
    print_labeled("files", [", ".join(inspection.files)])
    print_labeled("encoders", [encoder_options(*match) for match in inspection.encoders])
    print_labeled("layout", [inspection.title])
    print_labeled("config", [inspection.evidence.architecture])
    print_labeled("pooling", [inspection.evidence.pooling])
    print_labeled("pixels", [inspection.evidence.preprocessing])
    print_labeled("encoder", [f"{encoder.parameters:,} parameters, {format_bytes(encoder.bytes)}"])
    print_labeled(
        "total", [f"{total.parameters:,} parameters, {format_bytes(total.bytes)}{unread}"]
    )
    print_labeled("ignored", [", ".join(ignored) or "nothing"])
    print_labeled("headers", [f"{match} the configuration"])
    print_labeled("values", [describe_values(inspection)])
    print_labeled("fields", [f"{field}={value!r}" for field, value in config.items()])
    typer.echo()
    print_entries(inspection.entries)


def print_entries(entries: tuple[Entry, ...]) -> None:
    """Print the tensors of a checkpoint as a table."""
    table = plain_table("parameter", "stored", "dtype", "shape", "transform", "values")
    for entry in entries:
        shape = "missing" if entry.shape is None else str(list(entry.shape))
        values = f"{entry.nan} NaN, {entry.inf} Inf" if entry.nan or entry.inf else ""
        names = "\n".join(entry.parameters)
        table.add_row(names, entry.stored, entry.dtype or "", shape, entry.transform, values)
    print_table(table)


def describe_values(inspection: Inspection) -> str:
    """Describe whether the weights are finite, and which tensors are not."""
    if any(entry.nan is None for entry in inspection.entries):
        return "not read (headers only)"
    names = [entry.stored for entry in inspection.entries if entry.nan or entry.inf]
    if not names:
        return "all finite"
    return f"NaN or Inf in {', '.join(names)}; see the table below"


def encoder_options(layout: str, prefix: str) -> str:
    """Return the command-line options that select one of several vision encoders."""
    return f"--layout {layout} --prefix {shlex.quote(prefix)}"


def describe_error(error: Exception) -> str:
    """Return the message of an error, with command-line options instead of arguments."""
    from siglip_port.checkpoint.errors import MultipleEncodersError

    if not isinstance(error, MultipleEncodersError):
        return str(error)
    choices = "; ".join(encoder_options(layout.name, prefix) for layout, prefix in error.encoders)
    return f"the checkpoint contains several vision encoders; pass one of: {choices}"


# --- extract --------------------------------------------------------------------------------------


@with_checkpoint_options
def extract(
    source: SourceArgument,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Output folder, new or empty.")],
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16", "float64"] | None,
        typer.Option(help="Stored dtype. [default: the checkpoint's]"),
    ] = None,
    format: Annotated[
        Literal["hf", "timm"], typer.Option(help="Output format: transformers or timm.")
    ] = "hf",
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace the checkpoint in OUTPUT."),
    ] = False,
    *,
    load: LoadArguments,
) -> None:
    """Save only the vision encoder, verified bit for bit."""
    from siglip_port.checkpoint.extract import extract_model
    from siglip_port.checkpoint.output_folder import check_folder
    from siglip_port.model import SigLipVisionModel

    check_output(output, Path(source, load["subfolder"] or ""), force)
    check_folder(output)
    model = SigLipVisionModel.from_hf(source, **load, dtype=named_dtype(dtype))
    extraction = extract_model(model, output, format=format)
    outputs = f"tokens {list(extraction.tokens)}"
    if extraction.pooled:
        outputs += f" and embedding {list(extraction.pooled)}"
    typer.echo(model.provenance)
    print_labeled(
        "written", [f"{file} ({format_bytes(file.stat().st_size)})" for file in extraction.files]
    )
    if extraction.skipped:
        skipped = [f"{file}, not written by siglip-port" for file in extraction.skipped]
        print_labeled("skipped", skipped)
    print_labeled(
        "verified",
        [f"{extraction.parameters} tensors, {outputs} of a random image: bit-identical"],
    )
    interpolation = model.config.interpolation
    if interpolation is not None:
        print_labeled("note", [f"{interpolation=} is not stored; pass it to from_hf"])


def check_output(output: Path, source: Path, force: bool) -> None:
    """Raise typer.BadParameter if the output folder must not be written to."""
    if not output.name:
        raise typer.BadParameter(f"OUTPUT must be a folder name, got {str(output)!r}")
    if not output.parent.is_dir():
        raise typer.BadParameter(f"folder {output.parent} does not exist; create it first")
    if output.exists() and not output.is_dir():
        raise typer.BadParameter(f"{output} is a file; pass a folder")
    if output.exists() and any(output.iterdir()) and not force:
        raise typer.BadParameter(f"{output} is not empty; pass another folder, or --force")
    if source.exists() and output.resolve() in (source.resolve(), *source.resolve().parents):
        raise typer.BadParameter(f"{output} contains the source; pass another folder")


# --- list -----------------------------------------------------------------------------------------


def list_published(as_json: JsonOption = False) -> None:
    """List the published checkpoints and their encoder sizes."""
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
    """Return the row of a published checkpoint."""
    from siglip_port.image_options import RESAMPLE

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
