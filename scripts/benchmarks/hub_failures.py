"""Time of a load when the network fails, with an empty cache and with a complete one.

    uv run scripts/benchmarks/hub_failures.py

Prints the table of docs/hub.md; takes five minutes, since waits are real. A small encoder with
random weights is loaded from a Hub on loopback (`tests/helpers/hub_server.py`).
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
    "connection reset": Fault("reset", times=None),
    "no response from the Hub": Fault("stall", times=None),
    "login page instead of the Hub": Fault("html", times=None),
    "HTTP 503": Fault("status", times=None, status=503),
    "HTTP 429, retry after 20 s": Fault("status", times=None, status=429, headers=RATE_LIMIT),
    "HTTP 429, retry after 1 h": Fault("status", times=None, status=429, headers=ONE_HOUR),
    "CDN refuses ranges (HTTP 403)": Fault("status", "CDN RANGE *", times=None, status=403),
    "no response from the CDN": Fault("stall", "CDN *", times=None),
    "CDN sends 1 byte/s": Fault("slow", "CDN *", times=None, after=0, seconds=1.0),
}


def serve(folder: Path) -> None:
    """Write a whole model: a small vision encoder and a text model."""
    config = SigLipVisionConfig(
        embed_dim=24, image_size=16, patch_size=8, num_attention_heads=2, mlp_hidden_dim=40
    )
    SigLipVisionModel(config).save_hf(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["text_model.embeddings.weight"] = torch.ones(200_000)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def attempt(cache: Path) -> str:
    """Load a model; return the time and the outcome."""
    start = time.monotonic()
    try:
        SigLipVisionModel.from_hf(NAME, cache_dir=cache)
        outcome = "loaded"
    except CheckpointError as error:
        reason = str(error).partition(": cannot download ")[2]
        outcome = f"error: {reason.partition('; try again')[0]}"
    return f"{time.monotonic() - start:.1f} s, {outcome}"


def main() -> None:
    """Load with every fault; print the table."""
    logging.disable()
    hub_server.SLOW_CHUNK = 1
    hub = Hub()
    constants.HUGGINGFACE_CO_URL_TEMPLATE = url_template(hub.url)
    constants.HF_HUB_OFFLINE = False
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "served")
        cached = Path(scratch, "cached")
        serve(folder)
        hub.repositories[NAME] = Repository(folder)
        SigLipVisionModel.from_hf(NAME, cache_dir=cached)
        print("| failure | empty cache | complete cache |\n|---|---|---|")
        for number, failure in enumerate((NO_CONNECTION, *FAULTS)):
            if failure == NO_CONNECTION:
                dead = f"http://127.0.0.1:{silent_port()}"
                constants.HUGGINGFACE_CO_URL_TEMPLATE = url_template(dead)
            else:
                hub.faults = [FAULTS[failure]]
            empty = Path(scratch, str(number))
            print(f"| {failure} | {attempt(empty)} | {attempt(cached)} |", flush=True)
            hub.reset()
            hub.repositories[NAME] = Repository(folder)
            constants.HUGGINGFACE_CO_URL_TEMPLATE = url_template(hub.url)


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    main()
