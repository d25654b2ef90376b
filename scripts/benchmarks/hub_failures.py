"""How long a load takes where the network fails, with nothing cached and with all.

The table of docs/reliability.md.

    uv run scripts/benchmarks/hub_failures.py

A Hub on loopback (`tests/helpers/hub_server.py`), a small encoder with random weights, real waits:
about five minutes.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from pathlib import Path

import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from siglip_port import CheckpointError, SigLipVisionConfig, SigLipVisionModel
from tests.helpers import hub_server
from tests.helpers.hub_server import Fault, Hub, Repository
from tests.helpers.network import silent_port, url_template

NAME = "google/siglip-small"

RATE_LIMIT = {"RateLimit": '"resolvers";r=0;t=20'}
ONE_HOUR = {"Retry-After": "3600"}

NO_CONNECTION = "no connection"
FAULTS = {
    "connections are reset": Fault("reset", times=None),
    "the Hub never answers": Fault("stall", times=None),
    "a login page": Fault("html", times=None),
    "HTTP 503": Fault("status", times=None, status=503),
    "HTTP 429, come back in 20 s": Fault("status", times=None, status=429, headers=RATE_LIMIT),
    "HTTP 429, come back in an hour": Fault("status", times=None, status=429, headers=ONE_HOUR),
    "the CDN refuses ranges (403)": Fault("status", "CDN RANGE *", times=None, status=403),
    "the CDN never answers": Fault("stall", "CDN *", times=None),
    "one byte a second": Fault("slow", "CDN *", times=None, after=0, seconds=1.0),
}


def serve(folder: Path) -> None:
    """Write a whole model: a small vision encoder, and what is beside it."""
    config = SigLipVisionConfig(
        embed_dim=24, image_size=16, patch_size=8, num_attention_heads=2, mlp_hidden_dim=40
    )
    SigLipVisionModel(config).save_hf(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["text_model.embeddings.weight"] = torch.ones(200_000)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def attempt(cache: Path) -> str:
    """Load, and say how long that took and how it ended."""
    start = time.monotonic()
    try:
        SigLipVisionModel.from_hf(NAME, cache_dir=cache)
        outcome = "loaded"
    except CheckpointError as error:
        reason = str(error).partition(" could not be fetched: ")[2]
        outcome = f"told: {reason.partition('; try again')[0]}"
    return f"{time.monotonic() - start:.1f} s, {outcome}"


def main() -> None:
    """Serve, fail, load, print."""
    logging.disable()
    hub_server.SLOW_CHUNK = 1
    hub = Hub()
    constants.HUGGINGFACE_CO_URL_TEMPLATE = url_template(hub.url)
    constants.HF_HUB_OFFLINE = False
    with tempfile.TemporaryDirectory() as scratch:
        served = Path(scratch, "served")
        cached = Path(scratch, "cached")
        serve(served)
        hub.repositories[NAME] = Repository(served)
        SigLipVisionModel.from_hf(NAME, cache_dir=cached)
        print("| what fails | nothing is cached | all is cached |\n|---|---|---|")
        for number, failure in enumerate((NO_CONNECTION, *FAULTS)):
            if failure == NO_CONNECTION:
                dead = f"http://127.0.0.1:{silent_port()}"
                constants.HUGGINGFACE_CO_URL_TEMPLATE = url_template(dead)
            else:
                hub.faults = [FAULTS[failure]]
            empty = Path(scratch, str(number))
            print(f"| {failure} | {attempt(empty)} | {attempt(cached)} |", flush=True)
            hub.reset()
            hub.repositories[NAME] = Repository(served)
            constants.HUGGINGFACE_CO_URL_TEMPLATE = url_template(hub.url)


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    main()
