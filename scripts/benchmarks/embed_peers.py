"""Embeds one folder of pictures with `siglip-port embed` and with its peers, one after another, as whole processes.

    uv run --group bench scripts/benchmarks/embed_peers.py FOLDER [--count 2000] [--broken 0.01]
    [--json PATH] [--only NAME ...]

FOLDER is made by tests/helpers/sample_images.py if it is not there. All have random weights of
siglip-base-patch16-224, the same ones, and batches of 16. Peers run in environments of their own,
by `uv run --isolated`, with our release of torch; the Hub that two of them ask is one of this
script's, with these weights. Each runs twice on two pictures, where the second time says what
starting costs, then on all; and again without the broken ones, if those stopped it.
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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from siglip_port import SigLipVisionConfig, SigLipVisionModel
from siglip_port.parity import randomise
from tests.helpers.hub_server import Hub, Repository
from tests.helpers.sample_images import make

BATCH, FEW = 16, 2
TRUTH = "siglip-port, eager"
OPEN_CLIP = "ViT-B-16-SigLIP"

Vectors = dict[str, NDArray[np.float64]]
"""By a picture's name."""


@dataclass(frozen=True)
class Peer:
    """What embeds a folder.

    Attributes:
        name: for people.
        packages: with versions; empty for ours, which runs in this environment.
        command: of the folder of weights, the pictures, the output.
        read: what it has written, of the output.
        remark: what is particular about how it runs here.
    """

    name: str
    packages: tuple[str, ...]
    command: Callable[[Path, Path, Path], Sequence[str]]
    read: Callable[[Path], Vectors]
    remark: str = ""


@dataclass
class Run:
    """A process that has ended.

    Attributes:
        seconds: from start to end.
        code: its exit code; None where it was stopped because it took too long.
        error: the last line that it wrote to stderr.
        vectors: what it left.
    """

    seconds: float
    code: int | None
    error: str
    vectors: Vectors


@dataclass
class Row:
    """What is known of a peer.

    Attributes:
        name: of the peer.
        packages: which it ran with.
        start: seconds of a run on `FEW` pictures.
        seconds: of the run that counts.
        pictures: of that run.
        rate: pictures a second, without the start.
        rows: vectors that the run on all pictures left, those that are NaN included.
        broken: what became of the broken ones.
        cosine: median and least, with ours, of the pictures that both have; and how many are below
            0.99.
        remark: of the peer; or why there is nothing.
    """

    name: str
    packages: tuple[str, ...]
    start: float = float("nan")
    seconds: float = float("nan")
    pictures: int = 0
    rate: float = float("nan")
    rows: int = 0
    broken: str = ""
    cosine: tuple[float, float, int] | None = None
    remark: str = ""


# --- the weights ----------------------------------------------------------------------------------


def write_weights(place: Path) -> None:
    """The same tower four times.

    Ours, timm's, and inside whole models of transformers and open_clip.
    """
    model = SigLipVisionModel(SigLipVisionConfig(pooling_head=True)).eval()
    randomise(model, seed=0)
    model.save_hf(place / "hf")
    model.save_timm(place / "timm")
    torch.manual_seed(0)
    write_transformers(place)
    write_open_clip(place)


def write_transformers(place: Path) -> None:
    """A SiglipModel, as sentence-transformers wants it.

    Of a tower alone it takes the mean of the tokens.
    """
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel, SiglipVisionModel

    tower = SiglipVisionModel.from_pretrained(place / "hf")
    whole = SiglipModel(SiglipConfig(vision_config=tower.config.to_dict()))
    whole.vision_model.load_state_dict(
        {name.removeprefix("vision_model."): tensor for name, tensor in tower.state_dict().items()}
    )
    whole.save_pretrained(place / "whole")
    SiglipImageProcessor.from_pretrained(place / "hf").save_pretrained(place / "whole")
    write_tokenizer(place / "whole")


def write_open_clip(place: Path) -> None:
    """A repository of open_clip's, whose configuration names timm's folder, so that GELU is the tanh form."""
    import open_clip
    import timm
    from safetensors.torch import save_file

    whole, folder = open_clip.create_model(OPEN_CLIP, pretrained=None), place / "open_clip"
    tower = timm.create_model(f"local-dir:{place / 'timm'}", pretrained=True, num_classes=0)
    whole.visual.trunk.load_state_dict(tower.state_dict())
    folder.mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in whole.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors")
    config = open_clip.get_model_config(OPEN_CLIP)
    config["vision_cfg"]["timm_model_name"] = f"local-dir:{place / 'timm'}"
    pixels = {
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
        "resize_mode": "squash",
    }
    about = {"model_cfg": config, "preprocess_cfg": pixels}
    (folder / "open_clip_config.json").write_text(json.dumps(about), encoding="utf-8")
    write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    """One of three words: no text matters here, but peers do not start without."""
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64,
        "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>",
    }  # fmt: skip
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": model,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")


