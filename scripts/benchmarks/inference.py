"""Times this port beside its peers.

The same weights, the same pictures, equal before they are timed, in turns.

    uv run --group bench scripts/benchmarks/inference.py [--quick]                        all of it,
    on the CPU
    uv run --group bench scripts/benchmarks/inference.py --device cuda --dtype bfloat16   on a GPU

Weights are random ones of google/siglip-base-patch16-224's architecture, or `--model so400m`'s.
Peers that are not installed are left out, in words. Every round runs every peer once, A B C A B C,
so that what slows the machine down slows all of them; ratios are medians of the ratios within
rounds. Writes what it measured as JSON and as a picture.
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
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from siglip_port import SigLipVisionConfig, SigLipVisionModel, optimize
from siglip_port.parity import randomise

MODELS = {
    "base": SigLipVisionConfig(pooling_head=True),
    "so400m": SigLipVisionConfig(
        embed_dim=1152, image_size=384, patch_size=14, num_attention_heads=16, num_encoder_blocks=27,
        mlp_hidden_dim=4304, pooling_head=True,
    ),
    "tiny": SigLipVisionConfig(
        embed_dim=96, image_size=64, num_attention_heads=2, num_encoder_blocks=2, mlp_hidden_dim=192, pooling_head=True
    ),
}  # fmt: skip
TIMM = {"base": "ViT-B-16-SigLIP", "so400m": "ViT-SO400M-14-SigLIP-384"}
BASELINE, INT8 = "transformers sdpa", "siglip_port optimize, int8"
EQUAL = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.05}
"""How far a peer's vectors may be from ours in float32, largest difference over largest number, to be timed at all."""

Run = Callable[[Tensor], Tensor]
"""[B, C, S, S] -> pooled [B, D], by way of all tokens."""


@dataclass
class Bench:
    """What all peers share.

    The weights, as our model and as the folders that others read, and where to run.

    Attributes:
        model: ours, on the CPU, float32.
        folder: with `hf` and `timm` in it.
        name: of the model, a key of `MODELS`.
        device: where to.
        dtype: of all.
    """

    model: SigLipVisionModel
    folder: Path
    name: str
    device: str
    dtype: torch.dtype
    left_out: dict[str, str] = field(default_factory=dict)

    def home(self, module: nn.Module) -> Any:  # noqa: ANN401
        """Brings a module to the device and dtype."""
        return module.to(self.device, self.dtype).eval()


@contextmanager
def prepared(args: argparse.Namespace) -> Iterator[Bench]:
    """Makes the weights."""
    model = SigLipVisionModel(MODELS[args.model]).eval()
    randomise(model, seed=0)
    with tempfile.TemporaryDirectory(prefix="siglip_port-") as folder:
        model.save_hf(Path(folder) / "hf")
        if args.model in TIMM:
            model.save_timm(Path(folder) / "timm")
        yield Bench(model, Path(folder), args.model, args.device, getattr(torch, args.dtype))


def transformers_peer(attention: str, *, compiled: bool = False) -> Callable[[Bench], Run]:
    """The reference, with an attention of its own choice."""

    def make(bench: Bench) -> Run:
        from transformers import SiglipVisionModel

        model = bench.home(
            SiglipVisionModel.from_pretrained(bench.folder / "hf", attn_implementation=attention)
        )
        called = torch.compile(model, dynamic=False) if compiled else model
        return lambda x: called(pixel_values=x).pooler_output

    return make


def timm_peer(bench: Bench) -> Run:
    """Timm's model of the same architecture."""
    import timm

    return bench.home(  # type: ignore[no-any-return]
        timm.create_model(f"local-dir:{bench.folder / 'timm'}", pretrained=True, num_classes=0)
    )


def open_clip_peer(bench: Bench) -> Run:
    """open_clip's vision tower, which is timm's with a wrapper around it."""
    import open_clip
    import timm

    visual = open_clip.create_model(TIMM[bench.name], pretrained=None).visual
    source = timm.create_model(f"local-dir:{bench.folder / 'timm'}", pretrained=True, num_classes=0)
    visual.trunk.load_state_dict(source.state_dict())
    for block in [*visual.trunk.blocks, visual.trunk.attn_pool]:
        block.mlp.act = nn.GELU(
            approximate="tanh"
        )  # its configuration of the first SigLIP says exact
    return bench.home(visual)  # type: ignore[no-any-return]


