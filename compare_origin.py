"""Checks the port against the transformers reference, before and after the pooling head.

`uv run compare_origin.py`.

Exit status: 0 the two are equal, 1 they differ, 2 they could not be compared, 3 the self-test or
the calibration found that the gates lack power.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from siglip_port import SigLipVisionModel
    from siglip_port.parity.report import Json
    from siglip_port.parity.results import Comparison, GateResult
    from siglip_port.parity.siglip.cases import Case

CHECKPOINT = "google/siglip-base-patch16-224"
PHOTOGRAPH = Path(__file__).parent / "tests" / "images" / "chelsea.png"
RECORDED = Path(__file__).parent / "docs" / "selftest.json"
DTYPES = ("float32", "float64", "bfloat16", "float16")
ATTENTIONS = ("both", "sdpa", "eager")
SECONDS = ("timm", "open_clip", "transformers==<version>")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    args = parse(argv)
    try:
        return run(args)
    except (
        Exception
    ) as error:  # Whatever it was, it is no verdict: it must not end in the exit status of one.
        kind = (
            ""
            if isinstance(error, (ValueError, OSError, RuntimeError))
            else f"{type(error).__name__}: "
        )
        hint = "; run it with `uv run compare_origin.py`" if isinstance(error, ImportError) else ""
        print(f"could not compare: {kind}{error}{hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was compared", file=sys.stderr)
        return 130


def path(text: str) -> Path:
    """Reads a path; an empty one, which would mean this folder, is a mistake."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="compare_origin.py",
        description="Checks the port against the transformers reference, before and after the pooling head.",
        epilog="exit status: 0 equal, 1 different, 2 could not compare, 3 no power",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        default=CHECKPOINT,
        metavar="ID|PATH",
        help="Hub id, folder or file (%(default)s)",
    )
    add(
        "--weights",
        choices=("auto", "hub", "random"),
        default="auto",
        help="auto: the checkpoint's own, or random ones where the default checkpoint cannot be had; hub: the "
        "checkpoint's own, or fail; random: random ones of its architecture (%(default)s)",
    )
    add(
        "--image",
        type=path,
        default=PHOTOGRAPH,
        metavar="PATH",
        help="a photograph (tests/images/chelsea.png)",
    )
    add(
        "--dtype", choices=DTYPES, default=DTYPES[0], help="of weights and arithmetic (%(default)s)"
    )
    add(
        "--attn",
        choices=ATTENTIONS,
        default="both",
        help="the reference's attention, for its rounding (%(default)s)",
    )
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ... (%(default)s)")
    add(
        "--full",
        action="store_true",
        help="all recipes of weights, two seeds, all dtypes; with --selftest likewise",
    )
    add(
        "--second-ref",
        metavar="NAME",
        help=f"ask a third implementation who is right: {', '.join(SECONDS)}",
    )
    add(
        "--optimized",
        action="store_true",
        help="judge the rounding of every form that siglip_port.optimize can choose from here, too",
    )
    add("--json", type=path, metavar="PATH", help="write all figures to this file")
    add(
        "--report",
        type=path,
        metavar="FOLDER",
        help="write report.json, .md, .html and junit.xml to this folder",
    )
    add("--baseline", type=path, metavar="PATH", help="compare with an earlier JSON report")
    other = parser.add_argument_group("instead of a comparison").add_mutually_exclusive_group()
    add = other.add_argument
    add("--list-gates", action="store_true", help="say what each gate means")
    add(
        "--selftest",
        action="store_true",
        help="prove the gates: every mistake of the catalogue must be noticed",
    )
    add(
        "--calibrate",
        action="store_true",
        help="measure on this device what the bounds on rounding rest on",
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Does what was asked for; returns the exit status."""
    for path in filter(None, (args.json, args.report and args.report / "report.json")):
        check_writable(path, make=path != args.json)
    baseline = read_baseline(args.baseline) if args.baseline else None

    # Imported when needed, the slowest last: a wrong argument should not cost the eight seconds of
    # transformers.
    check_device(args.device)
    if args.second_ref:
        from siglip_port.parity.siglip import second_reference as witness

        witness.parse(args.second_ref)
    photograph = read_picture(args.image)
    if args.list_gates:
        from siglip_port.parity.siglip.census import census_text

        print(census_text(RECORDED))
        return 0
    if args.selftest or args.calibrate:
        from scripts import selftest

        run_it = selftest.calibrate if args.calibrate else selftest.run
        return 0 if run_it(args, progress) else 3

    with tempfile.TemporaryDirectory(prefix="siglip_port-") as scratch:
        port, source = load_port(args, scratch)
        case = main_case(args, port, source, photograph, is_random=source == scratch)
        comparison = prove(args, port, case, judge_pixels(port, case, photograph))
        report = make_report(args, comparison, port, case)
        print_report(args, comparison, report)
        if args.second_ref:
            print(f"\n{witness.ask(args.second_ref, case, port)}")
    if baseline is not None:
        from siglip_port.parity.report import against_baseline

        print("\n".join(against_baseline(report, baseline)))
    write_reports(args, report, case)
    print(verdict_line(comparison))
    return 0 if comparison.equal else 1


def check_device(device: str) -> None:
    """Finds out whether the device can be used."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--device {device} cannot be used on this machine ({reason}); use cpu"
        ) from error


