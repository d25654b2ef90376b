from __future__ import annotations

import torch

from siglip_port import SigLipVisionModel
from siglip_port.checkpoint import layouts
from siglip_port.parity.siglip.taps import siglip_taps
from siglip_port.parity.taps import Tap, expand, record
from tests.helpers.checkpoints import ODD, pixels


def taps_of_port(port: SigLipVisionModel) -> list[Tap]:
    """Return taps of the port's points."""
    return expand({point: point for point in siglip_taps(True).values()}, port, port)


def test_every_module_with_parameters_has_tap() -> None:
    port = SigLipVisionModel(ODD)
    modules = {name.rpartition(".")[0] for name, _ in port.named_parameters()}
    tapped = {tap.port.partition(":")[0] for tap in taps_of_port(port)}
    only_read = {"transformer.embeddings.position_embedding", "pooling_head"}
    assert modules - only_read <= tapped
    assert len(layouts.HUGGINGFACE_ENCODER) + len(layouts.HUGGINGFACE_HEAD) < len(siglip_taps(True))


def test_headless_model_has_no_head_taps() -> None:
    assert not any(point.startswith("head") for point in siglip_taps(False))


def test_all_taps_are_passed() -> None:
    port = SigLipVisionModel(ODD).eval()
    points = [tap.port for tap in taps_of_port(port)]
    recording = record(port, points, lambda: {"output": port.embed(pixels(ODD))})
    num_taps = 15 * ODD.num_encoder_blocks + 4 + 11
    assert len(recording.taps) == len(points) == num_taps
    assert recording.outputs["output"].dtype == torch.float32
