"""The command `verify`: the port against the transformers reference.

It is built on argparse, since it needs nothing of the extra `cli`. `compare_origin.py` is the same
command under the name that its first users know.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from siglip_port.atomic import write_text
from siglip_port.cli.progress import track
from siglip_port.extras import MissingExtraError, require
from siglip_port.parity.siglip import verify_options
from siglip_port.parity.siglip.verify_options import VerifyOptions

if TYPE_CHECKING:
    from PIL import Image

SECOND_REFERENCES = ("timm", "open_clip", "transformers==<version>")

Action = Literal["compare", "list-gates", "selftest", "calibrate"]


def main(argv: Sequence[str] | None = None, *, prog: str = "siglip-port verify") -> int:
    """Run the command.

    Args:
        argv: its arguments; None for those of this process.
        prog: its name, in usage messages.

    Returns:
        The exit status: 0 the two are equal, 1 they differ, 2 they could not be compared, 3 the
        self-test or the calibration found that the gates lack power, 130 it was interrupted.
    """
    action, options = parse(argv, prog)
    try:
        return run(action, options)
    except Exception as error:
        # Whatever it was, it is no verdict: it must not end in the exit status of one.
        kind = hint = ""
        if not isinstance(error, (ValueError, OSError, RuntimeError, MissingExtraError)):
            kind = f"{type(error).__name__}: "
            if isinstance(error, ImportError):
                hint = "; run it with `uv run compare_origin.py`"
        print(f"could not compare: {kind}{error}{hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was compared", file=sys.stderr)
        return 130


def run(action: Action, options: VerifyOptions) -> int:
    """Do what was asked for; return the exit status."""
    verify_options.check_outputs(options)
    baseline = None
    if options.baseline is not None:
        baseline = verify_options.read_baseline(options.baseline)
    # The slowest imports come last: a wrong argument should not cost the seconds of transformers.
    verify_options.check_device(options.device)
    image = verify_options.read_image(options.image)
    if action == "list-gates":
        from siglip_port.parity.siglip.census import recorded_census

        print(recorded_census())
        return 0
    require("transformers")
    if action == "compare":
        return compare(options, image, baseline)
    selftest = load_selftest()
    prove = selftest.calibrate if action == "calibrate" else selftest.run
    return 0 if prove(options, track) else 3


def compare(options: VerifyOptions, image: Image.Image, baseline: dict[str, Any] | None) -> int:
    """Compare the port with the reference, and report; return the exit status."""
    from siglip_port.parity import report as reports
    from siglip_port.parity.siglip import second_reference, verification, verify_report

    if options.second_reference is not None:
        second_reference.parse(options.second_reference)
    with tempfile.TemporaryDirectory(prefix="siglip_port-") as scratch:
        port = verification.load_port(options, Path(scratch))
        case = verification.checkpoint_case(options, port, image)
        comparison = verification.run_gates(options, port, case, image, track)
        report = verify_report.make_report(options, comparison, port, case)
        print("\n".join(verify_report.console_lines(comparison, report)))
        if options.second_reference is not None:
            print(f"\n{second_reference.ask(options.second_reference, case, port.model)}")
    if baseline is not None:
        print("\n".join(reports.against_baseline(report, baseline)))
    if options.json is not None:
        write_text(options.json, reports.dumps(report))
    if options.report is not None:
        files = verify_report.write_reports(options.report, report, case.inputs[0])
        print(f"written to {options.report}: {', '.join(files)}")
    print(reports.colored(comparison.verdict, comparison.equal, sys.stdout.isatty()))
    return 0 if comparison.equal else 1


def load_selftest() -> ModuleType:
    """Import the self-test: `run(options, track)` and `calibrate(options, track)` -> bool.

    Raises:
        RuntimeError: the package was installed without it.
    """
    try:
        return importlib.import_module("scripts.selftest")
    except ModuleNotFoundError as error:
        if error.name not in ("scripts", "scripts.selftest"):
            raise
    raise RuntimeError(
        "--selftest and --calibrate need a clone of siglip-port: scripts/selftest is not installed"
    )


def parse(argv: Sequence[str] | None, prog: str) -> tuple[Action, VerifyOptions]:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=(
            "Checks the port against the transformers reference, before and after the pooling head."
        ),
        epilog="exit status: 0 equal, 1 different, 2 could not compare, 3 no power",
        allow_abbrev=False,
    )
    add_checkpoint_options(parser)
    add_comparison_options(parser)
    add_output_options(parser)
    add_actions(parser)
    arguments = vars(parser.parse_args(argv))
    action: Action = arguments.pop("action")
    return action, VerifyOptions(**arguments)


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    """Add what is compared."""
    parser.add_argument(
        "--checkpoint",
        default=VerifyOptions.checkpoint,
        metavar="ID|PATH",
        help="Hub id, folder or file (%(default)s)",
    )
    parser.add_argument(
        "--weights",
        choices=verify_options.WEIGHTS,
        default=VerifyOptions.weights,
        help="auto: the checkpoint's own, or random ones where the default checkpoint cannot be "
        "had; hub: the checkpoint's own, or fail; random: random ones of its architecture "
        "(%(default)s)",
    )
    parser.add_argument(
        "--image",
        type=path,
        default=VerifyOptions.image,
        metavar="PATH",
        help="an image (siglip_port/parity/siglip/images/chelsea.png)",
    )


def add_comparison_options(parser: argparse.ArgumentParser) -> None:
    """Add how it is compared."""
    parser.add_argument(
        "--dtype",
        choices=verify_options.DTYPES,
        default=VerifyOptions.dtype,
        help="of weights and arithmetic (%(default)s)",
    )
    parser.add_argument(
        "--attn",
        dest="attention",
        choices=verify_options.ATTENTIONS,
        default=VerifyOptions.attention,
        help="the reference's attention, for its rounding (%(default)s)",
    )
    parser.add_argument(
        "--device", default=VerifyOptions.device, help="cpu, cuda, cuda:1, ... (%(default)s)"
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="all recipes of weights, two seeds, all dtypes; with --selftest likewise",
    )
    parser.add_argument(
        "--second-ref",
        dest="second_reference",
        metavar="NAME",
        help=f"ask a third implementation who is right: {', '.join(SECOND_REFERENCES)}",
    )
    parser.add_argument(
        "--optimized",
        action="store_true",
        help="judge the rounding of every form that siglip_port.optimize can choose from here, too",
    )


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add where the results go, and what they are compared with."""
    parser.add_argument("--json", type=path, metavar="PATH", help="write all figures to this file")
    parser.add_argument(
        "--report",
        type=path,
        metavar="FOLDER",
        help="write report.json, .md, .html and junit.xml to this folder",
    )
    parser.add_argument(
        "--baseline", type=path, metavar="PATH", help="compare with an earlier JSON report"
    )


def add_actions(parser: argparse.ArgumentParser) -> None:
    """Add what can be done instead of a comparison."""
    helps: dict[Action, str] = {
        "list-gates": "say what each gate means",
        "selftest": "prove the gates: every bug of the catalog must be detected",
        "calibrate": "measure on this device what the bounds on rounding rest on",
    }
    group = parser.add_argument_group("instead of a comparison").add_mutually_exclusive_group()
    for action, text in helps.items():
        group.add_argument(
            f"--{action}",
            dest="action",
            action="store_const",
            const=action,
            default="compare",
            help=text,
        )


def path(text: str) -> Path:
    """Read a path; an empty one, which would mean this folder, is an error."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)
