"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

DEFAULT_MODEL = "google/siglip-base-patch16-224"


def check_layout(name: str | None) -> str | None:
    """Return the name of a checkpoint layout, or None; reject any other name."""
    from siglip_port.checkpoint.layouts import LAYOUTS

    return one_of(name, [layout.name for layout in LAYOUTS])


def check_engine(name: str | None) -> str | None:
    """Return the name of an engine of `siglip_port.optimize`, `fastest` or None; reject others."""
    from siglip_port.optimize import ENGINES

    return one_of(name, [*ENGINES, "fastest"])


def one_of(value: str | None, choices: list[str]) -> str | None:
    """Return the value of an option if it is one of the choices or None.

    Raises:
        typer.BadParameter: The value is neither.
    """
    if value is not None and value not in choices:
        raise typer.BadParameter(f"must be one of {', '.join(choices)}, got {value!r}")
    return value


def named_dtype(name: str | None) -> torch.dtype | None:
    """Return the torch dtype of a name such as `float32`; None for None."""
    import torch

    return None if name is None else getattr(torch, name)


SourceArgument = Annotated[
    str,
    typer.Argument(metavar="SOURCE", help="Hub id, folder, or .safetensors or .npz file."),
]
ModelOption = Annotated[
    str,
    typer.Option("--model", metavar="MODEL", help="Hub id, folder, or .safetensors or .npz file."),
]
LayoutOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Checkpoint layout. [default: detected]", callback=check_layout
    ),
]
PrefixOption = Annotated[
    str | None,
    typer.Option(
        metavar="PREFIX", help="Key prefix, e.g. vision_model. or ''. [default: detected]"
    ),
]
PreprocessingOption = Annotated[
    str | None,
    typer.Option(metavar="WORD", help="Pixels as siglip, siglip2, or a preprocessor_config.json."),
]
RevisionOption = Annotated[
    str | None,
    typer.Option(metavar="REV", help="Hub branch, tag or commit. [default: main]"),
]
OfflineOption = Annotated[bool, typer.Option("--offline", help="Use only the Hub's local cache.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]
