from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from siglip_port.parity import references
from siglip_port.parity.comparison import relative_error
from tests.conftest import ODD, SMALL, MakeCheckpoint, edit_tensors, pixels


def test_a_reference_with_random_parameters_is_no_reference(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint()
    edit_tensors(folder, lambda t: {k: v for k, v in t.items() if k != "head.probe"})
    with pytest.raises(references.BrokenReferenceError, match=r"left 1 parameters of .* beginning with head.probe"):
        references.load(folder, pooling_head=True, dtype=torch.float32, attention="sdpa")


def test_a_headless_checkpoint_gives_a_headless_reference(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint(replace(SMALL, pooling_head=False))
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("false", "true"))
    reference = references.load(folder, pooling_head=False, dtype=torch.float32, attention="sdpa")
    assert reference.outputs(pixels(SMALL).float()).keys() == {"tokens"}


def test_only_float64_with_sdpa_is_exact(checkpoint: MakeCheckpoint) -> None:
    """The eager attention's softmax is float32 whatever the dtype: a truth made with it would be wrong by 1e-8."""
    folder = checkpoint(ODD)
    x = pixels(ODD)
    loaded = {
        (attention, dtype): references.load(folder, pooling_head=True, dtype=dtype, attention=attention)
        for attention in ("sdpa", "eager")
        for dtype in (torch.float32, torch.float64)
    }
    assert [key for key, reference in loaded.items() if reference.is_exact] == [("sdpa", torch.float64)]
    truth = loaded["sdpa", torch.float64].outputs(x)["tokens"]
    eager = loaded["eager", torch.float64]
    assert 1e-9 < relative_error(eager.outputs(x)["tokens"], truth) < 1e-5
    assert eager.to_float64().is_exact
    assert relative_error(eager.outputs(x)["tokens"], truth) < 1e-14
    single = loaded["sdpa", torch.float32]
    assert relative_error(single.to_float64().outputs(x)["tokens"], truth) < 1e-14


def test_a_file_of_any_name(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint()
    (folder / "model.safetensors").rename(folder / "tower.safetensors")
    reference = references.load(folder / "tower.safetensors", pooling_head=True, dtype=torch.float32, attention="sdpa")
    assert reference.outputs(pixels(SMALL).float())["pooled"].shape == (2, 24)


def test_pictures_are_resized_as_the_checkpoint_says(tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 61, 3), dtype=np.uint8))
    bicubic = references.preprocess(picture, 16)
    assert bicubic.shape == (1, 3, 16, 16)
    assert bicubic.dtype == torch.float32
    by_hand = np.asarray(picture.resize((16, 16), Image.Resampling.BICUBIC)).transpose(2, 0, 1) / 255 * 2 - 1
    np.testing.assert_allclose(bicubic[0].numpy(), by_hand, atol=1e-6)
    assert torch.equal(references.preprocess(picture, 16, tmp_path), bicubic)  # no preprocessor_config.json there
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_processor_type": "SiglipImageProcessor", "resample": 2, "do_convert_rgb": null, '
        '"size": {"height": 99, "width": 99}}'
    )
    bilinear = references.preprocess(picture, 16, tmp_path)
    by_hand = np.asarray(picture.resize((16, 16), Image.Resampling.BILINEAR)).transpose(2, 0, 1) / 255 * 2 - 1
    np.testing.assert_allclose(bilinear[0].numpy(), by_hand, atol=1e-6)
