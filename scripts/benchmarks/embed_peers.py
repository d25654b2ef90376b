"""Compares `siglip-port embed` with other programs on one folder of images.

    uv run --group bench scripts/benchmarks/embed_peers.py FOLDER [--count 2000] [--broken 0.01]
    [--json PATH] [--only NAME ...]

tests/helpers/sample_images.py creates FOLDER if it does not exist. Each program is a process with
the same random weights of siglip-base-patch16-224 and batches of 16. Peers run in isolated
environments (`uv run --isolated`) with this release of torch; two of them load the weights from a
local Hub server. Each program runs twice on two images (the second run measures the startup time),
then on all images, and again without the broken ones if those stopped it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from scripts.benchmarks.embed_peer_programs import (
    BASELINE,
    BATCH_SIZE,
    OPEN_CLIP_MODEL,
    PEERS,
    Peer,
    Vectors,
    write_weights,
)
from tests.helpers.hub_server import Hub, Repository
from tests.helpers.sample_images import write_images

FEW = 2
"""Number of images of the runs that measure the startup time."""

MIN_COSINE = 0.99


@dataclass
class Run:
    """Result of a process.

    Attributes:
        seconds: wall time.
        code: exit code; None after a timeout.
        error: last error line of stderr.
        vectors: embeddings in its output.
    """

    seconds: float
    code: int | None
    error: str
    vectors: Vectors


@dataclass
class Row:
    """Measurements of a program. The attributes are also the keys of the JSON file.

    Attributes:
        name: name of the program.
        packages: its packages.
        start: startup time in seconds: a run on `FEW` images.
        seconds: wall time of the measured run.
        num_images: images of that run.
        rate: images per second, without the startup.
        rows: embeddings written by the run on all images, including NaN.
        broken: outcome for the broken images.
        cosine: cosine similarity with siglip-port over common images: median, minimum, number
            below `MIN_COSINE`.
        remark: deviations of its setup, or the reason for missing results.
    """

    name: str
    packages: tuple[str, ...]
    start: float = float("nan")
    seconds: float = float("nan")
    num_images: int = 0
    rate: float = float("nan")
    rows: int = 0
    broken: str = ""
    cosine: tuple[float, float, int] | None = None
    remark: str = ""


# --- the measurement ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """Environment of the measurements.

    Attributes:
        folder: temporary folder for weights and outputs.
        environment: environment variables of all processes.
        timeout: timeout of a process in seconds.
    """

    folder: Path
    environment: Mapping[str, str]
    timeout: float

    def run(self, peer: Peer, images: Path) -> Run:
        """Embed a folder in a process; kill its process group at the end."""
        output = Path(tempfile.mkdtemp(dir=self.folder)) / "output"
        log = self.folder / "log"
        command = [*isolated_command(peer.packages), *peer.command(self.folder, images, output)]
        start = time.perf_counter()
        code = self.wait(command, log)
        seconds = time.perf_counter() - start
        try:
            vectors = peer.read(output)
        except (OSError, KeyError, ValueError):
            vectors = {}
        shutil.rmtree(output.parent)
        return Run(seconds, code, last_error(log), vectors)

    def wait(self, command: Sequence[str], log: Path) -> int | None:
        """Run a command; return its exit code, or None after a timeout."""
        with log.open("w+", encoding="utf-8", errors="replace") as stderr:
            process = subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env=self.environment,
                start_new_session=True,
            )
            try:
                return process.wait(self.timeout)
            except subprocess.TimeoutExpired:
                return None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def last_error(log: Path) -> str:
    """Return the last line that names an error, or else the last line."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    for line in reversed(lines):
        name = line.partition(":")[0]
        if not line.startswith(" ") and name.endswith(("Error", "Exception")):
            return line.strip()
    return lines[-1].strip() if lines else ""


