"""Checks the port against the transformers reference, before and after the pooling head: `uv run compare_origin.py`.

Exit status: 0 the two are equal, 1 they differ, 2 they could not be compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from siglip_port import SigLipVisionModel
    from siglip_port.parity.comparison import Comparison, Measurement

CHECKPOINT = "google/siglip-base-patch16-224"
PHOTOGRAPH = Path(__file__).parent / "tests" / "images" / "chelsea.png"
DTYPES = ("float32", "float64", "bfloat16", "float16")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0 equal, 1 different, 2 could not compare."""
    args = parse(argv)
    try:
        equal = run(args)
    except Exception as error:  # Whatever it was, it is no verdict: it must not end in the exit status of one.
        kind = "" if isinstance(error, (ValueError, OSError, RuntimeError)) else f"{type(error).__name__}: "
        hint = "; run it with `uv run compare_origin.py`" if isinstance(error, ImportError) else ""
        print(f"could not compare: {kind}{error}{hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was compared", file=sys.stderr)
        return 130
    return 0 if equal else 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="compare_origin.py",
        description="Checks the port against the transformers reference, before and after the pooling head.",
        epilog="exit status: 0 equal, 1 different, 2 could not compare",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--checkpoint", default=CHECKPOINT, metavar="ID|PATH", help="Hub id, folder or file (%(default)s)")
    add(
        "--weights",
        choices=("auto", "hub", "random"),
        default="auto",
        help="auto: the checkpoint's own, or random ones where the default checkpoint cannot be had; hub: the "
        "checkpoint's own, or fail; random: random ones of its architecture (%(default)s)",
    )
    add(
        "--image",
        type=Path,
        default=PHOTOGRAPH,
        metavar="PATH",
        help="a photograph (tests/images/chelsea.png)",
    )
    add("--dtype", choices=DTYPES, default=DTYPES[0], help="of weights and arithmetic (%(default)s)")
    add("--attn", choices=("sdpa", "eager"), default="sdpa", help="the reference's attention (%(default)s)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ... (%(default)s)")
    add("--json", type=Path, metavar="PATH", help="write all figures to this file as well")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> bool:
    """Compares and reports; returns whether port and reference are equal."""
    if args.json is not None:
        check_writable(args.json)

    # Imported when needed, the slowest last: a wrong argument should not cost the eight seconds of transformers.
    import torch
    from PIL import Image

    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {args.device} cannot be used on this machine ({reason}); use cpu") from error
    try:
        with Image.open(args.image) as image:
            photograph = image.convert("RGB")
    except Exception as error:  # Pillow's own kinds, the system's, and those of its decoders
        raise ValueError(
            f"--image {args.image} cannot be read as a picture ({error}); pass a JPEG or PNG file of this machine"
        ) from error

    with tempfile.TemporaryDirectory(prefix="siglip_port-") as scratch:
        port, is_random, offline = load_port(args, Path(scratch))
        from siglip_port.parity import comparison, references

        source = scratch if is_random else args.checkpoint
        assert port.provenance is not None
        where: dict[str, Any] = {"revision": port.provenance.commit, "local_files_only": offline}
        reference = references.load(
            source,
            pooling_head=port.pooling_head is not None,
            dtype=getattr(torch, args.dtype),
            attention=args.attn,
            device=args.device,
            **where,
        )
        pixels = references.preprocess(photograph, port.config.image_size, source, **where)
        result = comparison.compare(port, reference, with_noise(pixels))

    label = "random weights" if is_random else "checkpoint weights"
    environment = describe_environment(args, references.VERSION)
    print_report(result, label, environment)
    if args.json is not None:
        write_json(args.json, result, label, port, environment)
    return result.equal


def load_port(args: argparse.Namespace, scratch: Path) -> tuple[SigLipVisionModel, bool, bool]:
    """Loads the port through `from_hf`, as a user does, and decides on the way which weights there are.

    Returns:
        The port; whether its weights are random ones, written to `scratch` by the reference; and whether only
        local files may be used.
    """
    import torch

    from siglip_port import HubUnreachableError, SigLipVisionConfig, SigLipVisionModel
    from siglip_port.checkpoint import read_config
    from siglip_port.hub import HubRepository, find_source, hub_answers

    how = {"dtype": getattr(torch, args.dtype), "device": args.device}
    is_local = not isinstance(find_source(args.checkpoint), HubRepository)
    is_default = args.checkpoint == CHECKPOINT and not is_local
    offline = is_local or (args.weights == "random" and is_default) or not hub_answers(args.checkpoint)
    try:
        if args.weights != "random":
            return SigLipVisionModel.from_hf(args.checkpoint, local_files_only=offline, **how), False, offline
        # The default checkpoint's architecture is the default one: no file is needed to know it.
        config = SigLipVisionConfig(pooling_head=True)
        if not is_default:
            config = read_config(find_source(args.checkpoint, local_files_only=offline))
    except HubUnreachableError as error:
        reason = (
            f"{args.checkpoint} is not in the local cache, and the Hub cannot be reached" if offline else f"{error}"
        )
        if args.weights != "auto" or not is_default:
            raise HubUnreachableError(
                f"{reason}; check the spelling (there is no such path here), unset HF_HUB_OFFLINE if it is set, pass a "
                "folder that holds it, or compare random weights: --weights random, without --checkpoint"
            ) from error
        print(f"{reason}: comparing random weights of the same architecture instead.", file=sys.stderr)
        config = SigLipVisionConfig(pooling_head=True)
    from siglip_port.parity.references import write_random_checkpoint

    write_random_checkpoint(scratch, config)
    return SigLipVisionModel.from_hf(scratch, **how), True, True


