"""The command `verify`: compares the port with transformers.

Parsed with argparse, so it does not need the extra `cli`. `compare_origin.py` is the same command
for a clone. torch and transformers are imported after the command line is parsed: `--help` and
usage errors are instant.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from siglip_port.atomic import write_text
from siglip_port.cli import advice, exit_codes
from siglip_port.cli.progress import track
from siglip_port.extras import MissingExtraError, require

if TYPE_CHECKING:
    from PIL import Image

    from siglip_port.parity import Comparison
    from siglip_port.parity.siglip.verify_options import VerifyOptions

DESCRIPTION = "Compare the port with transformers, gate by gate."

EPILOG = """\
weights:
  auto    the checkpoint's; random if the default checkpoint is unavailable
  hub     the checkpoint's
  random  random weights for the checkpoint's architecture

exit codes:
  0    equal; self-test or calibration passed
  1    different
  2    usage error, or could not compare
  3    self-test or calibration failed
  130  interrupted
"""

# Those of VerifyOptions, whose package imports torch.
WEIGHTS = ("auto", "hub", "random")
DTYPES = ("float32", "float64", "bfloat16", "float16")
ATTENTIONS = ("both", "sdpa", "eager")
DEFAULTS = {
    "checkpoint": "google/siglip-base-patch16-224",
    "weights": "auto",
    "dtype": "float32",
    "attention": "both",
    "device": "cpu",
}

OPTIONS = (
    "--checkpoint", "--device", "--dtype", "--layout", "--offline", "--prefix", "--revision",
    "--subfolder",
)  # fmt: skip
"""Options that messages may name."""

Action = Literal["compare", "list-gates", "selftest", "calibrate"]


def main(argv: Sequence[str] | None = None, *, prog: str = "siglip-port verify") -> int:
    """Run the command.

    Args:
        argv: Arguments; None for those of the process.
        prog: Program name in usage messages.

    Returns:
        Exit code: 0 equal, 1 different, 2 could not compare, 3 self-test or calibration failed, 130
        interrupted.
    """
    action, arguments = parse(argv, prog)
    try:
        with advice.translate_warnings(lambda message: advice.in_options(message, OPTIONS)):
            return run(action, arguments)
    except Exception as error:
        # No error may end in exit code 1, which is a verdict.
        kind = hint = ""
        if not isinstance(error, (ValueError, OSError, RuntimeError, MissingExtraError)):
            kind = f"{type(error).__name__}: "
            if isinstance(error, ImportError):
                hint = "; run: uv run compare_origin.py"
        message = advice.in_options(f"could not compare: {kind}{error}{hint}", OPTIONS)
        print(message, file=sys.stderr)
        return exit_codes.USAGE_ERROR
    except KeyboardInterrupt:
        print("interrupted: no verdict", file=sys.stderr)
        return exit_codes.INTERRUPTED


def run(action: Action, arguments: dict[str, Any]) -> int:
    """Run an action with the arguments of `VerifyOptions`; return the exit code."""
    from siglip_port.parity.siglip import verify_options

    options = verify_options.VerifyOptions(**arguments)
    verify_options.check_outputs(options)
    baseline = None
    if options.baseline is not None:
        baseline = verify_options.read_baseline(options.baseline)
    # Before the import of transformers, which takes seconds.
    verify_options.check_device(options.device)
    image = verify_options.read_image(options.image)
    if action == "list-gates":
        from siglip_port.parity.siglip.census import recorded_census

        print(recorded_census())
        return exit_codes.SUCCESS
    if action == "compare" and (options.save is not None or options.against is not None):
        from siglip_port.cli import verify_files

        return verify_files.run(options, image)
    require("transformers")
    if action == "compare":
        return compare(options, image, baseline)
    selftest = load_selftest()
    check = selftest.calibrate if action == "calibrate" else selftest.run
    return exit_codes.SUCCESS if check(options, track) else exit_codes.INCOMPLETE


def compare(options: VerifyOptions, image: Image.Image, baseline: dict[str, Any] | None) -> int:
    """Compare the port with the reference and report the result; return the exit code."""
    from siglip_port.parity import report as reports
    from siglip_port.parity.siglip import reference_process

    # It imports transformers while this process imports and loads the port.
    with (
        reference_process.start() as references,
        tempfile.TemporaryDirectory(prefix="siglip_port-") as scratch,
    ):
        from siglip_port.parity.siglip import second_reference, verification, verify_report

        if options.second_reference is not None:
            second_reference.check_available(options.second_reference)
        port = verification.load_port(options, Path(scratch), references)
        case = verification.checkpoint_case(options, port, image, references)
        comparison = verification.run_gates(options, port, case, image, references, track)
        second = second_reference.run(options.second_reference, case, port.model)
        comparison = second.add_to(comparison)
        report = verify_report.make_report(options, comparison, port, case)
    print("\n".join(verify_report.console_lines(comparison, report)))
    if second.text:
        print(f"\n{second.text}")
    if baseline is not None:
        print("\n".join(reports.against_baseline(report, baseline)))
    if options.json is not None:
        write_text(options.json, reports.dumps(report))
    if options.report is not None:
        files = verify_report.write_reports(options.report, report, case.inputs[0])
        print(f"wrote {', '.join(files)} to {options.report}")
    print(reports.colored(comparison.verdict, comparison.equal, sys.stdout.isatty()))
    return exit_code(comparison, second.error)


def exit_code(comparison: Comparison, error: str) -> int:
    """Return the exit code of a comparison, and print why a second reference did not run.

    Args:
        comparison: Results of the gates.
        error: Error of the second reference; empty if it ran, or none was requested.
    """
    if error:
        print(f"could not compare with the second reference: {error}", file=sys.stderr)
    if not comparison.equal:
        return exit_codes.FAILURE
    return exit_codes.USAGE_ERROR if error else exit_codes.SUCCESS


def load_selftest() -> ModuleType:
    """Import the self-test: `run(options, track)` and `calibrate(options, track)` -> bool.

    Raises:
        RuntimeError: The package was installed without it.
    """
    try:
        return importlib.import_module("scripts.selftest")
    except ModuleNotFoundError as error:
        if error.name not in ("scripts", "scripts.selftest"):
            raise
    raise RuntimeError(
        "--selftest and --calibrate need a clone of siglip-port: scripts/selftest is not installed"
    )


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Formatter that leaves 58 of 80 columns to the help of an option."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=20)


def parse(argv: Sequence[str] | None, prog: str) -> tuple[Action, dict[str, Any]]:
    """Parse the command line; return the action and the arguments of `VerifyOptions`."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=HelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )
    add_checkpoint_options(parser)
    add_comparison_options(parser)
    add_output_options(parser)
    add_actions(parser)
    arguments = vars(parser.parse_args(argv))
    action: Action = arguments.pop("action")
    return action, arguments