def isolated_command(packages: Sequence[str]) -> list[str]:
    """Return the prefix of a command that runs with these packages and this release of torch."""
    if not packages:
        return []
    release = importlib.metadata.version("torch").partition("+")[0]
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    requirements = [f"--with={package}" for package in (*packages, f"torch=={release}")]
    options = ["--quiet", "--isolated", "--no-project", "--python", python, *requirements]
    return ["uv", "run", *options, "--"]


def link_images(folder: Path, sources: Iterable[tuple[str, Path]]) -> Path:
    """Create a flat folder of links; dinotool treats folders of numbered images as videos."""
    folder.mkdir()
    for name, source in sources:
        (folder / name).symlink_to(source.resolve())
    return folder


def measure(
    bench: Bench, peer: Peer, folders: Mapping[str, Path], baseline: Vectors
) -> tuple[Row, Vectors]:
    """Run a program; return its row, and its embeddings of the images that are not broken.

    Args:
        bench: environment of the measurements.
        peer: program to run.
        folders: folders of the `few`, `all` and `good` images.
        baseline: embeddings to compare with; empty to compare with its own.
    """
    row = Row(peer.name, peer.packages, remark=peer.remark)
    for _ in range(2):  # the first run fills caches
        startup = bench.run(peer, folders["few"])
        if startup.code != 0 or len(startup.vectors) != FEW:
            row.remark = f"does not run: {describe_failure(startup)}"
            return row, {}
    row.start = startup.seconds
    intact = {path.name for path in folders["good"].iterdir()}
    row.num_images = len(list(folders["all"].iterdir()))
    run = bench.run(peer, folders["all"])
    row.rows = len(run.vectors)
    row.broken = describe_outcome(run, intact, row.num_images)
    if not intact <= run.vectors.keys():
        row.num_images = len(intact)
        run = bench.run(peer, folders["good"])
        row.broken += f"; without them: {describe_outcome(run, intact, row.num_images)}"
    if not intact <= run.vectors.keys():
        row.num_images = 0
        return row, {}
    row.seconds = run.seconds
    row.rate = (row.num_images - FEW) / (run.seconds - row.start)
    vectors = {name: run.vectors[name] for name in intact}
    row.cosine = compare_vectors(vectors, baseline or vectors)
    return row, vectors


def describe_failure(run: Run) -> str:
    """Describe the end of a failed run."""
    rows = f"{len(run.vectors)} rows"
    if run.code is None:
        return f"timeout after {run.seconds:.0f} s, {rows}: {run.error}"
    return f"stopped, exit code {run.code}, {rows}: {run.error}"


def describe_outcome(run: Run, intact: set[str], count: int) -> str:
    """Describe the outcome of a run on all images, in particular the broken ones."""
    if run.code is None or not intact <= run.vectors.keys():
        return describe_failure(run)
    if count == len(intact):
        return "runs"
    errors = sum(not np.isfinite(vector).all() for vector in run.vectors.values())
    missing = count - len(run.vectors)
    return f"{errors} rows with an error, {missing} rows missing, exit code {run.code}"


def compare_vectors(vectors: Vectors, baseline: Vectors) -> tuple[float, float, int]:
    """Return median and minimum of the cosine similarity, and the number below `MIN_COSINE`."""
    cosines = []
    for name, expected in sorted(baseline.items()):
        vector = vectors[name]
        lengths = np.linalg.norm(vector) * np.linalg.norm(expected)
        cosines.append(float(vector @ expected / lengths))
    low = sum(cosine < MIN_COSINE for cosine in cosines)
    return statistics.median(cosines), min(cosines), low


# --- the report -----------------------------------------------------------------------------------

HEADER = """\
| | seconds (of which startup) | images per second after startup | rows | broken images \
| cosine with siglip-port: median, minimum, below 0.99 | |
|---|---|---|---|---|---|---|"""


