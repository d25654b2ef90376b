"""Embeds a folder of images uninterrupted, killed repeatedly, and on a Ray cluster.

    uv run tests/helpers/sample_images.py FOLDER
    uv run scripts/benchmarks/embed_interrupted.py FOLDER [--kills 10] [--seed 0] [--model SOURCE]
    [--json PATH]

All runs must end with the same rows and bitwise equal embeddings. The cluster has two workers.
Without --model, a small model with random weights is used: the script compares rows, not speed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyarrow import parquet

from siglip_port import SigLipVisionConfig, SigLipVisionModel
from siglip_port.parity import randomize

SMALL = SigLipVisionConfig(
    embed_dim=192,
    num_attention_heads=3,
    num_encoder_blocks=2,
    mlp_hidden_dim=768,
    pooling_head=True,
)

PROGRAM = [sys.executable, "-c", "from siglip_port.cli.main import main; main()"]


def embed_command(images: Path, output: Path, model: str, *options: str) -> list[str]:
    """Return the command line of a run."""
    arguments = [str(images), "-o", str(output), "--model", model, "--engine", "eager"]
    arguments += ["--threads", "1", "--shard-size", "256", "--json", *options]
    return [*PROGRAM, "embed", *arguments]


def run_to_end(command: list[str]) -> dict[str, Any]:
    """Run a command and return its JSON output and exit code."""
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode not in (0, 3):
        message = process.stderr.strip() or process.stdout.strip()
        raise RuntimeError(f"exit code {process.returncode}: {message}")
    report: dict[str, Any] = json.loads(process.stdout)
    return {**report, "exit_code": process.returncode}


def kill_repeatedly(
    command: list[str], output: Path, kills: int, chance: random.Random
) -> list[int]:
    """Kill a run at random points; return the number of complete files after each kill."""
    complete = [0]
    for _ in range(kills):
        files = complete[-1] + chance.randrange(5)
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            wait_for_files(output, files, process)
            time.sleep(chance.uniform(0, 5))
            process.send_signal(signal.SIGKILL)
        complete.append(count_files(output))
    return complete[1:]


def wait_for_files(output: Path, files: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until `files` files are complete, or the run has ended."""
    while process.poll() is None and count_files(output) < files:
        time.sleep(0.1)


def count_files(output: Path) -> int:
    """Return the number of complete files of a run."""
    return len(list(output.glob("part-*.parquet")))


def row_hashes(output: Path) -> list[tuple[str, str]]:
    """Return the id of each row and a hash of the row, including every bit of its embedding."""
    hashes = []
    for path in sorted(output.glob("part-*.parquet")):
        table = parquet.read_table(path)
        numbers = table.column("embedding").combine_chunks().flatten()
        rows = table.drop_columns(["embedding"]).to_pylist()
        vectors = numbers.to_numpy(zero_copy_only=False).reshape(len(rows), -1)
        for row, vector in zip(rows, vectors, strict=True):
            content = repr(row).encode() + vector.tobytes()
            hashes.append((row["id"], hashlib.sha256(content).hexdigest()))
    return hashes


@contextlib.contextmanager
def ray_cluster() -> Iterator[str]:
    """Start a Ray cluster of two workers on this machine; yield its address."""
    os.environ |= {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        cluster.add_node(num_cpus=2)
    try:
        yield cluster.address
    finally:
        cluster.shutdown()


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="Seed of the kill times.")
    parser.add_argument("--model", help="Checkpoint. [default: small, random weights]")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run all three in a folder and compare them."""
    source = args.model
    if source is None:
        model = SigLipVisionModel(SMALL).eval()
        randomize(model, seed=0)
        model.save_hf(folder / "model")
        source = str(folder / "model")
    report: dict[str, Any] = {}
    report["uninterrupted"] = run_to_end(embed_command(args.folder, folder / "one", source))
    command = embed_command(args.folder, folder / "killed", source)
    chance = random.Random(args.seed)
    report["files after each kill"] = kill_repeatedly(
        command, folder / "killed", args.kills, chance
    )
    report["killed"] = run_to_end(command)
    with ray_cluster() as address:
        options = ["--executor", "ray", "--address", address]
        report["on Ray"] = run_to_end(embed_command(args.folder, folder / "ray", source, *options))
    rows = row_hashes(folder / "one")
    report["num_images"] = len(rows)
    report["broken"] = len(json.loads((args.folder / "broken.json").read_text(encoding="utf-8")))
    report["same after kills"] = rows == row_hashes(folder / "killed")
    report["same on Ray"] = rows == row_hashes(folder / "ray")
    report["distinct"] = len(set(rows)) == len(rows)
    return report


def main() -> int:
    """Run all three and print a report; return 1 if they differ."""
    args = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="siglip_port-") as folder:
        report = measure(args, Path(folder))
    is_complete = report.pop("distinct") and report["uninterrupted"]["failed"] == report["broken"]
    text = json.dumps(report, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")
    is_same = report["same after kills"] and report["same on Ray"]
    return 0 if is_complete and is_same else 1


if __name__ == "__main__":
    sys.exit(main())
