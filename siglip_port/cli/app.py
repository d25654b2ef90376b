"""The typer application: its commands, and how errors become messages and exit codes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from siglip_port import __version__
from siglip_port.cli import advice, checkpoints, embed, exit_codes, export, plot, usage_errors
from siglip_port.cli.output import CommandError
from siglip_port.extras import MissingExtraError

# click keeps the line breaks of a paragraph that starts with \b.
HELP = """\
Inspect, convert, run and verify SigLIP vision encoders.

\b
Help on a command:           siglip-port COMMAND --help
Without the console script:  python -m siglip_port
"""


class CommandGroup(typer.core.TyperGroup):
    """A group of commands that prints expected errors as one line, without a traceback.

    An unexpected exception is a bug in this package and keeps its traceback.
    """

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 (typer's, which releases name differently)
        """Run a command; on failure, exit with the code of the error."""
        try:
            with advice.translate_warnings(lambda message: self.in_options(ctx, message)):
                return super().invoke(ctx)
        except typer.BadParameter as error:
            usage_errors.reword(error)
            error.message = self.in_options(ctx, error.message)
            raise
        except BrokenPipeError:  # the reader closed the pipe, as in `siglip-port list | head`
            # Flushing the rest at exit would raise again.
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
            raise typer.Exit from None
        except MissingExtraError as error:
            message, code = str(error), exit_codes.USAGE_ERROR
        except CommandError as error:
            message, code = str(error), error.code
        except (ValueError, OSError) as error:  # CheckpointError is a ValueError
            message, code = checkpoints.describe_error(error), exit_codes.FAILURE
        except KeyboardInterrupt:
            message, code = "interrupted", exit_codes.INTERRUPTED
        typer.echo(self.in_options(ctx, message), err=True)
        raise typer.Exit(code)

    def in_options(self, ctx: Any, message: str) -> str:  # noqa: ANN401 (as in `invoke`)
        """Return a message with the options of the invoked command for arguments in Python."""
        if ctx.invoked_subcommand is None:
            return message
        command = self.commands[ctx.invoked_subcommand]
        options = [name for parameter in command.params for name in parameter.opts]
        return advice.in_options(message, options)


app = typer.Typer(
    cls=CommandGroup,
    help=HELP,
    epilog=exit_codes.help_text(),
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def print_version(requested: bool) -> None:
    """Print the version and exit, if `--version` was passed."""
    if requested:
        typer.echo(f"siglip-port {__version__}")
        raise typer.Exit


@app.callback()
def main_options(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Declare the options that precede the command."""


def verify(ctx: typer.Context) -> None:
    """Verify that the port matches transformers, gate by gate."""
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
    add_help_option=False,  # argparse parses its arguments and prints its help
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)(verify)