def onnxruntime_peer(bench: Bench) -> Run:
    """ONNX Runtime, on what `export_onnx` writes."""
    import onnxruntime

    from siglip_port.optimize.export import export_onnx

    if bench.dtype != torch.float32 or bench.device != "cpu":
        raise ValueError("measured in float32 on a CPU only")
    export_onnx(bench.model, bench.folder / "tower.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        bench.folder / "tower.onnx", options, providers=["CPUExecutionProvider"]
    )
    return lambda x: torch.from_numpy(session.run(["pooled"], {"pixel_values": x.numpy()})[0])


def openvino_peer(bench: Bench) -> Run:
    """OpenVINO on its own, head included; not by way of our `optimize`."""
    import openvino

    from siglip_port.optimize.selection import Outputs, export_any_batch

    if bench.dtype == torch.float16 or bench.device != "cpu":
        raise ValueError("measured in float32 and bfloat16 on a CPU only")
    example = torch.zeros(2, 3, *2 * [bench.model.config.image_size])
    hint = "f32" if bench.dtype == torch.float32 else "bf16"
    settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    converted = openvino.convert_model(export_any_batch(Outputs(bench.model), example))
    compiled = openvino.Core().compile_model(
        converted, "CPU", {**settings, "PERFORMANCE_HINT": "LATENCY"}
    )
    return lambda x: torch.from_numpy(compiled(x.float().numpy(), share_inputs=True)[1])


def ours_eager(bench: Bench) -> Run:
    """Our tower as `from_hf` returns it."""
    return SigLipVisionModel.from_hf(
        bench.folder / "hf", dtype=bench.dtype, device=bench.device
    ).embed


def ours_fast(
    engines: Sequence[str] | None, batch: int, dtype: torch.dtype | None = None
) -> Callable[[Bench], Run]:
    """Our tower after `optimize`."""

    def make(bench: Bench) -> Run:
        model = SigLipVisionModel.from_hf(bench.folder / "hf", device=bench.device)
        fast = optimize(
            model,
            dtype=dtype or bench.dtype,
            engines=engines,
            batch_size=batch,
            cache_dir=bench.folder / "kept",
        )
        print(f"optimize: {fast.choice}", file=sys.stderr)
        return fast.embed

    return make


def peers(bench: Bench, batch: int, *, quick: bool) -> dict[str, Run]:
    """All that can be timed here, equal to our float32 tower.

    What cannot is noted in `bench.left_out`.
    """
    makers: dict[str, Callable[[Bench], Run]] = {
        BASELINE: transformers_peer("sdpa"),
        "transformers eager": transformers_peer("eager"),
        **({} if quick else {"transformers compiled": transformers_peer("sdpa", compiled=True)}),
        "timm": timm_peer,
        "open_clip": open_clip_peer,
        "ONNX Runtime": onnxruntime_peer,
        "OpenVINO": openvino_peer,
        "siglip_port": ours_eager,
        "siglip_port optimize, without extras": ours_fast(
            ["packed", "packed-gelu", "compiled"], batch
        ),
        "siglip_port optimize": ours_fast(None, batch),
        **(
            {INT8: ours_fast(None, batch, torch.int8)}
            if bench.dtype == torch.float32 and bench.device == "cpu"
            else {}
        ),
    }
    made: dict[str, Run] = {}
    x = pictures(bench, batch)
    with torch.inference_mode():
        truth = bench.model.embed(x.cpu().float()).double()
        for name, make in makers.items():
            try:
                run = make(bench)
                found = run(x).cpu().double()
            except (ImportError, KeyError, OSError, ValueError, RuntimeError) as error:
                bench.left_out[name] = (
                    f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                )
                continue
            error_ = ((found - truth).abs().max() / truth.abs().max()).item()
            cosine = torch.cosine_similarity(found, truth, dim=-1).min().item()
            agreement[name] = {"difference": error_, "cosine": cosine}
            if not error_ <= EQUAL[bench.dtype] and name != INT8:
                bench.left_out[name] = f"not equal: differs by {error_:.1e}"
                continue
            made[name] = run
    return made


agreement: dict[str, dict[str, float]] = {}


