from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from siglip_port.parity.metrics import relative_error
from siglip_port.parity.siglip import reference as references
from siglip_port.parity.siglip.recipes import RECIPES
from tests.helpers.checkpoints import ODD, SMALL, MakeCheckpoint, edit_tensors, pixels


def test_a_reference_with_random_parameters_is_no_reference(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint()
    edit_tensors(folder, lambda t: {k: v for k, v in t.items() if k != "head.probe"})
    with pytest.raises(
        references.BrokenReferenceError, match=r"left 1 parameters of .* beginning with head.probe"
    ):
        references.load(folder, pooling_head=True, dtype=torch.float32)


def test_a_headless_checkpoint_gives_a_headless_reference(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint(replace(SMALL, pooling_head=False))
    (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace("false", "true")
    )
    reference = references.load(folder, pooling_head=False, dtype=torch.float32)
    assert reference.side().run(pixels(SMALL).float()).keys() == {"tokens"}


def test_only_sdpa_computes_in_float64(checkpoint: MakeCheckpoint) -> None:
    """The eager attention's softmax is float32 whatever the dtype.

    A truth made with it would be wrong by 1e-8.
    """
    side = references.load(checkpoint(ODD), pooling_head=True, dtype=torch.float64).side()
    assert side.attentions[0] == "sdpa"
    outputs = {}
    for attention in side.attentions:
        side.set_attention(attention)
        outputs[attention] = side.run(pixels(ODD))["tokens"]
    assert 1e-9 < relative_error(outputs["eager"], outputs["sdpa"]) < 1e-5


def test_its_config_is_read_without_the_ports_own_table(checkpoint: MakeCheckpoint) -> None:
    reference = references.load(checkpoint(ODD), pooling_head=True, dtype=torch.float32)
    ours_alone = ("mean_pooling", "naflex", "interpolation")  # which no SiglipVisionModel has
    assert reference.config() == {
        name: value for name, value in vars(ODD).items() if name not in ours_alone
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_checkpoints_with_the_weights_of_a_recipe(tmp_path: Path, recipe: str) -> None:
    """Whatever the weights: the reference writes them, and is itself again when it is loaded.

    Seeds tell.
    """
    state = torch.get_rng_state()
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        references.write_random_checkpoint(tmp_path / name, SMALL, seed, recipe)
    assert torch.equal(torch.get_rng_state(), state)
    files = [
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "same", "other")
    ]
    assert files[0] == files[1] != files[2]


@pytest.mark.parametrize("kind", ["naflex", "resized"])
def test_towers_for_pictures_of_other_shapes(
    kind: Literal["naflex", "resized"], tmp_path: Path
) -> None:
    reference, inputs = references.small_tower(kind, tmp_path)
    outputs = reference.run(inputs)
    assert outputs["tokens"].shape == (2, 28 if kind == "naflex" else 48, 72)
    assert outputs["pooled"].shape == (2, 72)


def test_a_file_of_any_name(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint()
    (folder / "model.safetensors").rename(folder / "tower.safetensors")
    reference = references.load(
        folder / "tower.safetensors", pooling_head=True, dtype=torch.float32
    )
    assert reference.side().run(pixels(SMALL).float())["pooled"].shape == (2, 24)


def test_pictures_are_resized_as_the_checkpoint_says(tmp_path: Path) -> None:
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (40, 61, 3), dtype=np.uint8)
    )

    def made(source: Path | None = None) -> Tensor:
        return references.processors(SMALL, source)["pil"](picture)["pixel_values"]

    bicubic = made()
    assert bicubic.shape == (1, 3, 16, 16)
    assert bicubic.dtype == torch.float32
    by_hand = (
        np.asarray(picture.resize((16, 16), Image.Resampling.BICUBIC)).transpose(2, 0, 1) / 255 * 2
        - 1
    )
    np.testing.assert_allclose(bicubic[0].numpy(), by_hand, atol=1e-6)
    assert torch.equal(made(tmp_path), bicubic)  # no preprocessor_config.json there
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_processor_type": "SiglipImageProcessor", "resample": 2, "do_convert_rgb": null, '
        '"size": {"height": 99, "width": 99}}'
    )
    bilinear = made(tmp_path)
    by_hand = (
        np.asarray(picture.resize((16, 16), Image.Resampling.BILINEAR)).transpose(2, 0, 1) / 255 * 2
        - 1
    )
    np.testing.assert_allclose(bilinear[0].numpy(), by_hand, atol=1e-6)
