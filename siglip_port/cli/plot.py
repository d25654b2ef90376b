"""The command `plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from siglip_port.cli.options import DEFAULT_MODEL, ModelOption, OfflineOption, RevisionOption
from siglip_port.cli.output import fail
from siglip_port.extras import require


def plot(
    image: Annotated[Path, typer.Argument(help="An image.")],
    out: Annotated[
        Path, typer.Option("-o", "--out", file_okay=False, help="The folder to be written.")
    ],
    source: ModelOption = DEFAULT_MODEL,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
) -> None:
    """Draw what the encoder has learned, and what it makes of an image, as PNG files.

    Its patches, filters, positions, tokens, and what its pooling head attends to. Files of the same
    names are replaced.

    Exit code 0: drawn. 1: the image or the model cannot be read, or the folder not be written. 2:
    wrong arguments.
    """
    require("matplotlib")
    import torch

    from siglip_port import visualize
    from siglip_port.image_processing import ImageError, to_rgb
    from siglip_port.model import SigLipVisionModel

    try:
        picture = to_rgb(image)  # before a model is fetched for it
    except ImageError as error:
        fail(f"{image}: {error}")
    model = SigLipVisionModel.from_hf(
        source, revision=revision, local_files_only=offline, dtype=torch.float32
    )
    for file in visualize.draw(model, picture, out):
        typer.echo(file)
    if model.pooling_head is None:
        typer.echo(
            f"{visualize.POOLING_PLOT} is left out: the encoder has no attention pooling head",
            err=True,
        )
