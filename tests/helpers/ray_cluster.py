"""Embeds images on a Ray cluster of two workers on this machine.

tests/embed/test_ray.py runs it in a separate process:

    python tests/helpers/ray_cluster.py IMAGES CHECKPOINT OUTPUT

Resumes OUTPUT/run as `siglip-port embed --executor ray` does, and writes OUTPUT/ray.json: the rows
of Ray Data with an `Embedder`, and the error of a run whose images crash their decoding process.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

# Workers use this environment, not a copy that `uv run` makes of it.
os.environ |= {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_USAGE_STATS_ENABLED": "0"}

import ray
import ray.data
from ray.cluster_utils import Cluster

from siglip_port import SigLipVisionModel
from siglip_port.embed import Embedder, EmbedError, embed
from siglip_port.embed.batches import Batch
from siglip_port.embed.inputs import find_items
from siglip_port.embed.ray import run_on_ray

OPTIONS: dict[str, Any] = {"engine": "eager", "batch_size": 4, "shard_size": 12, "threads": 2}


class DeadlyProcessor:
    """Stands in for an `ImageProcessor`; kills the decoding process."""

    backend = "pil"

    def one(self, image: object) -> NoReturn:
        """Kill this process."""
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def rows_of_ray_data(images: str, checkpoint: str) -> dict[str, list[Any]]:
    """Return error and embedding of each image, by an `Embedder` in Ray Data."""
    paths = [{"path": str(path)} for path in sorted(Path(images).glob("*/*"))]
    embedder: Any = Embedder  # Ray's type hints reject a class
    dataset = ray.data.from_items(paths).map_batches(
        embedder,
        fn_constructor_args=[checkpoint],
        fn_constructor_kwargs={"threads": 1},
        batch_size=8,
        compute=ray.data.ActorPoolStrategy(size=2),
    )
    return {row["path"]: [row["error"], row["embedding"].tolist()] for row in dataset.take_all()}


def error_of_deadly_images(images: str, model: SigLipVisionModel) -> str:
    """Return the error of a run whose images all crash their decoding process."""
    embedder = Embedder(model, threads=2, batch_size=4)
    embedder.processor = DeadlyProcessor()  # type: ignore[assignment]
    batch = Batch(0, 0, tuple(find_items([images])[1:5]))
    try:
        list(run_on_ray(embedder, [batch]))
    except EmbedError as error:
        return str(error)
    return ""


def main(images: str, checkpoint: str, output: Path) -> None:
    """Run everything on a cluster and write the report."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        cluster.add_node(num_cpus=3)
    ray.init(cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    model = SigLipVisionModel.from_hf(checkpoint)
    summary = embed([images], output / "run", model, executor="ray", **OPTIONS)
    report = {
        "processed": summary.processed,
        "failed": summary.failed,
        "embedder": rows_of_ray_data(images, checkpoint),
        "deadly": error_of_deadly_images(images, model),
    }
    (output / "ray.json").write_text(json.dumps(report))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
