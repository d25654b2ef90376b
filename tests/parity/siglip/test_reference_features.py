"""Tests of the reference's results: they are those of transformers' own functions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from siglip_port.parity.siglip import reference, reference_features
from siglip_port.parity.siglip.entrances import models


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> reference.Reference:
    folder = tmp_path_factory.mktemp("reference")
    reference.write_random_checkpoint(folder, models.NAFLEX)
    return reference.load(folder, pooling_head=True, dtype=torch.float32, naflex=True)


def packed() -> dict[str, Tensor]:
    batches = models.batch_inputs(models.NAFLEX)
    return dict(next(inputs for _, inputs, grid in batches if grid is None))


def test_features_are_those_of_transformers(model: reference.Reference) -> None:
    inputs = packed()
    features = reference_features.compute_features(model.side(), inputs)
    model.model.set_attn_implementation("eager")
    single = {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}
    with torch.no_grad():
        output = model.model(**single, output_hidden_states=True, output_attentions=True)
    model.model.set_attn_implementation("sdpa")
    valid = inputs["pixel_attention_mask"].bool()
    for state, expected in zip(features.hidden_states, output.hidden_states, strict=True):
        torch.testing.assert_close(state[valid].float(), expected[valid])
    for weights, expected in zip(features.attentions, output.attentions, strict=True):
        rows = weights.transpose(1, 2)[valid].float()
        torch.testing.assert_close(rows, expected.transpose(1, 2)[valid])
    torch.testing.assert_close(features.normed_states[-1][valid], features.tokens[valid])


def test_rows_of_attention_sum_to_one_without_padding(model: reference.Reference) -> None:
    inputs = packed()
    features = reference_features.compute_features(model.side(), inputs)
    padding = ~inputs["pixel_attention_mask"].bool()
    for weights in (*features.attentions, features.pooling_attention[:, :, None]):
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))
        assert not weights.permute(0, 3, 1, 2)[padding].any()


def count_hooks(model: nn.Module) -> int:
    """Count the hooks of all modules; transformers has some of its own."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_reference_is_restored(model: reference.Reference) -> None:
    before = count_hooks(model.model)
    reference_features.compute_features(model.side(), packed())
    assert model.model.dtype == torch.float32
    assert count_hooks(model.model) == before


def test_saved_folder_is_read(model: reference.Reference, tmp_path: Path) -> None:
    model.model.save_pretrained(tmp_path)
    saved = reference_features.read_saved(model.side(), str(tmp_path), torch.bfloat16)
    assert saved.config["hidden_size"] == models.NAFLEX.embed_dim
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(saved.tensors[name], tensor.bfloat16())