def read_picture(path: Path) -> Image.Image:
    """Reads the photograph."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow's own kinds, the system's, and those of its decoders
        raise ValueError(
            f"--image {path} cannot be read as a picture ({error}); pass a JPEG or PNG file of "
            "this machine"
        ) from error


def main_case(
    args: argparse.Namespace,
    port: SigLipVisionModel,
    source: str,
    photograph: Image.Image,
    is_random: bool,
) -> Case:
    """The checkpoint itself, at full size: a photograph and a picture of noise."""
    import torch

    from siglip_port.parity.siglip import cases as proof
    from siglip_port.parity.siglip import reference as references

    assert port.provenance is not None
    where = on_this_machine(port)
    dtype = getattr(torch, args.dtype)
    warn_of_memory(port, dtype)
    layout = port.provenance.layout
    if layout.partition(",")[0] not in ("HuggingFace", "HuggingFace NaFlex") or not layout.endswith(
        ("no prefix", "prefix vision_model")
    ):
        raise ValueError(
            f"{args.checkpoint} (layout: {layout}) is no checkpoint that transformers loads as a "
            "SigLIP tower; take "
            f"the tower out, `siglip-port extract {args.checkpoint} FOLDER`, and compare that "
            "folder"
        )
    kind = {"pooling_head": port.pooling_head is not None, "naflex": port.config.naflex, **where}
    reference = references.load(source, dtype=dtype, device=args.device, **kind)
    # A NaFlex tower gets whole pictures here; its own pixels are the matter of another gate.
    square = references.processors(replace(port.config, naflex=False), source, **where)["pil"]
    pixels = with_noise(square(photograph)["pixel_values"])
    dtypes = [
        dtype,
        *(
            getattr(torch, name)
            for name in DTYPES
            if args.full and name not in (args.dtype, "float64")
        ),
    ]
    weights = "random weights, N1" if is_random else "checkpoint weights"
    return proof.Case(
        "checkpoint",
        weights,
        source,
        reference,
        pixels.to(args.device),
        proof.ALL_GATES,
        tuple(dtypes),
        attentions(args),
    )


def on_this_machine(port: SigLipVisionModel) -> dict[str, Any]:
    """Where the reference finds the files that the port has read: the same commit, in the cache."""
    return {"revision": port.provenance and port.provenance.commit, "local_files_only": True}


def attentions(args: argparse.Namespace) -> tuple[str, ...]:
    """Whose rounding counts."""
    return ("sdpa", "eager") if args.attn == "both" else (args.attn,)


def warn_of_memory(port: SigLipVisionModel, dtype: Any) -> None:  # noqa: ANN401
    """States the need of a large tower before it begins.

    Two towers in float64, and all taps of two pictures.
    """
    config, parameters = port.config, sum(p.numel() for p in port.parameters())
    tokens = (
        2
        * config.num_patches
        * config.num_encoder_blocks
        * (11 * config.embed_dim + 2 * config.mlp_hidden_dim)
    )
    need = (2 * parameters + tokens) * 8 + 2 * parameters * dtype.itemsize + 1.0e9
    if need > 4e9:
        print(
            f"this tower has {parameters / 1e6:.0f} M parameters: needs about {need / 1e9:.0f} GB",
            file=sys.stderr,
        )


def judge_pixels(port: SigLipVisionModel, case: Case, photograph: Image.Image) -> GateResult:
    """Compares what both sides' image processors make of pictures of all kinds, as the checkpoint says."""
    from siglip_port.image_processing import ImageProcessor
    from siglip_port.parity.siglip import reference as references
    from siglip_port.parity.siglip.pixels import pixels

    theirs = references.processors(port.config, case.source, **on_this_machine(port))
    ours = {
        backend: ImageProcessor.from_config(port.preprocessor_config, backend) for backend in theirs
    }
    return pixels(ours, theirs, photograph, None if port.pooling_head is None else port.embed)