def format_row(row: Row) -> str:
    """Format the row of a program as Markdown."""
    cosine, seconds, rate = "", "", ""
    if row.cosine:
        cosine = "{:.6f}, {:.3f}, {}".format(*row.cosine)
        seconds = f"{row.seconds:.1f} ({row.start:.1f})"
        rate = f"{row.rate:.2f}"
    name = row.name
    for package in row.packages[:1]:
        name += f" {package.partition('==')[2]}"
    cells = [name, seconds, rate, row.rows or "", row.broken, cosine, row.remark]
    return "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |"


def environment(images: int, broken: Mapping[str, str]) -> dict[str, Any]:
    """Describe machine, versions and data of the measurements."""
    return {
        "date": date.today().isoformat(),
        "command": " ".join(["scripts/benchmarks/embed_peers.py", *sys.argv[1:]]),
        "machine": f"{platform.system()} {platform.machine()}",
        "processors": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "model": "siglip-base-patch16-224, random weights",
        "batch_size": BATCH_SIZE,
        "num_images": images,
        "broken": dict(broken),
        "load": os.getloadavg(),
    }


# --- the command ----------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="Folder of images; created if missing.")
    parser.add_argument(
        "--count", type=int, default=2000, help="Images to create. [default: %(default)s]"
    )
    parser.add_argument(
        "--broken", type=float, default=0.01, help="Share of broken images. [default: %(default)s]"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=3600,
        help="Timeout per process in seconds. [default: %(default)s]",
    )
    parser.add_argument("--json", type=Path, help="JSON file for the metrics.")
    names = [peer.name for peer in PEERS if peer.name != BASELINE]
    parser.add_argument(
        "--only",
        nargs="+",
        choices=names,
        help="Programs to compare with siglip-port, eager. [default: all]",
    )
    return parser.parse_args()


@contextlib.contextmanager
def prepare(timeout: float) -> Iterator[Bench]:
    """Write the weights and serve them as a Hub."""
    with tempfile.TemporaryDirectory(prefix="siglip_port-") as name:
        folder = Path(name)
        write_weights(folder)
        hub = Hub()
        hub.repositories[f"timm/{OPEN_CLIP_MODEL}"] = Repository(folder / "open_clip")
        variables = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(folder / "cache"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        yield Bench(folder, {**os.environ, **variables}, timeout)


def measure_peers(
    bench: Bench, peers: Sequence[Peer], images: Mapping[str, Path], broken: Mapping[str, str]
) -> list[Row]:
    """Measure programs one after another.

    Args:
        bench: environment of the measurements.
        peers: programs; the others are compared with the first.
        images: image name -> path.
        broken: broken images: name -> kind of damage.
    """
    all_images = [(name.replace("/", "-"), path) for name, path in images.items()]
    intact = [(name.replace("/", "-"), path) for name, path in images.items() if name not in broken]
    folders = {}
    for name, sources in (("all", all_images), ("good", intact), ("few", intact[:FEW])):
        folders[name] = link_images(bench.folder / name, sources)
    rows = []
    baseline: Vectors = {}
    for peer in peers:
        row, vectors = measure(bench, peer, folders, baseline)
        baseline = baseline or vectors
        rows.append(row)
        print(format_row(row), file=sys.stderr)
    return rows


def main() -> int:
    """Measure programs one after another and print a table."""
    args = parse_arguments()
    if not args.folder.exists():
        write_images(args.folder, args.count, args.broken, seed=0)
    broken = json.loads((args.folder / "broken.json").read_text(encoding="utf-8"))
    images = {}
    for path in sorted(args.folder.rglob("*.*")):
        images[path.relative_to(args.folder).as_posix()] = path
    del images["broken.json"]
    peers: Sequence[Peer] = PEERS
    if args.only:
        peers = [peer for peer in PEERS if peer.name in (BASELINE, *args.only)]
    with prepare(args.timeout) as bench:
        rows = measure_peers(bench, peers, images, broken)
    print("\n".join([HEADER, *map(format_row, rows)]))
    if args.json:
        report = {
            "environment": environment(len(images), broken),
            "rows": [asdict(row) for row in rows],
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
