"""The `export` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from siglip_port.cli.options import LoadArguments, SourceArgument, with_checkpoint_options
from siglip_port.cli.output import fail, print_labeled
from siglip_port.text import format_bytes


@with_checkpoint_options
def export(
    source: SourceArgument,
    output: Annotated[
        Path,
        typer.Argument(
            metavar="OUTPUT", help="Output file, *.onnx or *.pt2; replaced if it exists."
        ),
    ],
    file_format: Annotated[
        Literal["onnx", "program", "package"],
        typer.Option("--format", help="ONNX, torch.export program or AOTInductor package."),
    ] = "onnx",
    *,
    load: LoadArguments,
) -> None:
    """Export to ONNX, torch.export or AOTInductor.

    The file takes pixel_values [batch, 3, S, S] with a dynamic batch size and returns tokens and
    pooled. It is run and compared with the model before and after it is moved to OUTPUT. ONNX
    weights above 1.5 GiB are in a second file, OUTPUT.data. An AOTInductor package runs on CPUs
    like this one only.
    """
    import torch

    from siglip_port.model import SigLipVisionModel
    from siglip_port.optimize.export import (
        BATCH_SIZES,
        EXPORTS,
        ExportError,
        export_model,
        exported_files,
    )

    expected = EXPORTS[file_format]
    if output.suffix != expected.suffix:
        raise typer.BadParameter(
            f"OUTPUT must end in {expected.suffix} with --format {file_format}, got {str(output)!r}"
        )
    if not output.parent.is_dir():
        raise typer.BadParameter(f"folder {output.parent} does not exist; create it first")
    model = SigLipVisionModel.from_hf(source, **load, dtype=torch.float32)
    try:
        difference = export_model(model, output, expected)
    except ExportError as error:
        fail(str(error))
    typer.echo(model.provenance)
    files = exported_files(output, expected)
    print_labeled("written", [f"{file} ({format_bytes(file.stat().st_size)})" for file in files])
    sizes = ", ".join(str(size) for size in sorted(BATCH_SIZES))
    print_labeled(
        "verified", [f"relative difference {difference:.1e} from the model, batch sizes {sizes}"]
    )