def prove(
    args: argparse.Namespace, port: SigLipVisionModel, case: Case, first: GateResult
) -> Comparison:
    """Runs all gates on the checkpoint, and on small towers of its kind with weights that make mistakes loud."""
    from siglip_port import SigLipVisionModel
    from siglip_port.parity.results import Comparison, Section
    from siglip_port.parity.siglip import cases as proof
    from siglip_port.threads import torch_threads

    found = [first, *progress(case.check(port), "checkpoint")]
    if args.optimized:
        found += progress(optimized_forms(case, port), "optimized")
    sections = [Section(case.name, case.weights, tuple(found))]
    case.reference_runs = {case.dtypes[0]: case.reference_run(case.dtypes[0])}
    for made in proof.small_cases(port.config, args.device, attentions(args), full=args.full):
        with torch_threads(1), made as small:
            candidate = SigLipVisionModel.from_hf(small.source, device=args.device)
            found = [*progress(small.check(candidate), f"{small.name}, {small.weights}")]
            if args.optimized and "rounding" in small.gates:
                found += progress(
                    optimized_forms(small, candidate), f"optimized {small.name}, {small.weights}"
                )
            sections.append(Section(small.name, small.weights, tuple(found)))
    return Comparison(tuple(sections), case.weights.split(",")[0])


def optimized_forms(case: Case, port: SigLipVisionModel) -> Iterator[GateResult]:
    """Judges every form that the port can be had in; says which it cannot, and why."""
    from siglip_port.optimize import ENGINES, EngineError
    from siglip_port.parity.siglip import cases as proof

    for engine in [
        name for name in ENGINES if name not in ("eager", "int8")
    ]:  # the port itself; not meant to be equal
        with tempfile.TemporaryDirectory(prefix="siglip_port-") as scratch:
            try:
                yield from proof.engine_gates(case, port, engine, Path(scratch))
            except EngineError as error:
                print(f"{engine} is not judged on the {case.name}: {error}", file=sys.stderr)


def progress(items: Iterator[Any], what: str, total: int = 0) -> Iterator[Any]:
    """Passes items on, with a line on the terminal that says how far it is.

    None where there is no terminal.
    """
    terminal, start = sys.stderr.isatty(), time.monotonic()
    for number, item in enumerate(items, 1):
        if terminal:
            of = f"/{total}" if total else ""
            print(
                f"\r\033[K{what}: {number}{of} ({time.monotonic() - start:.0f} s)",
                end="",
                file=sys.stderr,
            )
        yield item
    if terminal:
        print("\r\033[K", end="", file=sys.stderr)


def load_port(args: argparse.Namespace, scratch: str) -> tuple[SigLipVisionModel, str]:
    """Loads the port through `from_hf`, as a user does, and decides on the way which weights there are.

    Returns:
        The port; and where the reference finds the same weights: in `scratch` if they are random
        ones, written by it.
    """
    import torch

    from siglip_port import HubUnreachableError, SigLipVisionConfig, SigLipVisionModel
    from siglip_port.checkpoint.json_files import read_config
    from siglip_port.hub import HubOptions, HubRepository, find_source, unreachable_reason

    how = {"dtype": getattr(torch, args.dtype), "device": args.device}
    source = find_source(args.checkpoint)
    is_local = not isinstance(source, HubRepository)
    is_default = args.checkpoint == CHECKPOINT and not is_local
    no_need = is_local or (args.weights == "random" and is_default)
    silence = None if no_need else unreachable_reason(source.name)
    offline = no_need or silence is not None
    if not is_local and source.weights is not None:
        raise ValueError(
            f"{args.checkpoint} names one file, which the reference cannot be told; pass the "
            "repository, or a folder"
        )
    try:
        if args.weights != "random":
            # Whole files, since the reference reads the same ones.
            port = SigLipVisionModel.from_hf(
                args.checkpoint, local_files_only=offline, vision_only=False, **how
            )
            return port, source.name
        # The default checkpoint's architecture is the default one: no file is needed to know it.
        config = SigLipVisionConfig(pooling_head=True)
        if not is_default:
            contents = read_config(
                find_source(args.checkpoint, HubOptions(local_files_only=offline))
            )
            if contents is None:
                raise ValueError(
                    f"{args.checkpoint} has no config.json, which tells the architecture"
                )
            config = SigLipVisionConfig.from_hf(contents)
    except HubUnreachableError as error:
        reason = (
            f"{args.checkpoint} is not in the local cache, and the Hub cannot be reached "
            f"({silence})"
            if offline
            else f"{error}"
        )
        if args.weights != "auto" or not is_default:
            raise HubUnreachableError(
                f"{reason}; check the spelling (there is no such path here), unset HF_HUB_OFFLINE "
                "if it is set, pass a "
                "folder that holds it, or compare random weights: --weights random, without "
                "--checkpoint"
            ) from error
        print(
            f"{reason}: comparing random weights of the same architecture instead.", file=sys.stderr
        )
        config = SigLipVisionConfig(pooling_head=True)
    from siglip_port.parity.siglip.reference import write_random_checkpoint

    write_random_checkpoint(Path(scratch), config)
    return SigLipVisionModel.from_hf(scratch, **how), scratch