def pictures(bench: Bench, batch: int) -> Tensor:
    """Noise in [-1, 1]: [batch, 3, S, S]."""
    size = bench.model.config.image_size
    noise = torch.rand((batch, 3, size, size), generator=torch.Generator().manual_seed(1)) * 2 - 1
    return noise.to(bench.device, bench.dtype)


def seconds(run: Callable[[], object], device: str = "cpu") -> float:
    """Of one call, that of the device included."""
    started = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def in_turns(
    runs: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Times everything once a round, every second round backwards.

    One round before does not count.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for number in range(rounds + 1):
            for name in list(runs)[:: 1 if number % 2 else -1]:
                taken = seconds(runs[name], device)
                if number:
                    times[name].append(taken)
    return times


def summary(
    times: dict[str, list[float]], batch: int, baseline: str = BASELINE
) -> dict[str, dict[str, float]]:
    """Medians, quartiles and ratios: how many times as fast as the baseline."""
    rows = {}
    for name, all_ in times.items():
        low, middle, high = statistics.quantiles(all_, n=4)
        ratio = statistics.median(b / a for a, b in zip(all_, times[baseline], strict=True))
        rows[name] = {
            "ms": 1000 * middle / batch, "ms_low": 1000 * low / batch, "ms_high": 1000 * high / batch,
            "times_as_fast": ratio,
        }  # fmt: skip
    return rows


def flops(config: SigLipVisionConfig, tokens: int | None = None) -> float:
    """Multiplications and additions of one picture, of matrix products alone."""
    n, d, m = tokens or config.num_patches, config.embed_dim, config.mlp_hidden_dim
    patch = 2 * n * d * config.patch_size**2 * config.num_channels
    block = 2 * n * (4 * d * d + 2 * d * m) + 4 * n * n * d
    head = 2 * n * 2 * d * d + 2 * (2 * d * d + 2 * d * m) + 4 * n * d
    return float(patch + config.num_encoder_blocks * block + head * config.pooling_head)


def gemm_peak(bench: Bench) -> float:
    """The best rate of a large product in GFLOP/s, by MKL or cuBLAS and by oneDNN."""
    n = 1536 if bench.device == "cpu" else 8192
    a, b = (torch.randn(n, n, dtype=bench.dtype, device=bench.device) for _ in range(2))
    runs: dict[str, Callable[[], object]] = {"matmul": lambda: a @ b}
    if bench.device == "cpu":
        convolution = nn.Conv2d(n, n, 1).to(bench.dtype).to(memory_format=torch.channels_last)
        x = (
            a.t()
            .contiguous()
            .reshape(1, n, 48, n // 48)
            .contiguous(memory_format=torch.channels_last)
        )
        runs["conv"] = lambda: convolution(x)
    times = in_turns(runs, 10, bench.device)
    return float(2 * n**3 / min(min(all_) for all_ in times.values()) / 1e9)


def scaling(bench: Bench, *, rounds: int = 3) -> dict[str, Any]:
    """How time grows with batch, threads and picture, beside what arithmetic says."""
    config, found = bench.model.config, dict[str, Any]()
    model = bench.model
    runs = {
        f"{batch}": functools.partial(model.embed, pictures(bench, batch))
        for batch in (1, 2, 4, 8, 16)
    }
    times = in_turns(runs, rounds)
    found["batch"] = {
        name: 1000 * statistics.median(all_) / int(name) for name, all_ in times.items()
    }
    threads = torch.get_num_threads()
    x, by_threads = pictures(bench, 8), {}
    for number in range(1, threads + 1):
        torch.set_num_threads(number)
        by_threads[f"{number}"] = (
            1000 * statistics.median(in_turns({"": lambda: model.embed(x)}, rounds)[""]) / 8
        )
    torch.set_num_threads(threads)
    found["threads"] = by_threads
    resized = SigLipVisionModel(replace(config, interpolation="hf")).eval()
    resized.load_state_dict(model.state_dict(), assign=True)
    sizes = [size for size in (224, 256, 384, 512, 768) if size % config.patch_size == 0]
    runs = {
        f"{size}": functools.partial(resized.embed, torch.rand(1, 3, size, size)) for size in sizes
    }
    times = in_turns(runs, rounds)
    found["image"] = {
        name: {
            "tokens": (n := (int(name) // config.patch_size) ** 2),
            "gflop": flops(config, n) / 1e9,
            "ms": 1000 * statistics.median(all_),
            "gflop_per_s": flops(config, n) / 1e9 / statistics.median(all_),
        }
        for name, all_ in times.items()
    }
    return found


OURS = "import torch; from siglip_port import SigLipVisionModel as M, optimize; torch.set_grad_enabled(False)\n"
THEIRS = (
    "import torch; from transformers import SiglipVisionModel as M; torch.set_grad_enabled(False)\n"
)
TIMMS = "import torch, timm; torch.set_grad_enabled(False)\n"
COLD = {
    "import torch": "import torch",
    "import siglip_port": "import siglip_port",
    "siglip_port, first vector": OURS + "M.from_hf('hf').embed(torch.rand(1, 3, {s}, {s}))",
    "siglip_port optimized, first vector": (
        OURS + "optimize(M.from_hf('hf'), cache_dir='kept').embed(torch.rand(1, 3, {s}, {s}))"
    ),
    "transformers, first vector": THEIRS + "M.from_pretrained('hf')(torch.rand(1, 3, {s}, {s}))",
    "timm, first vector": (
        TIMMS
        + "timm.create_model('local-dir:timm', pretrained=True, num_classes=0).eval()(torch.rand(1, 3, {s}, {s}))"
    ),
    "siglip_port, loaded": OURS + "[p.sum() for p in M.from_hf('hf').parameters()]",
    "siglip_port, batch 8": OURS + "M.from_hf('hf').embed(torch.rand(8, 3, {s}, {s}))",
    "siglip_port, batch 32": OURS + "M.from_hf('hf').embed(torch.rand(32, 3, {s}, {s}))",
    "transformers, loaded": THEIRS + "[p.sum() for p in M.from_pretrained('hf').parameters()]",
}
"""Whole programs. `optimized` finds what the benchmark of batch 1 has kept."""

# Not `getrusage`, which begins with what this process, its parent, had.
MEMORY = "\nprint(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"


def cold(bench: Bench, rounds: int) -> dict[str, dict[str, float]]:
    """Whole processes: seconds from start to end, and the most memory in MB, in turns."""
    size = bench.model.config.image_size
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in COLD}
    # Where Python may not keep what it compiles, every process compiles torch and transformers
    # anew.
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    for number in range(rounds + 1):
        for name, code in COLD.items():
            started = time.perf_counter()
            program = code.replace("{s}", f"{size}") + MEMORY
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", program],
                cwd=bench.folder, capture_output=True, text=True, env={**kept, "HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
            taken = time.perf_counter() - started
            if done.returncode:
                bench.left_out[name] = done.stderr.strip().splitlines()[-1]
            elif number:  # the first round only warms the disk's cache
                found[name].append((taken, int(done.stdout.split()[-1]) / 1024))
    torch_alone = [t for t, _ in found["import torch"]]
    return {
        name: {
            "seconds": statistics.median(t for t, _ in all_),
            "times_import_torch": statistics.median(
                t / b for (t, _), b in zip(all_, torch_alone, strict=True)
            ),
            "peak_mb": statistics.median(mb for _, mb in all_),
        }
        for name, all_ in found.items()
        if len(all_) == rounds
    }


def environment(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """On what it was measured."""
    versions = {}
    for package in (
        "torch",
        "transformers",
        "timm",
        "open-clip-torch",
        "onnxruntime",
        "openvino",
        "siglip-port",
    ):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    cpu = next(
        (line.split(": ")[1] for line in _cpuinfo() if line.startswith("model name")),
        platform.machine(),
    )
    device = cpu if args.device == "cpu" else torch.cuda.get_device_name()
    return {
        "date": date.today().isoformat(), "command": " ".join(["scripts/benchmarks/inference.py", *sys.argv[1:]]),
        "device": device, "instructions": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
        "python": platform.python_version(), "model": f"siglip {bench.name}, random weights", "dtype": args.dtype,
        "gflop_per_picture": flops(bench.model.config) / 1e9, **versions,
    }  # fmt: skip


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def plot(report: dict[str, Any], path: Path) -> None:
    """Draws how many times as fast as the baseline everybody is."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    batches = list(report["peers"])
    figure, axes = pyplot.subplots(
        1, len(batches), figsize=(5.2 * len(batches), 4), sharey=True, squeeze=False
    )
    for axis, batch in zip(axes[0], batches, strict=True):
        rows = report["peers"][batch]
        names = [name for name in report["peers"][batches[0]] if name in rows][::-1]
        ratios = [rows[name]["times_as_fast"] for name in names]
        bars = axis.barh(
            names,
            ratios,
            color=["#c2185b" if "siglip_port" in name else "#9e9e9e" for name in names],
        )
        axis.bar_label(bars, labels=[f"{ratio:.2f}" for ratio in ratios], padding=3)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xlim(0, max(ratios) * 1.15)
        axis.set_title(f"batch {batch}: times as fast as {BASELINE}", fontsize=10)
    where = report["environment"]
    figure.suptitle(
        f"{where['model']}, {where['dtype']}, {where['device']}, {where['instructions']}",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def table(rows: dict[str, dict[str, float]], gflop: float, peak: float) -> str:
    """One batch size for people."""
    width = max(map(len, rows))
    lines = [
        f"{'':{width}} | ms a picture (quartiles) | times as fast | of the GEMM peak | difference"
    ]
    for name, row in rows.items():
        spread = f"{row['ms']:8.1f} ({row['ms_low']:.1f}-{row['ms_high']:.1f})"
        share = gflop / row["ms"] * 1000 / peak
        far = agreement[name]["difference"]
        lines.append(
            f"{name:{width}} | {spread:24} | {row['times_as_fast']:13.2f} | {share:16.0%} | "
            f"{far:.1e}"
        )
    return "\n".join(lines)


def main() -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="batch 1, few rounds, nothing that compiles"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--model", default="base", choices=sorted(MODELS))
    parser.add_argument("--rounds", type=int, help="how often everybody runs (8; 5 with --quick)")
    parser.add_argument("--only", choices=["peers", "cold", "scaling"], help="one part alone")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("benchmark"),
        help="names the files: OUTPUT.json, OUTPUT.png",
    )
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("not measured: there is no CUDA device here", file=sys.stderr)
        return 2
    if args.rounds is not None and args.rounds < 2:
        parser.error("--rounds must be at least 2, for a spread")
    if not args.output.absolute().parent.is_dir():
        parser.error(f"--output {args.output}: its folder does not exist")
    warnings.simplefilter("ignore")
    rounds = args.rounds or (5 if args.quick else 8)
    with prepared(args) as bench:
        report: dict[str, Any] = {"environment": environment(bench, args), "peers": {}}
        gflop = report["environment"]["gflop_per_picture"]
        print(json.dumps(report["environment"], indent=1))
        if args.only in (None, "peers"):
            peak = report["gemm_peak_gflop_per_s"] = gemm_peak(bench)
            print(f"the best product of matrices: {peak:.0f} GFLOP/s")
            for batch in (1,) if args.quick else (1, 8) if args.device == "cpu" else (1, 32, 256):
                x, made = pictures(bench, batch), peers(bench, batch, quick=args.quick)
                calls = {name: functools.partial(run, x) for name, run in made.items()}
                rows = summary(in_turns(calls, rounds, args.device), batch)
                report["peers"][f"{batch}"] = rows
                print(f"\nbatch {batch}\n{table(rows, gflop, peak)}")
        if args.only in (None, "cold") and args.device == "cpu":
            report["cold"] = cold(bench, 2 if args.quick else 3)
            print("\nwhole processes" + "".join(
                f"\n{name:45} {row['seconds']:6.2f} s, {row['times_import_torch']:5.2f} times "
                "import torch, "
                f"{row['peak_mb']:6.0f} MB" for name, row in report["cold"].items()
            ))  # fmt: skip
        if args.only in ("scaling", None) and not args.quick and args.device == "cpu":
            report["scaling"] = scaling(bench)
            print("\nscaling\n" + json.dumps(report["scaling"], indent=1))
        report["agreement"], report["left_out"] = agreement, bench.left_out
        for name, reason in bench.left_out.items():
            print(f"left out: {name}: {reason}")
    args.output.with_suffix(".json").write_text(
        json.dumps(report, indent=1) + "\n", encoding="utf-8"
    )
    if report["peers"]:
        try:
            plot(report, args.output.with_suffix(".png"))
        except ImportError:
            print(
                "no picture: matplotlib is not installed; uv run --group bench "
                "scripts/benchmarks/inference.py"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
