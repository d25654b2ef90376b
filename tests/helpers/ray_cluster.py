"""Run by tests/embed/test_ray.py in a process of its own.

A Ray cluster of two workers on this machine.

    python tests/helpers/ray_cluster.py PICTURES CHECKPOINT OUT

Goes on with OUT/run as `siglip-port embed --engine ray` does; writes down what Ray Data gets of an
`Embedder`, and how a run ends whose pictures kill the process that decodes them.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

# Workers run in this environment, not in one that `uv run` makes of a copy of this folder.
os.environ |= {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_USAGE_STATS_ENABLED": "0"}

import ray
import ray.data
from ray.cluster_utils import Cluster

from siglip_port import SigLipVisionModel
from siglip_port.embed.embedder import Embedder
from siglip_port.embed.inputs import find_items
from siglip_port.embed.ray import on_ray
from siglip_port.embed.run import Batch, EmbedError, embed

HOW = {"form": "eager", "batch_size": 4, "shard_size": 12, "threads": 2}


class Deadly:
    """In place of a processor: pictures that kill the process that decodes them."""

    backend = "pil"

    def one(self, picture: object) -> NoReturn:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def main(pictures: str, checkpoint: str, out: Path) -> None:
    """See above."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        cluster.add_node(num_cpus=3)
    ray.init(cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    model = SigLipVisionModel.from_hf(checkpoint)
    done = embed([pictures], out / "run", model, engine="ray", **HOW)  # type: ignore[arg-type]
    files = [{"path": str(path)} for path in sorted(Path(pictures).glob("*/*"))]
    rows = (
        ray.data.from_items(files)
        .map_batches(
            Embedder,
            fn_constructor_args=[checkpoint],
            fn_constructor_kwargs={"threads": 1},
            batch_size=8,
            compute=ray.data.ActorPoolStrategy(size=2),
        )
        .take_all()
    )
    found = {row["path"]: [row["error"], row["embedding"].tolist()] for row in rows}
    deadly = Embedder(model, threads=2, batch_size=4)
    deadly.processor = Deadly()  # type: ignore[assignment]
    error = ""
    try:
        list(on_ray(deadly, [Batch(0, 0, tuple(find_items([pictures])[1:5]))]))
    except EmbedError as found_out:
        error = str(found_out)
    told = {"fresh": done.fresh, "failed": done.failed, "embedder": found, "deadly": error}
    (out / "ray.json").write_text(json.dumps(told))
    ray.shutdown()
    cluster.shutdown()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
