"""`verify --save` and `verify --against`: golden folders, and ports that are no module."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from siglip_port.atomic import write_text
from siglip_port.cli import exit_codes
from siglip_port.extras import require
from siglip_port.parity import report as reports
from siglip_port.parity.golden import PORT_FILE, GoldenError, read_folder, write_folder
from siglip_port.parity.golden.judge import judge_folder
from siglip_port.parity.report.combined import write_reports
from siglip_port.parity.results import Comparison
from siglip_port.text import format_table

if TYPE_CHECKING:
    from PIL import Image

    from siglip_port.parity.siglip.verify_options import VerifyOptions


def run(options: VerifyOptions, image: Image.Image) -> int:
    """Write a golden folder, or judge another port; return the exit code."""
    try:
        if options.save is not None:
            return save(options, options.save, image)
        assert options.against is not None
        golden = Path(options.against)
        if golden.is_dir():
            return judge_golden(options, golden)
        return judge_port(options, options.against, image)
    except GoldenError as error:
        raise ValueError(str(error)) from error


def judge_golden(options: VerifyOptions, folder: Path) -> int:
    """Judge the results of a port in a golden folder, without the reference."""
    dtype = None if options.dtype == "float32" else options.torch_dtype
    golden = read_folder(folder)
    comparison = judge_folder(golden, dtype)
    settings = {f"golden {name}": value for name, value in golden.origin.items()}
    return print_verdict(options, comparison, settings)


def judge_port(options: VerifyOptions, target: str, image: Image.Image) -> int:
    """Judge a file, a function or a service on a checkpoint."""
    require("transformers")
    from siglip_port.parity.siglip import against, reference_process, verification
    from siglip_port.parity.siglip.foreign_ports import ForeignPortError

    try:
        against.check_target(target)
    except ForeignPortError as error:
        raise ValueError(f"--against {error}") from error
    with (
        reference_process.start() as references,
        tempfile.TemporaryDirectory(prefix="siglip_port-") as scratch,
    ):
        port = verification.load_port(options, Path(scratch), references)
        if port.is_random:
            raise ValueError(
                "--against needs the weights of the checkpoint from which the port was made; pass "
                "it with --checkpoint"
            )
        case = verification.checkpoint_case(options, port, image, references)
        processors = reference_process.load_processors(
            references, port.model.config, port.source, **port.place
        )

        def process(image: Image.Image) -> torch.Tensor:
            return processors["pil"](image.convert("RGB"))["pixel_values"]

        try:
            comparison = against.judge_target(target, case, process, image, options.torch_dtype)
        except ForeignPortError as error:
            raise ValueError(f"--against {error}") from error
    settings = {"checkpoint": options.checkpoint, "port": target, "dtype": options.dtype}
    return print_verdict(options, comparison, settings)


def save(options: VerifyOptions, folder: Path, image: Image.Image) -> int:
    """Write a golden folder."""
    require("transformers")
    from siglip_port.parity.siglip import golden_cases, reference, reference_process, verification

    with (
        reference_process.start() as references,
        tempfile.TemporaryDirectory(prefix="siglip_port-") as scratch,
    ):
        port = verification.load_port(options, Path(scratch), references)
        case = verification.checkpoint_case(options, port, image, references)
        cases = golden_cases.golden_cases(case, port.model.config, Path(scratch), references)
        origin = {
            **reports.describe_origin(),
            "transformers": reference.VERSION,
            "checkpoint": options.checkpoint,
        }
        names = write_folder(folder, cases, origin)
    print(
        f"wrote {', '.join(names)} to {folder}; run the port on the inputs of each, write its "
        f"outputs to {PORT_FILE} beside them, and run: siglip-port verify --against {folder}"
    )
    return exit_codes.SUCCESS


def print_verdict(
    options: VerifyOptions, comparison: Comparison, settings: Mapping[str, Any]
) -> int:
    """Print the table, the findings and the verdict, write the reports; return the exit code."""
    report = reports.to_json(comparison, environment=settings)
    print("\n".join(format_table(reports.gate_table(comparison))))
    findings = str(comparison).splitlines()[:-1]
    origin = ", ".join(f"{name} {value}" for name, value in report["environment"].items())
    print("\n".join(["", *findings, origin]))
    if options.json is not None:
        write_text(options.json, reports.dumps(report))
    if options.report is not None:
        write_reports(options.report, report)
    print(reports.colored(comparison.verdict, comparison.equal, sys.stdout.isatty()))
    return exit_codes.SUCCESS if comparison.equal else exit_codes.FAILURE
