"""Benchmark inference against transformers, timm, open_clip, ONNX Runtime and OpenVINO.

    uv run --group bench scripts/benchmarks/inference.py [--quick]
    uv run --group bench scripts/benchmarks/inference.py --device cuda --dtype bfloat16

All peers have the same random weights (google/siglip-base-patch16-224's architecture, or `--model`)
and are compared with the port before timing; peers that are not installed are skipped. Each round
runs every peer once, so that load on the machine affects all; speedups are medians of ratios within
rounds. Writes JSON and a plot. On a GPU, only peers are timed.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scripts.benchmarks.inference_peers import BASELINE, MODELS, Bench, build_peers, prepare
from siglip_port import SigLipVisionConfig, SigLipVisionModel

Rows = dict[str, dict[str, float]]
"""Peer -> measurement -> value."""

# --- timing ---------------------------------------------------------------------------------------


def seconds(run: Callable[[], object], device: str = "cpu") -> float:
    """Time one call in seconds, including the device."""
    started = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def time_interleaved(
    runs: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Time every call once per round, in reverse order in every second round.

    The first round is a warmup, which is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for number in range(rounds + 1):
            names = list(runs)
            if number % 2 == 0:
                names.reverse()
            for name in names:
                duration = seconds(runs[name], device)
                if number > 0:
                    times[name].append(duration)
    return times


def median_seconds(run: Callable[[], object], rounds: int) -> float:
    """Return the median time of a call, in seconds."""
    return statistics.median(time_interleaved({"": run}, rounds)[""])


def summarize(times: Mapping[str, list[float]], batch_size: int) -> Rows:
    """Compute medians and quartiles in ms per image, and speedups over the baseline."""
    rows: Rows = {}
    for name, peer_times in times.items():
        low, middle, high = statistics.quantiles(peer_times, n=4)
        pairs = zip(peer_times, times[BASELINE], strict=True)
        rows[name] = {
            "ms": 1000 * middle / batch_size,
            "ms_low": 1000 * low / batch_size,
            "ms_high": 1000 * high / batch_size,
            "times_as_fast": statistics.median(base / own for own, base in pairs),
        }
    return rows


def flops(config: SigLipVisionConfig, tokens: int | None = None) -> float:
    """Return the floating point operations of matrix products for one image."""
    n = tokens or config.num_patches
    d = config.embed_dim
    m = config.mlp_hidden_dim
    patch = 2 * n * d * config.patch_size**2 * config.num_channels
    block = 2 * n * (4 * d * d + 2 * d * m) + 4 * n * n * d
    head = 2 * n * 2 * d * d + 2 * (2 * d * d + 2 * d * m) + 4 * n * d
    return float(patch + config.num_encoder_blocks * block + head * config.pooling_head)


def gemm_peak(bench: Bench) -> float:
    """Return the fastest rate of a large matrix product in GFLOP/s: MKL or cuBLAS, and oneDNN."""
    n = 1536 if bench.device == "cpu" else 8192
    a = torch.randn(n, n, dtype=bench.dtype, device=bench.device)
    b = torch.randn(n, n, dtype=bench.dtype, device=bench.device)
    runs: dict[str, Callable[[], object]] = {"matmul": lambda: a @ b}
    if bench.device == "cpu":
        convolution = nn.Conv2d(n, n, 1).to(bench.dtype).to(memory_format=torch.channels_last)
        x = a.t().contiguous().reshape(1, n, 48, n // 48)
        x = x.contiguous(memory_format=torch.channels_last)
        runs["conv"] = lambda: convolution(x)
    times = time_interleaved(runs, 10, bench.device)
    shortest = min(min(peer_times) for peer_times in times.values())
    return 2 * n**3 / shortest / 1e9


# --- scaling --------------------------------------------------------------------------------------


def measure_scaling(bench: Bench, *, rounds: int = 3) -> dict[str, Any]:
    """Measure scaling with batch size, threads and image size."""
    return {
        "batch": scaling_with_batch(bench, rounds),
        "threads": scaling_with_threads(bench, rounds),
        "image": scaling_with_image(bench, rounds),
    }


def scaling_with_batch(bench: Bench, rounds: int) -> dict[str, float]:
    """Return ms per image by batch size."""
    runs = {}
    for batch_size in (1, 2, 4, 8, 16):
        images = bench.images(batch_size)
        runs[f"{batch_size}"] = functools.partial(bench.model.embed, images)
    times = time_interleaved(runs, rounds)
    return {name: 1000 * statistics.median(own) / int(name) for name, own in times.items()}


def scaling_with_threads(bench: Bench, rounds: int) -> dict[str, float]:
    """Return ms per image by number of threads, in batches of 8."""
    threads = torch.get_num_threads()
    run = functools.partial(bench.model.embed, bench.images(8))
    milliseconds = {}
    for number in range(1, threads + 1):
        torch.set_num_threads(number)
        milliseconds[f"{number}"] = 1000 * median_seconds(run, rounds) / 8
    torch.set_num_threads(threads)
    return milliseconds


def scaling_with_image(bench: Bench, rounds: int) -> Rows:
    """Return tokens, GFLOP and ms by image size."""
    config = bench.model.config
    model = SigLipVisionModel(replace(config, interpolation="hf")).eval()
    model.load_state_dict(bench.model.state_dict(), assign=True)
    runs = {}
    for size in (224, 256, 384, 512, 768):
        if size % config.patch_size == 0:
            runs[f"{size}"] = functools.partial(model.embed, torch.rand(1, 3, size, size))
    rows: Rows = {}
    for name, times in time_interleaved(runs, rounds).items():
        tokens = (int(name) // config.patch_size) ** 2
        gflop = flops(config, tokens) / 1e9
        median = statistics.median(times)
        rows[name] = {
            "tokens": tokens,
            "gflop": gflop,
            "ms": 1000 * median,
            "gflop_per_s": gflop / median,
        }
    return rows


# --- whole processes ------------------------------------------------------------------------------

NO_GRADIENTS = "; torch.set_grad_enabled(False)\n"
PORT = "import torch; from siglip_port import SigLipVisionModel as M, optimize" + NO_GRADIENTS
REFERENCE = "import torch; from transformers import SiglipVisionModel as M" + NO_GRADIENTS
TIMM = "import torch, timm" + NO_GRADIENTS
IMAGE = "torch.rand(1, 3, SIZE, SIZE)"

PROGRAMS = {
    "import torch": "import torch",
    "import siglip_port": "import siglip_port",
    "siglip_port, first vector": PORT + f"M.from_hf('hf').embed({IMAGE})",
    "siglip_port optimized, first vector": (
        PORT + f"optimize(M.from_hf('hf'), cache_dir='cache').embed({IMAGE})"
    ),
    "transformers, first vector": REFERENCE + f"M.from_pretrained('hf')({IMAGE})",
    "timm, first vector": (
        TIMM
        + "model = timm.create_model('local-dir:timm', pretrained=True, num_classes=0)\n"
        + f"model.eval()({IMAGE})"
    ),
    "siglip_port, loaded": PORT + "[p.sum() for p in M.from_hf('hf').parameters()]",
    "siglip_port, batch 8": PORT + "M.from_hf('hf').embed(torch.rand(8, 3, SIZE, SIZE))",
    "siglip_port, batch 32": PORT + "M.from_hf('hf').embed(torch.rand(32, 3, SIZE, SIZE))",
    "transformers, loaded": REFERENCE + "[p.sum() for p in M.from_pretrained('hf').parameters()]",
}
"""Programs to time as processes. `optimized` uses the cache of the peers' benchmark."""