def with_noise(pixel_values: Tensor) -> Tensor:
    """Puts a picture of uniform noise in [-1, 1] beside the photograph: [1, C, S, S] -> [2, C, S, S]."""
    import torch

    noise = torch.rand(pixel_values.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return torch.cat([pixel_values, noise])


def describe_environment(args: argparse.Namespace, transformers_version: str) -> dict[str, Any]:
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


def print_report(result: Comparison, label: str, environment: dict[str, Any]) -> None:
    """Prints the lines that users of the original program know, the table, and the verdict."""
    tokens = next(m for m in reversed(result.measurements) if m.point == "tokens")
    for name, shapes in (("custom", result.port_shapes), ("original", result.reference_shapes)):
        for point, shape in shapes.items():
            print(f"siglip_{name}{'-afterPooling' if point == 'pooled' else ''}.shape: {shape}")
    print(f"cosine_similarity.mean(): {tokens.cosine_mean:.12f}")
    print(f"cosine_similarity.min(): {tokens.cosine_min:.12f}")

    header = [
        "weights",
        "point",
        "dtype",
        "attention",
        "cosine mean",
        "cosine min",
        "max abs",
        "relative error",
        "bound",
        "verdict",
    ]
    rows = [header] + [
        [label, m.point, m.dtype, m.attention, f"{m.cosine_mean:.10f}", f"{m.cosine_min:.10f}"]
        + [f"{figure:.1e}" for figure in (m.max_abs, m.error, m.bound)]
        + ["equal" if m.equal else "DIFFERENT"]
        for m in result.measurements
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for row in rows:
        print(" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print("\nrelative error: of the port, against the reference in float64. Bounds:")
    for (dtype, attention), origin in {(m.dtype, m.attention): m.origin for m in result.measurements}.items():
        print(f"  {dtype}, {attention}: {origin}")
    print(", ".join(f"{name} {value}" for name, value in environment.items()))
    print(verdict(result, label))


def verdict(result: Comparison, label: str) -> str:
    """Says in one line how the comparison ended."""
    weights = f"{result.num_weights} tensors equal bit for bit"
    if result.differing_weights:
        weights = f"{len(result.differing_weights)} tensors differ, first {result.differing_weights[0]}"
    points = "before and after the pooling head"
    if "pooled" not in result.port_shapes:
        points = "before pooling (this checkpoint has no pooling head)"
    if result.equal:
        return f"EQUAL ({label}): {weights}; all errors within bounds, {points}"
    outside = [f"{m.point} in {m.dtype} ({excess(m)})" for m in result.measurements if not m.equal]
    return f"DIFFERENT ({label}): {weights}; outside its bound: {', '.join(outside) or 'nothing'}"


def excess(measurement: Measurement) -> str:
    """Says how far outside its bound a measurement lies."""
    if math.isnan(measurement.error):
        return "not a number"
    return f"{measurement.error:.1e} against {measurement.bound:.1e}"


def check_writable(path: Path) -> None:
    """Finds out before the work whether the report can be written afterwards."""
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise OSError(f"--json {path} is no file that could be replaced; name another")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise OSError(f"--json {path}: its folder does not exist, or may not be written to; name another")


def write_json(
    path: Path, result: Comparison, label: str, port: SigLipVisionModel, environment: dict[str, Any]
) -> None:
    """Writes all figures to a file, whole or not at all. A figure that is not finite becomes a text."""
    measurements = [dataclasses.asdict(m) | {"equal": m.equal} for m in result.measurements]
    content = {
        "schema": 1,
        "equal": result.equal,
        "weights": label,
        "differing_weights": result.differing_weights,
        "provenance": dataclasses.asdict(port.provenance) if port.provenance else None,
        "measurements": [
            {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in m.items()}
            for m in measurements
        ],
        "environment": environment,
    }
    path = path.resolve()
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_text(json.dumps(content, indent=2, default=str, allow_nan=False) + "\n", encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
