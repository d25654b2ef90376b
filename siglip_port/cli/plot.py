"""The `plot` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from siglip_port.cli.options import (
    DEFAULT_MODEL,
    LoadArguments,
    ModelOption,
    PreprocessingOption,
    with_checkpoint_options,
)
from siglip_port.cli.output import fail
from siglip_port.extras import require


@with_checkpoint_options
def plot(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="Image file.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", file_okay=False, help="Output folder.")
    ],
    source: ModelOption = DEFAULT_MODEL,
    preprocessing: PreprocessingOption = None,
    *,
    load: LoadArguments,
) -> None:
    """Plot weights, and features of an image, as PNG files.

    Plots patches, patch embedding filters, position embeddings, tokens and the attention of the
    pooling head. Existing plots are replaced.
    """
    require("matplotlib")
    import torch

    from siglip_port import visualize
    from siglip_port.image_processing import ImageError, to_rgb
    from siglip_port.model import SigLipVisionModel

    try:
        rgb = to_rgb(image)  # before the model is downloaded
    except ImageError as error:
        fail(f"{image}: {error}")
    model = SigLipVisionModel.from_hf(
        source, **load, preprocessing=preprocessing, dtype=torch.float32
    )
    for file in visualize.draw(model, rgb, output):
        typer.echo(file)
    if model.pooling_head is None:
        typer.echo(
            f"{visualize.POOLING_PLOT} skipped: the model has no attention pooling head", err=True
        )
