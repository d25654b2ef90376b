"""The typer application: its commands, and how errors become sentences and exit codes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from siglip_port import __version__
from siglip_port.cli import checkpoints, embed, export, plot
from siglip_port.cli.output import fail
from siglip_port.extras import MissingExtraError


class SentenceGroup(typer.core.TyperGroup):
    """Say what went wrong in a sentence.

    What is not foreseen here is a fault of ours, and keeps its traceback.
    """

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 (typer's, which releases name differently)
        """Run a command."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader has seen enough, as in `siglip-port list | head`
            # What is left unwritten would raise again at the end.
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
            raise typer.Exit from None
        except MissingExtraError as error:
            fail(str(error), 2)
        except (ValueError, OSError) as error:  # CheckpointError is a ValueError
            fail(checkpoints.describe_error(error), 1)
        except KeyboardInterrupt:
            fail("interrupted", 130)


app = typer.Typer(
    cls=SentenceGroup,
    help="Inspect, convert, run and verify SigLIP vision encoders.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def print_version(requested: bool) -> None:
    """Print the version and end, if that was requested."""
    if requested:
        typer.echo(f"siglip-port {__version__}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=print_version, is_eager=True),
    ] = False,
) -> None:
    """Take the options that belong to no command."""


def verify(ctx: typer.Context) -> None:
    """Check the port against the transformers reference, before and after the pooling head."""
    from siglip_port.cli import verify as command

    raise typer.Exit(command.main(ctx.args))


app.command("inspect")(checkpoints.inspect)
app.command("extract")(checkpoints.extract)
app.command("export")(export.export)
app.command("embed")(embed.embed)
app.command("search")(embed.search)
app.command("plot")(plot.plot)
app.command("list")(checkpoints.list_published)
app.command(
    "verify",
    add_help_option=False,  # it reads all of its arguments itself
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)(verify)
