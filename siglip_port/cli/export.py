"""The command `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from siglip_port.cli.options import (
    LayoutOption,
    OfflineOption,
    PrefixOption,
    RevisionOption,
    SourceArgument,
)
from siglip_port.cli.output import fail, print_labeled
from siglip_port.text import format_bytes


def export(
    source: SourceArgument,
    out: Annotated[
        Path,
        typer.Argument(help="The file to be written: *.onnx, or *.pt2. Replaced if it is there."),
    ],
    file_format: Annotated[
        Literal["onnx", "program", "package"],
        typer.Option(
            "--format",
            help="ONNX; a torch.export program; or an AOTInductor package for processors such as "
            "this one.",
        ),
    ] = "onnx",
    layout: LayoutOption = None,
    prefix: PrefixOption = None,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
) -> None:
    """Write the encoder for other programs, run what was written, and compare it with the encoder.

    Input pixel_values [batch, 3, size, size], outputs tokens and pooled, for every batch size.

    Exit code 0: written and compared. 1: it cannot be loaded, written or is not equal. 2: wrong
    arguments.
    """
    import torch

    from siglip_port.model import SigLipVisionModel
    from siglip_port.optimize.export import EXPORTS, ExportError

    write, suffix = EXPORTS[file_format]
    if out.suffix != suffix:
        raise typer.BadParameter(
            f"OUT must be named *{suffix} for --format {file_format}, got {str(out)!r}"
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
        error = write(model, out)
    except ExportError as problem:
        fail(str(problem), 1)
    typer.echo(model.provenance)
    print_labeled("written", [f"{out} ({format_bytes(out.stat().st_size)})"])
    typer.echo(f"compared with the encoder, in batches of 1, 2 and 5: differs by {error:.1e}")