# --- the peers ------------------------------------------------------------------------------------


def ours(*options: str) -> Callable[[Path, Path, Path], Sequence[str]]:
    """`siglip-port embed`, with some options."""
    program = str(Path(sys.executable).with_name("siglip-port"))
    return lambda weights, pictures, out: [
        program, "embed", str(pictures), "--out", str(out), "--model", str(weights / "hf"), *options
    ]  # fmt: skip


def read_ours(out: Path) -> Vectors:
    """Rows with an error are NaN."""
    from pyarrow import parquet

    rows = [
        row
        for path in sorted(out.glob("part-*.parquet"))
        for row in parquet.read_table(path).to_pylist()
    ]
    return {row["id"]: np.array(row["embedding"], float) for row in rows}


SENTENCE_TRANSFORMERS = """
import sys, numpy, pathlib, sentence_transformers
model, folder, out = sys.argv[1:]
paths = sorted(str(path) for path in pathlib.Path(folder).iterdir())
vectors = sentence_transformers.SentenceTransformer(model, device="cpu").encode(paths, batch_size=16)
numpy.savez(out, paths=paths, vectors=vectors)
"""
"""It has no command, so this is the program that its manual suggests. It opens the paths itself."""


def sentence_transformers(weights: Path, pictures: Path, out: Path) -> Sequence[str]:
    """The program above."""
    return [
        "python",
        "-c",
        SENTENCE_TRANSFORMERS,
        str(weights / "whole"),
        str(pictures),
        f"{out}.npz",
    ]


def read_sentence_transformers(out: Path) -> Vectors:
    """One file, at the end."""
    with np.load(f"{out}.npz") as found:
        return {
            Path(path).name: vector
            for path, vector in zip(found["paths"], found["vectors"], strict=True)
        }


def dinotool(weights: Path, pictures: Path, out: Path) -> Sequence[str]:
    """Vectors of whole pictures alone, no visualisation."""
    return [
        "dinotool", str(pictures), "--output", str(out), "--model-name", f"hf-hub:timm/{OPEN_CLIP}",
        *("--save-features", "frame", "--no-vis", "--input-size", "224", "224", "--batch-size", str(BATCH)),
    ]  # fmt: skip


def read_dinotool(out: Path) -> Vectors:
    """One folder of parquet files, at the end."""
    from pyarrow import parquet

    rows = parquet.read_table(out.with_suffix(".parquet")).to_pandas()
    return {
        str(name): vector for name, vector in zip(rows.index, rows.to_numpy(float), strict=True)
    }


def clip_retrieval(weights: Path, pictures: Path, out: Path) -> Sequence[str]:
    """Pictures alone, and as many processes to decode as there are processors, as ours has.

    What it imports of setuptools, to compare versions, is in no release of it that our torch
    accepts: a stand-in.
    """
    (weights / "shim").mkdir(exist_ok=True)
    (weights / "shim" / "pkg_resources.py").write_text(
        "import packaging.version\n", encoding="utf-8"
    )
    return [
        *("env", f"PYTHONPATH={weights / 'shim'}"),
        "clip-retrieval", "inference", "--input_dataset", str(pictures), "--output_folder", str(out),
        *("--clip_model", f"open_clip:{OPEN_CLIP}/{weights / 'open_clip' / 'open_clip_model.safetensors'}"),
        *("--batch_size", str(BATCH), "--num_prepro_workers", str(len(os.sched_getaffinity(0)))),
        *("--enable_text", "False"),
    ]  # fmt: skip


def read_clip_retrieval(out: Path) -> Vectors:
    """Arrays, and parquet files with the names beside them."""
    from pyarrow import parquet

    found: Vectors = {}
    for path in sorted((out / "img_emb").glob("*.npy")):
        names = parquet.read_table(
            out / "metadata" / f"metadata_{path.stem.rpartition('_')[2]}.parquet"
        )
        paths = names.column("image_path").to_pylist()
        found |= {
            Path(p).name: vector.astype(float)
            for p, vector in zip(paths, np.load(path), strict=True)
        }
    return found


