"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

DEFAULT_MODEL = "google/siglip-base-patch16-224"


def known_layout(name: str | None) -> str | None:
    """Return the name of a layout; refuse any other."""
    from siglip_port.checkpoint.layouts import LAYOUTS

    return one_of(name, [layout.name for layout in LAYOUTS])


def known_engine(name: str | None) -> str | None:
    """Return the name of an engine of `siglip_port.optimize`, or `fastest`; refuse any other."""
    from siglip_port.optimize import ENGINES

    return one_of(name, [*ENGINES, "fastest"])


def one_of(value: str | None, choices: list[str]) -> str | None:
    """Return a value that is one of the choices, or None."""
    if value is not None and value not in choices:
        raise typer.BadParameter(f"{value!r} is none of {', '.join(choices)}")
    return value


def named_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of torch that has this name."""
    import torch

    return None if name is None else getattr(torch, name)


SourceArgument = Annotated[
    str, typer.Argument(help="A Hub id, a folder, or a .safetensors or .npz file.")
]
ModelOption = Annotated[str, typer.Option("--model", help="A Hub id, a folder, or a file.")]
LayoutOption = Annotated[
    str | None,
    typer.Option(help="Name of the layout, instead of recognizing it.", callback=known_layout),
]
PrefixOption = Annotated[
    str | None,
    typer.Option(
        help="What stands before the encoder's names, such as 'vision_model.'; may be ''."
    ),
]
RevisionOption = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")
]
OfflineOption = Annotated[bool, typer.Option("--offline", help="Use the Hub's local cache only.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object, and nothing else.")
]
