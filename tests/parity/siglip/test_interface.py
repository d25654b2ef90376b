from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from siglip_port import SigLipVisionModel
from siglip_port.parity import randomize
from siglip_port.parity.siglip.cases import noise_images
from siglip_port.parity.siglip.interface import check_interface
from tests.helpers.checkpoints import SMALL

NAFLEX = replace(SMALL, naflex=True, image_size=24)


def make_port(naflex: bool = False) -> SigLipVisionModel:
    model = SigLipVisionModel(NAFLEX if naflex else SMALL).eval()
    randomize(model)
    return model


def messages(port: SigLipVisionModel) -> list[str]:
    gate = check_interface(port, noise_images(port.config))
    return [finding.message for finding in gate.findings]


def test_port_passes() -> None:
    gate = check_interface(make_port(), noise_images(SMALL))
    assert gate.passed
    assert gate.checked == 4


def test_headless_port_passes() -> None:
    config = replace(SMALL, pooling_head=False)
    gate = check_interface(SigLipVisionModel(config).eval(), noise_images(config))
    assert gate.passed
    assert gate.checked == 2


def test_naflex_port_passes() -> None:
    gate = check_interface(make_port(naflex=True), noise_images(NAFLEX))
    assert gate.passed
    assert gate.checked == 5


Embed = Callable[..., Tensor]


def double_embeddings(embed: Embed, x: Tensor, normalize: bool = False) -> Tensor:
    return embed(x, normalize=normalize) * 2


def never_normalize(embed: Embed, x: Tensor, normalize: bool = False) -> Tensor:
    return embed(x)


def drop_feature(embed: Embed, x: Tensor, normalize: bool = False) -> Tensor:
    return embed(x, normalize=normalize)[:, 1:]


NOT_POOLED = "embed() differs from pool(tokens)"
NOT_NORMALIZED = "embed(normalize=True) differs from pooled / ||pooled||"


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (double_embeddings, [NOT_POOLED, NOT_NORMALIZED]),
        (never_normalize, [NOT_NORMALIZED]),
        (drop_feature, [NOT_POOLED, NOT_NORMALIZED]),
    ],
)
def test_embed(
    fault: Callable[..., Tensor], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = make_port()
    embed = port.embed
    monkeypatch.setattr(port, "embed", lambda x, **options: fault(embed, x, **options))
    assert messages(port) == expected


def test_shape_of_tokens() -> None:
    port = make_port()
    port.transformer.register_forward_hook(lambda _, args, tokens: tokens[:, 1:])
    assert messages(port) == ["shape [2, 3, 24], expected [2, 4, 24]"]


def test_packed_patches() -> None:
    port = make_port(naflex=True)

    def reverse_packed(_: torch.nn.Module, args: tuple[Tensor, ...], tokens: Tensor) -> Tensor:
        return tokens.flip(1) if args[0].ndim == 3 else tokens

    port.transformer.register_forward_hook(reverse_packed)
    assert messages(port) == [
        "packed patches of an image of [16, 40] pixels: differs in float64, bound 1e-10"
    ]


def test_last_hidden_state(monkeypatch: pytest.MonkeyPatch) -> None:
    port = make_port()
    states = port.hidden_states
    monkeypatch.setattr(port, "hidden_states", lambda x, **options: states(x, **options)[::-1])
    assert messages(port) == [
        "hidden_states(layers=[1, -1], post_layernorm=True)[1] differs from the tokens"
    ]


def test_another_order_of_sums_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    port = make_port()
    embed = port.embed
    monkeypatch.setattr(port, "embed", lambda x, **options: embed(x, **options) * (1 + 1e-6))
    assert not messages(port)