PEERS = (
    Peer(TRUTH, (), ours("--form", "eager"), read_ours),
    Peer("siglip-port, onnxruntime", (), ours("--form", "onnxruntime"), read_ours),
    Peer(
        "sentence-transformers", ("sentence-transformers[image]==6.2.0",), sentence_transformers,
        read_sentence_transformers, "a SiglipModel from a folder; of a tower alone it takes the mean of the tokens",
    ),
    Peer(
        "dinotool", ("dinotool==0.4.0",), dinotool, read_dinotool,
        "open_clip's model from our own Hub, since it takes Hub ids of timm's alone; vectors of "
        "unit length",
    ),
    Peer(
        "clip-retrieval", ("clip-retrieval==2.45.0",), clip_retrieval, read_clip_retrieval,
        "a stand-in for pkg_resources; with a local file open_clip takes CLIP's mean, deviation "
        "and crop; float16",
    ),
)  # fmt: skip


# --- the measurement ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """Where things are.

    Attributes:
        place: a folder for all that is written.
        environment: variables of all processes.
        patience: seconds that a process may take.
    """

    place: Path
    environment: Mapping[str, str]
    patience: float

    def run(self, peer: Peer, pictures: Path) -> Run:
        """Embeds a folder in a process, whose whole family ends with it."""
        out, log = Path(tempfile.mkdtemp(dir=self.place)) / "out", self.place / "log"
        command = [*isolated(peer.packages), *peer.command(self.place, pictures, out)]
        started = time.perf_counter()
        with log.open("w+", encoding="utf-8", errors="replace") as said:
            process = subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                stderr=said,
                env=self.environment,
                start_new_session=True,
            )
            try:
                code: int | None = process.wait(self.patience)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        seconds = time.perf_counter() - started
        try:
            vectors = peer.read(out)
        except (OSError, KeyError, ValueError):
            vectors = {}
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        error = next(
            (line.strip() for line in reversed(lines) if _is_error(line)),
            lines[-1].strip() if lines else "",
        )
        shutil.rmtree(out.parent)
        return Run(seconds, code, error, vectors)


def _is_error(line: str) -> bool:
    return not line.startswith(" ") and line.partition(":")[0].endswith(("Error", "Exception"))


def isolated(packages: Sequence[str]) -> list[str]:
    """The beginning of a command that runs in an environment of these packages, and of our release of torch."""
    if not packages:
        return []
    release = importlib.metadata.version("torch").partition("+")[0]
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    needed = [f"--with={package}" for package in (*packages, f"torch=={release}")]
    return ["uv", "run", "--quiet", "--isolated", "--no-project", "--python", python, *needed, "--"]


def linked(place: Path, sources: Iterable[tuple[str, Path]]) -> Path:
    """A folder of links: flat, and with names that are no numbers, since dinotool takes other folders for videos."""
    place.mkdir()
    for name, source in sources:
        (place / name).symlink_to(source.resolve())
    return place


def measure(
    bench: Bench, peer: Peer, folders: Mapping[str, Path], truth: Vectors
) -> tuple[Row, Vectors]:
    """Runs a peer; returns its row, and its vectors of good pictures."""
    row = Row(peer.name, peer.packages, remark=peer.remark)
    for _ in range(2):  # the first time fills caches
        few = bench.run(peer, folders["few"])
        if few.code != 0 or len(few.vectors) != FEW:
            row.remark = f"does not run here: {ending(few)}"
            return row, {}
    row.start = few.seconds
    good = {path.name for path in folders["good"].iterdir()}
    run, count = bench.run(peer, folders["all"]), len(list(folders["all"].iterdir()))
    row.rows, row.broken = len(run.vectors), outcome(run, good, count)
    if not good <= run.vectors.keys():
        run, count = bench.run(peer, folders["good"]), len(good)
        row.broken += f"; without them: {outcome(run, good, count)}"
    if not good <= run.vectors.keys():
        return row, {}
    row.seconds, row.pictures, row.rate = (
        run.seconds,
        count,
        (count - FEW) / (run.seconds - row.start),
    )
    vectors = {name: run.vectors[name] for name in good}
    row.cosine = agreement(vectors, truth or vectors)
    return row, vectors


def ending(run: Run) -> str:
    """How a run ended that did not do its work."""
    if run.code is None:
        return f"not ready after {run.seconds:.0f} s, and ended then, {len(run.vectors)} rows: {run.error}"
    return f"stopped, exit code {run.code}, {len(run.vectors)} rows: {run.error}"


def outcome(run: Run, good: set[str], count: int) -> str:
    """What became of the broken pictures of a run on all, in words."""
    if run.code is None or not good <= run.vectors.keys():
        return ending(run)
    if count == len(good):
        return "runs"
    told = sum(not np.isfinite(vector).all() for vector in run.vectors.values())
    missing = count - len(run.vectors)
    return f"{told} rows with an error, {missing} rows missing, exit code {run.code}"


def agreement(vectors: Vectors, truth: Vectors) -> tuple[float, float, int]:
    """Cosines of vectors of the same pictures: median, least, and how many are below 0.99."""
    pairs = [(vectors[name], truth[name]) for name in sorted(truth)]
    found = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in pairs]
    return statistics.median(found), min(found), sum(cosine < 0.99 for cosine in found)


# --- the report -----------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """For people."""
    lines = [
        "| | seconds (of them start) | pictures a second after the start | rows | the broken ones "
        "| cosine with ours: "
        "median, least, below 0.99 | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cosine = "{:.6f}, {:.3f}, {}".format(*row.cosine) if row.cosine else ""
        times = f"{row.seconds:.1f} ({row.start:.1f})" if row.cosine else ""
        rate = f"{row.rate:.2f}" if row.cosine else ""
        name = " ".join((row.name, *(package.partition("==")[2] for package in row.packages[:1])))
        broken, remark = row.broken.replace("|", "/"), row.remark.replace("|", "/")
        lines.append(
            f"| {name} | {times} | {rate} | {row.rows or ''} | {broken} | {cosine} | {remark} |"
        )
    return "\n".join(lines)


def environment(pictures: int, broken: Mapping[str, str]) -> dict[str, Any]:
    """On what it was measured."""
    return {
        "date": date.today().isoformat(), "command": " ".join(["scripts/benchmarks/embed_peers.py", *sys.argv[1:]]),
        "machine": f"{platform.system()} {platform.machine()}", "processors": len(os.sched_getaffinity(0)),
        "python": platform.python_version(), "torch": importlib.metadata.version("torch"),
        "model": "siglip-base-patch16-224, random weights", "batch_size": BATCH, "pictures": pictures,
        "broken": dict(broken), "load": os.getloadavg(),
    }  # fmt: skip


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of pictures, made if it is not there")
    parser.add_argument("--count", type=int, default=2000, help="pictures to make (%(default)s)")
    parser.add_argument(
        "--broken", type=float, default=0.01, help="share of them that is broken (%(default)s)"
    )
    parser.add_argument(
        "--patience", type=float, default=3600, help="seconds that a process may take (%(default)s)"
    )
    parser.add_argument("--json", type=Path, help="where to write all figures")
    names = [peer.name for peer in PEERS if peer.name != TRUTH]
    parser.add_argument(
        "--only", nargs="+", choices=names, help="these, beside ours in eager form, which all need"
    )
    return parser.parse_args()


def main() -> int:
    """Measures one after another, and prints a table."""
    args = arguments()
    if not args.folder.exists():
        make(args.folder, args.count, args.broken, seed=0)
    broken = json.loads((args.folder / "broken.json").read_text(encoding="utf-8"))
    paths = {
        path.relative_to(args.folder).as_posix(): path for path in sorted(args.folder.rglob("*.*"))
    }
    del paths["broken.json"]
    every = [(name.replace("/", "-"), path) for name, path in paths.items()]
    good = [(name.replace("/", "-"), path) for name, path in paths.items() if name not in broken]
    rows, truth = list[Row](), Vectors()
    with tempfile.TemporaryDirectory(prefix="siglip_port-") as folder:
        place, hub = Path(folder), Hub()
        write_weights(place)
        hub.repositories[f"timm/{OPEN_CLIP}"] = Repository(place / "open_clip")
        variables = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(place / "cache"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        bench = Bench(place, {**os.environ, **variables}, args.patience)
        sets = {"all": every, "good": good, "few": good[:FEW]}
        folders = {name: linked(place / name, sources) for name, sources in sets.items()}
        for peer in PEERS:
            if args.only and peer.name not in (TRUTH, *args.only):
                continue
            row, vectors = measure(bench, peer, folders, truth)
            truth = truth or vectors
            rows.append(row)
            print(table(rows[-1:]).splitlines()[-1], file=sys.stderr)
    print(table(rows))
    if args.json:
        report = {
            "environment": environment(len(every), broken),
            "rows": [asdict(row) for row in rows],
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
