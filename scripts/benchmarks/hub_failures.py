"""How long a load takes where the network fails, with nothing cached and with all.

The table of docs/reliability.md.

    uv run scripts/benchmarks/hub_failures.py

A Hub on loopback (`tests/helpers/hub_server.py`), a small tower with random weights, real waits:
about five minutes.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.helpers.hub_server import Fault, Hub, Repository

HUB = Hub()
os.environ["HF_ENDPOINT"] = HUB.url
os.environ.pop("HF_HUB_OFFLINE", None)

import torch  # noqa: E402 (the client reads its variables when it is imported)
from huggingface_hub import constants  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from siglip_port import CheckpointError, SigLipVisionConfig, SigLipVisionModel  # noqa: E402

NAME = "google/siglip-small"
LIMIT = {"RateLimit": '"resolvers";r=0;t=20'}


def fault(kind: str, request: str = "*", **how: object) -> Callable[[], None]:
    """Every such request fails."""
    return lambda: HUB.faults.append(Fault(kind, request, times=None, **how))  # type: ignore[arg-type]


def slow() -> None:
    """One byte a second."""
    import tests.helpers.hub_server

    tests.helpers.hub_server.SLOW_CHUNK = 1
    fault("slow", "CDN *", after=0, seconds=1.0)()


def refuse() -> None:
    """Nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
    constants.HUGGINGFACE_CO_URL_TEMPLATE = url + "/{repo_id}/resolve/{revision}/{filename}"


FAILURES: dict[str, Callable[[], None]] = {
    "no connection": refuse,
    "connections are reset": fault("reset"),
    "the Hub never answers": fault("stall"),
    "a login page": fault("html"),
    "HTTP 503": fault("status", status=503),
    "HTTP 429, come back in 20 s": fault("status", status=429, headers=LIMIT),
    "HTTP 429, come back in an hour": fault("status", status=429, headers={"Retry-After": "3600"}),
    "the CDN refuses ranges (403)": fault("status", "CDN RANGE *", status=403),
    "the CDN never answers": fault("stall", "CDN *"),
    "one byte a second": slow,
}


def attempt(cache: Path) -> str:
    """Loads, and says how long that took and how it ended."""
    begun = time.monotonic()
    try:
        SigLipVisionModel.from_hf(NAME, cache_dir=cache)
        outcome = "loaded"
    except CheckpointError as error:
        outcome = f"told: {str(error).partition(' could not be fetched: ')[2].partition('; try again')[0]}"
    return f"{time.monotonic() - begun:.1f} s, {outcome}"


def main() -> None:
    """Serves, fails, loads, prints."""
    logging.disable()
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    with tempfile.TemporaryDirectory() as scratch:
        served, cached = Path(scratch, "served"), Path(scratch, "cached")
        config = SigLipVisionConfig(
            embed_dim=24, image_size=16, patch_size=8, num_attention_heads=2, mlp_hidden_dim=40
        )
        SigLipVisionModel(config).save_hf(served)
        tensors = load_file(served / "model.safetensors") | {
            "text_model.embeddings.weight": torch.ones(200_000)
        }
        save_file(tensors, served / "model.safetensors", {"format": "pt"})
        HUB.repositories[NAME] = Repository(served)
        SigLipVisionModel.from_hf(NAME, cache_dir=cached)
        print("| what fails | nothing is cached | all is cached |\n|---|---|---|")
        for number, (failure, begin) in enumerate(FAILURES.items()):
            begin()
            print(
                f"| {failure} | {attempt(Path(scratch, str(number)))} | {attempt(cached)} |",
                flush=True,
            )
            HUB.reset()
            HUB.repositories[NAME] = Repository(served)
            constants.HUGGINGFACE_CO_URL_TEMPLATE = template


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    main()
