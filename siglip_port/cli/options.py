"""Arguments and options that several commands share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import typer

if TYPE_CHECKING:
    import torch

    from siglip_port.config import SigLipVisionConfig

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
PreprocessingOption = Annotated[
    str | None,
    typer.Option(metavar="WORD", help="Pixels as siglip, siglip2, or a preprocessor_config.json."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]

# --- selection of an encoder ----------------------------------------------------------------------

CHECKPOINT_OPTIONS = {
    "layout": Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Checkpoint layout. [default: detected]", callback=check_layout
        ),
    ],
    "prefix": Annotated[
        str | None,
        typer.Option(
            metavar="PREFIX", help="Key prefix, e.g. vision_model. or ''. [default: detected]"
        ),
    ],
    "subfolder": Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Folder in the checkpoint, e.g. image_encoder."),
    ],
    "config": Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Use this config.json, not the checkpoint's."),
    ],
    "revision": Annotated[
        str | None,
        typer.Option(metavar="REV", help="Hub branch, tag or commit. [default: main]"),
    ],
    "offline": Annotated[bool, typer.Option("--offline", help="Use only the Hub's local cache.")],
}
"""Options of every command that loads a checkpoint: Parameter -> its type."""


class LoadArguments(TypedDict):
    """Keyword arguments of `SigLipVisionModel.from_hf` that `CHECKPOINT_OPTIONS` set."""

    layout: str | None
    prefix: str | None
    subfolder: str | None
    config: SigLipVisionConfig | None
    revision: str | None
    local_files_only: bool


def with_checkpoint_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add `CHECKPOINT_OPTIONS` to a command, which gets them as one argument `load`."""

    @functools.wraps(command)
    def wrapper(**arguments: object) -> None:
        chosen: dict[str, Any] = {name: arguments.pop(name) for name in CHECKPOINT_OPTIONS}
        command(**arguments, load=load_arguments(**chosen))

    signature = inspect.signature(command, eval_str=True)
    parameters = [value for name, value in signature.parameters.items() if name != "load"]
    for name, annotation in CHECKPOINT_OPTIONS.items():
        default = False if name == "offline" else None
        parameters.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
            )
        )
    # What typer reads.
    wrapper.__dict__["__signature__"] = signature.replace(parameters=parameters)
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapper


def load_arguments(
    *,
    layout: str | None = None,
    prefix: str | None = None,
    subfolder: str | None = None,
    config: Path | None = None,
    revision: str | None = None,
    offline: bool = False,
) -> LoadArguments:
    """Return the keyword arguments of `SigLipVisionModel.from_hf` for `CHECKPOINT_OPTIONS`."""
    return {
        "layout": layout,
        "prefix": prefix,
        "subfolder": subfolder,
        "config": None if config is None else read_config_file(config),
        "revision": revision,
        "local_files_only": offline,
    }


def read_config_file(path: Path) -> SigLipVisionConfig:
    """Read an architecture from a `config.json` with transformers' keys.

    Raises:
        typer.BadParameter: The file does not describe a SigLIP vision encoder.
    """
    from siglip_port.checkpoint.json_files import read_json
    from siglip_port.config import SigLipVisionConfig

    try:
        return SigLipVisionConfig.from_hf(read_json(path))
    except ValueError as error:
        reason = str(error)
        if str(path) not in reason:
            reason = f"{path}: {reason}"
        raise typer.BadParameter(reason, param_hint="'--config'") from error