# `getrusage` would include the memory of the parent process.
PRINT_PEAK_KILOBYTES = """
lines = open('/proc/self/status')
print(next(line.split()[1] for line in lines if line.startswith('VmHWM')))
"""


def measure_processes(bench: Bench, rounds: int) -> Rows:
    """Measure processes in turns: seconds from start to end, and peak memory in MB."""
    times: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    peaks: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for number in range(rounds + 1):
        for name, program in PROGRAMS.items():
            started = time.perf_counter()
            process = run_program(
                program.replace("SIZE", str(bench.model.config.image_size)), bench
            )
            duration = time.perf_counter() - started
            if process.returncode:
                bench.skipped[name] = process.stderr.strip().splitlines()[-1]
            elif number > 0:  # the first round only warms the disk's cache
                times[name].append(duration)
                peaks[name].append(int(process.stdout.split()[-1]) / 1024)
    rows: Rows = {}
    for name, peer_times in times.items():
        if len(peer_times) < rounds:
            continue
        ratios = [own / base for own, base in zip(peer_times, times["import torch"], strict=True)]
        rows[name] = {
            "seconds": statistics.median(peer_times),
            "times_import_torch": statistics.median(ratios),
            "peak_mb": statistics.median(peaks[name]),
        }
    return rows


def run_program(program: str, bench: Bench) -> subprocess.CompletedProcess[str]:
    """Run a program in its own process, in the folder of the checkpoints."""
    variables = {**os.environ, "HF_HUB_OFFLINE": "1"}
    # Otherwise every process would compile torch and transformers to bytecode again.
    variables.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-W", "ignore", "-c", program + PRINT_PEAK_KILOBYTES]
    return subprocess.run(
        command, cwd=bench.folder, capture_output=True, text=True, check=False, env=variables
    )


