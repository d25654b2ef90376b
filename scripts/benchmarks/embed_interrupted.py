"""Embeds one folder of pictures three ways.

In one go, killed again and again, and on a Ray cluster of two workers.

    uv run tests/helpers/sample_images.py FOLDER
    uv run scripts/benchmarks/embed_interrupted.py FOLDER [--kills 10] [--seed 0] [--model SOURCE]
    [--json PATH]

All must end with the same rows and, bit for bit, the same vectors. Without --model, a small tower
with random weights is taken: the rows are what is looked at here, not the speed.
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
from siglip_port.parity import randomise

TINY = SigLipVisionConfig(
    embed_dim=192,
    num_attention_heads=3,
    num_encoder_blocks=2,
    mlp_hidden_dim=768,
    pooling_head=True,
)


def command(folder: Path, out: Path, model: str, *more: str) -> list[str]:
    """The command line of a run."""
    how = [
        "--model",
        model,
        "--form",
        "eager",
        "--threads",
        "1",
        "--shard-size",
        "256",
        "--json",
        *more,
    ]
    return [
        sys.executable,
        "-c",
        "from siglip_port.cli.main import main; main()",
        "embed",
        str(folder),
        "-o",
        str(out),
        *how,
    ]


def to_the_end(arguments: list[str]) -> dict[str, Any]:
    """Runs it; what it says of itself."""
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 3):
        raise RuntimeError(
            f"exit code {done.returncode}: {done.stderr.strip() or done.stdout.strip()}"
        )
    found: dict[str, Any] = json.loads(done.stdout)
    return {**found, "exit_code": done.returncode}


def killed(
    arguments: list[str], out: Path, times: int, chance: random.Random
) -> tuple[list[int], dict[str, Any]]:
    """Kills a run at some moments, and then lets it end.

    How many files were there after each, and what it says.
    """
    complete = [0]
    for _ in range(times):
        with subprocess.Popen(
            arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            wait_for(out, complete[-1] + chance.randrange(5), process)
            time.sleep(chance.uniform(0, 5))
            process.send_signal(signal.SIGKILL)
        complete.append(len(list(out.glob("part-*.parquet"))))
    return complete[1:], to_the_end(arguments)


def wait_for(out: Path, files: int, process: subprocess.Popen[bytes]) -> None:
    """Until so many files are complete, or the run has ended."""
    while process.poll() is None and len(list(out.glob("part-*.parquet"))) < files:
        time.sleep(0.1)


def rows(out: Path) -> list[tuple[str, str]]:
    """Of all rows, the id, and a hash of everything, every bit of the vector included."""
    found = []
    for path in sorted(out.glob("part-*.parquet")):
        table = parquet.read_table(path)
        vectors = (
            table.column("embedding").combine_chunks().flatten().to_numpy(zero_copy_only=False)
        )
        others = table.drop_columns(["embedding"]).to_pylist()
        for other, vector in zip(others, vectors.reshape(len(others), -1), strict=True):
            found.append(
                (other["id"], hashlib.sha256(repr(other).encode() + vector.tobytes()).hexdigest())
            )
    return found


@contextlib.contextmanager
def cluster() -> Iterator[str]:
    """A Ray cluster of two workers on this machine: its address."""
    os.environ |= {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        made.add_node(num_cpus=2)
    try:
        yield made.address
    finally:
        made.shutdown()  # type: ignore[no-untyped-call]


def main() -> int:
    """Reads the arguments, runs all three, compares; exit code 1 where they differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--model", help="a checkpoint, instead of a small one with random weights")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    broken = json.loads((args.folder / "broken.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="siglip_port-") as scratch:
        room = Path(scratch)
        if args.model is None:
            model = SigLipVisionModel(TINY).eval()
            randomise(model, seed=0)
            model.save_hf(room / "tower")
        source = args.model or str(room / "tower")
        told: dict[str, Any] = {"in one go": to_the_end(command(args.folder, room / "one", source))}
        again = command(args.folder, room / "killed", source)
        told["files after each kill"], told["killed"] = killed(
            again, room / "killed", args.kills, random.Random(args.seed)
        )
        with cluster() as address:
            ray = ["--engine", "ray", "--address", address]
            told["on Ray"] = to_the_end(command(args.folder, room / "ray", source, *ray))
        one, two, three = (rows(room / name) for name in ("one", "killed", "ray"))
    errors = told["in one go"]["failed"]
    told |= {
        "pictures": len(one),
        "broken": len(broken),
        "same after kills": one == two,
        "same on Ray": one == three,
    }
    print(json.dumps(told, indent=1))
    if args.json:
        args.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return 0 if one == two == three and errors == len(broken) and len(set(one)) == len(one) else 1


if __name__ == "__main__":
    sys.exit(main())