def with_noise(pixel_values: Tensor) -> Tensor:
    """Puts a picture of uniform noise in [-1, 1] beside the photograph.

    [1, C, S, S] -> [2, C, S, S].
    """
    import torch

    noise = torch.rand(pixel_values.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return torch.cat([pixel_values, noise])


def make_report(
    args: argparse.Namespace, comparison: Comparison, port: SigLipVisionModel, case: Case
) -> Json:
    """Puts together all that is known."""
    from siglip_port.parity import report
    from siglip_port.parity.metrics import cosine
    from siglip_port.parity.sides import Side, cast
    from siglip_port.parity.siglip import cases as proof
    from siglip_port.parity.siglip import reference as references

    truth = case.reference_run(case.dtypes[0])
    attention = case.attentions[0]
    with cast(port, case.dtypes[0]):
        ours = Side(port, proof.port_outputs).run(truth.inputs)
    theirs = truth.outputs[attention]
    return report.to_json(
        comparison,
        environment=describe_environment(args, references.VERSION),
        provenance=asdict(port.provenance) if port.provenance else None,
        config=asdict(port.config),
        outputs=[
            {"dtype": args.dtype, "attention": attention, **f}
            for f in report.output_metrics(ours, theirs)
        ],
        reference_shapes={name: list(tensor.shape) for name, tensor in theirs.items()},
        patches={
            "grid": port.config.grid_size,
            "cosine": cosine(ours["tokens"], truth.exact.outputs["tokens"])[0].tolist()
            if ours["tokens"].shape == theirs["tokens"].shape
            else [],
        },
    )


def describe_environment(args: argparse.Namespace, transformers_version: str) -> Json:
    """Tells on what the figures were measured."""
    import torch

    return {
        "siglip_port": version("siglip-port"),
        "torch": torch.__version__,
        "transformers": transformers_version,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "device": args.device,
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
        "attention": args.attn,
    }


def print_report(args: argparse.Namespace, comparison: Comparison, report: Json) -> None:
    """Prints the lines that users of the original program know, the gates, and what differs."""
    from siglip_port.parity.report import gate_table
    from siglip_port.text import format_table

    for name, shapes in (
        ("custom", {f["point"]: f["shape"] for f in report["outputs"]}),
        ("original", report["reference_shapes"]),
    ):
        for point, shape in shapes.items():
            print(
                f"siglip_{name}{'-afterPooling' if point == 'pooled' else ''}.shape: "
                f"torch.Size({shape})"
            )
    for figures in report["outputs"]:
        after = " after pooling" if figures["point"] == "pooled" else ""
        print(f"cosine_similarity{after}.mean(): {float(figures['cosine_mean']):.12f}")
        print(f"cosine_similarity{after}.min(): {float(figures['cosine_min']):.12f}")
    print()
    print("\n".join(format_table(gate_table(comparison))))
    if comparison.findings:
        print()
        print("\n".join(str(comparison).splitlines()[:-1]))
    print()
    print(", ".join(f"{name} {value}" for name, value in report["environment"].items()))


def verdict_line(comparison: Comparison) -> str:
    """The last line: how it ended."""
    from siglip_port.parity.report import colored

    return colored(comparison.verdict, comparison.equal, sys.stdout.isatty())


def check_writable(path: Path, *, make: bool = False) -> None:
    """Finds out before the work whether a report can be written afterwards."""
    option = "--report" if make else "--json"
    path = path.resolve()
    if make:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        raise OSError(f"{option} {path} is no file that could be replaced; name another")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise OSError(
            f"{option} {path}: its folder does not exist, or may not be written to; name another"
        )


def read_baseline(path: Path) -> Json:
    """Reads an earlier report."""
    import json

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or "sections" not in content:
            raise ValueError("it is not a report of this program")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--baseline {path} cannot be used: {error}; name a file written by --json"
        ) from error
    return content


def write_reports(args: argparse.Namespace, report: Json, case: Case) -> None:
    """Writes the files that were asked for."""
    from siglip_port.atomic import write_text
    from siglip_port.parity import report as reports
    from siglip_port.parity.report import html

    if args.json is not None:
        write_text(args.json, reports.dumps(report))
    if args.report is not None:
        picture = html.image_data_uri(case.inputs[0])
        writers: dict[str, Callable[[], str]] = {
            "report.json": lambda: reports.dumps(report),
            "report.md": lambda: reports.to_markdown(report),
            "report.html": lambda: html.render_page(report, picture),
            "junit.xml": lambda: reports.to_junit(report),
        }
        for name, text in writers.items():
            write_text(args.report / name, text())
        print(f"written to {args.report}: {', '.join(writers)}")


if __name__ == "__main__":
    sys.exit(main())