# --- the report -----------------------------------------------------------------------------------


def environment(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """Describe the machine, command and versions."""
    device = cpu_name() if args.device == "cpu" else torch.cuda.get_device_name()
    return {
        "date": date.today().isoformat(),
        "command": " ".join(["scripts/benchmarks/inference.py", *sys.argv[1:]]),
        "device": device,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "model": f"siglip {bench.name}, random weights",
        "dtype": args.dtype,
        "gflop_per_image": flops(bench.model.config) / 1e9,
        **package_versions(),
    }


def package_versions() -> dict[str, str]:
    """Return versions of the benchmarked packages."""
    names = ["torch", "transformers", "timm", "open-clip-torch"]
    names += ["onnxruntime", "openvino", "siglip-port"]
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def cpu_name() -> str:
    """Return the CPU's name on Linux, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.split(": ")[1]
    return platform.machine()


def plot(report: dict[str, Any], path: Path) -> None:
    """Plot speedups over the baseline."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    batches = list(report["peers"])
    size = (5.2 * len(batches), 4)
    figure, axes = pyplot.subplots(1, len(batches), figsize=size, sharey=True, squeeze=False)
    for axis, batch in zip(axes[0], batches, strict=True):
        rows = report["peers"][batch]
        names = [name for name in report["peers"][batches[0]] if name in rows]
        names.reverse()
        ratios = [rows[name]["times_as_fast"] for name in names]
        colors = ["#c2185b" if "siglip_port" in name else "#9e9e9e" for name in names]
        bars = axis.barh(names, ratios, color=colors)
        axis.axvline(1, color="black", linewidth=0.8)
        labels = axis.bar_label(bars, labels=[f"{ratio:.2f}" for ratio in ratios], padding=3)
        for label in labels:  # hides the line at 1 behind a label
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.8})
        axis.set_xlim(0, max(ratios) * 1.15)
        axis.set_title(f"batch {batch}: speedup over {BASELINE}", fontsize=10)
    about = report["environment"]
    title = ", ".join(about[key] for key in ("model", "dtype", "device", "instructions"))
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def format_rows(rows: Rows, bench: Bench, peak: float) -> str:
    """Format the results of one batch size as a table."""
    gflop = flops(bench.model.config) / 1e9
    width = max(map(len, rows))
    lines = [
        f"{'':{width}} | ms per image (quartiles) | speedup       | of the GEMM peak | difference"
    ]
    for name, row in rows.items():
        spread = f"{row['ms']:8.1f} ({row['ms_low']:.1f}-{row['ms_high']:.1f})"
        share = gflop / row["ms"] * 1000 / peak
        difference = bench.agreement[name]["difference"]
        lines.append(
            f"{name:{width}} | {spread:24} | {row['times_as_fast']:13.2f} | {share:16.0%} | "
            f"{difference:.1e}"
        )
    return "\n".join(lines)