def with_default(text: str, option: str) -> str:
    """Append the default of an option to its help."""
    return f"{text} [default: {DEFAULTS[option]}]"


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for the inputs of a comparison."""
    group = parser.add_argument_group("inputs")
    group.add_argument(
        "--checkpoint",
        metavar="ID|PATH",
        help=with_default("Hub id or path.", "checkpoint"),
    )
    group.add_argument("--layout", metavar="NAME", help="Checkpoint layout. [default: detected]")
    group.add_argument("--prefix", help="Key prefix of the encoder. [default: detected]")
    group.add_argument(
        "--subfolder",
        metavar="FOLDER",
        help="Folder in the checkpoint, e.g. image_encoder.",
    )
    group.add_argument(
        "--revision", metavar="REV", help="Hub branch, tag or commit. [default: main]"
    )
    group.add_argument("--offline", action="store_true", help="Use only the Hub's local cache.")
    group.add_argument(
        "--weights",
        type=one_of(WEIGHTS),
        metavar=f"{{{','.join(WEIGHTS)}}}",
        help=with_default("Weights to compare, see below.", "weights"),
    )
    group.add_argument(
        "--image",
        type=path,
        metavar="PATH",
        help="Input image. [default: the bundled chelsea.png]",
    )


def add_comparison_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for how the two are compared."""
    group = parser.add_argument_group("comparison")
    group.add_argument(
        "--dtype",
        type=one_of(DTYPES),
        metavar=f"{{{','.join(DTYPES)}}}",
        help=with_default("dtype of weights and computation.", "dtype"),
    )
    group.add_argument(
        "--attn",
        dest="attention",
        type=one_of(ATTENTIONS),
        metavar=f"{{{','.join(ATTENTIONS)}}}",
        help=with_default("Reference attention for rounding.", "attention"),
    )
    group.add_argument("--device", help=with_default("Device: cpu, cuda, cuda:1, ...", "device"))
    group.add_argument(
        "--full", action="store_true", help="Use all weight recipes, two seeds and all dtypes."
    )
    group.add_argument(
        "--second-ref",
        dest="second_reference",
        metavar="NAME",
        help="Also run timm, open_clip or transformers==VERSION.",
    )
    group.add_argument(
        "--against",
        metavar="PORT",
        help="Judge golden folder, vectors, file, function or URL.",
    )
    group.add_argument(
        "--optimized",
        action="store_true",
        help="Also check the engines of siglip_port.optimize.",
    )


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for reports."""
    group = parser.add_argument_group("output")
    group.add_argument("--json", type=path, metavar="PATH", help="Write a JSON report.")
    group.add_argument(
        "--report", type=path, metavar="DIR", help="Write JSON, Markdown, HTML and JUnit reports."
    )
    group.add_argument(
        "--baseline", type=path, metavar="PATH", help="Compare with an earlier JSON report."
    )
    group.add_argument(
        "--save", type=path, metavar="DIR", help="Write a golden folder instead of comparing."
    )


def add_actions(parser: argparse.ArgumentParser) -> None:
    """Add the actions other than a comparison."""
    helps: dict[Action, str] = {
        "list-gates": "Describe the gates.",
        "selftest": "Test the gates with planted bugs (mutants).",
        "calibrate": "Check the rounding bounds on this device.",
    }
    group = parser.add_argument_group("other actions")
    group.add_argument("-h", "--help", action="help", help="Show this message and exit.")
    actions = group.add_mutually_exclusive_group()
    for action, text in helps.items():
        actions.add_argument(
            f"--{action}",
            dest="action",
            action="store_const",
            const=action,
            default="compare",
            help=text,
        )


def one_of(choices: Sequence[str]) -> Callable[[str], str]:
    """Return a parser of one of these values, whose error reads like those of other commands."""

    def parse_choice(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"must be one of {', '.join(choices)}, got {text!r}")
        return text

    return parse_choice


def path(text: str) -> Path:
    """Parse a path; an empty one, which would mean the current folder, is an error."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)