# --- the command ----------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="Batch 1, 5 rounds, no torch.compile.")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="Device.")
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="Dtype."
    )
    parser.add_argument("--model", default="base", choices=sorted(MODELS), help="Architecture.")
    parser.add_argument("--rounds", type=int, help="Timed rounds. [default: 8; 5 with --quick]")
    parser.add_argument("--only", choices=["peers", "cold", "scaling"], help="Run one part only.")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("benchmark"),
        help="Prefix of the output files, OUTPUT.json and OUTPUT.png. [default: benchmark]",
    )
    args = parser.parse_args()
    if args.rounds is not None and args.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {args.rounds}")
    if not args.output.absolute().parent.is_dir():
        parser.error(f"--output {args.output}: folder does not exist")
    if args.rounds is None:
        args.rounds = 5 if args.quick else 8
    return args


def batch_sizes(args: argparse.Namespace) -> tuple[int, ...]:
    """Return the batch sizes to time."""
    if args.quick:
        return (1,)
    return (1, 8) if args.device == "cpu" else (1, 32, 256)


def report_peers(bench: Bench, args: argparse.Namespace, report: dict[str, Any]) -> None:
    """Time all peers, print the results and add them to the report."""
    peak = gemm_peak(bench)
    report["gemm_peak_gflop_per_s"] = peak
    print(f"GEMM peak: {peak:.0f} GFLOP/s")
    for batch_size in batch_sizes(args):
        images = bench.images(batch_size)
        peers = build_peers(bench, batch_size, quick=args.quick)
        calls = {name: functools.partial(run, images) for name, run in peers.items()}
        rows = summarize(time_interleaved(calls, args.rounds, args.device), batch_size)
        report["peers"][f"{batch_size}"] = rows
        print(f"\nbatch {batch_size}\n{format_rows(rows, bench, peak)}")


def report_processes(bench: Bench, args: argparse.Namespace, report: dict[str, Any]) -> None:
    """Time processes, print the results and add them to the report."""
    rows = measure_processes(bench, 2 if args.quick else 3)
    report["cold"] = rows
    print("\nprocesses")
    for name, row in rows.items():
        print(
            f"{name:45} {row['seconds']:6.2f} s, {row['times_import_torch']:5.2f} times import "
            f"torch, {row['peak_mb']:6.0f} MB"
        )


def measure(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """Run the requested benchmarks and print the results."""
    report: dict[str, Any] = {"environment": environment(bench, args), "peers": {}}
    print(json.dumps(report["environment"], indent=1))
    on_cpu = args.device == "cpu"
    if args.only in (None, "peers"):
        report_peers(bench, args, report)
    if args.only in (None, "cold") and on_cpu:
        report_processes(bench, args, report)
    if args.only in (None, "scaling") and on_cpu and not args.quick:
        report["scaling"] = measure_scaling(bench)
        print("\nscaling\n" + json.dumps(report["scaling"], indent=1))
    report["agreement"] = bench.agreement
    report["skipped"] = bench.skipped
    for name, reason in bench.skipped.items():
        print(f"skipped {name}: {reason}")
    return report


def main() -> int:
    """Run the benchmarks and write the report."""
    args = parse_arguments()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: no CUDA device is available; use --device cpu", file=sys.stderr)
        return 2
    warnings.simplefilter("ignore")
    with prepare(args.model, args.device, getattr(torch, args.dtype)) as bench:
        report = measure(bench, args)
    text = json.dumps(report, indent=1) + "\n"
    args.output.with_suffix(".json").write_text(text, encoding="utf-8")
    if report["peers"]:
        try:
            plot(report, args.output.with_suffix(".png"))
        except ImportError:
            print(
                "plot skipped: matplotlib is not installed; run: uv run --group bench "
                "scripts/benchmarks/inference.py"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
