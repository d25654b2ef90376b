from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from siglip_port.parity.metrics import relative_error
from siglip_port.parity.siglip import reference
from siglip_port.parity.siglip.recipes import RECIPES
from tests.helpers.checkpoints import ODD, SMALL, MakeCheckpoint, edit_config, edit_tensors, pixels

ROOT = Path(__file__).parents[3]


def test_reference_with_random_parameters_raises(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint()
    edit_tensors(folder, lambda t: {k: v for k, v in t.items() if k != "head.probe"})
    message = r"initialized 1 parameters randomly, the first is head.probe; check that"
    with pytest.raises(reference.BrokenReferenceError, match=message):
        reference.load(folder, pooling_head=True, dtype=torch.float32)


def test_headless_checkpoint_gives_headless_reference(checkpoint: MakeCheckpoint) -> None:
    """`vision_use_head` in `config.json` is ignored."""
    folder = checkpoint(replace(SMALL, pooling_head=False))
    edit_config(folder, vision_use_head=True)
    side = reference.load(folder, pooling_head=False, dtype=torch.float32).side()
    assert side.run(pixels(SMALL).float()).keys() == {"tokens"}


@pytest.mark.parametrize("pooling_head", [True, False])
def test_head_of_the_file_is_loaded(pooling_head: bool, checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint(replace(SMALL, pooling_head=pooling_head))
    for stated in (True, False):
        edit_config(folder, vision_use_head=stated)
        loaded = reference.load(folder, dtype=torch.float32)
        assert loaded.config()["pooling_head"] == pooling_head
    if pooling_head:
        edit_tensors(folder, lambda t: {k: v for k, v in t.items() if k != "head.probe"})
        with pytest.raises(reference.BrokenReferenceError, match=r"the first is head\.probe"):
            reference.load(folder, dtype=torch.float32)


def test_only_sdpa_computes_in_float64(odd_checkpoint: Path) -> None:
    """The softmax of eager attention is always float32, an error of 1e-8."""
    side = reference.load(odd_checkpoint, pooling_head=True, dtype=torch.float64).side()
    assert side.attentions[0] == "sdpa"
    tokens = {}
    for attention in side.attentions:
        side.set_attention(attention)
        tokens[attention] = side.run(pixels(ODD))["tokens"]
    assert 1e-9 < relative_error(tokens["eager"], tokens["sdpa"]) < 1e-5


def test_config_is_read_without_port_table(odd_checkpoint: Path) -> None:
    fields = reference.load(odd_checkpoint, pooling_head=True, dtype=torch.float32).config()
    expected = dict(vars(ODD))
    for name in ("mean_pooling", "naflex", "interpolation"):  # not in SiglipVisionConfig
        del expected[name]
    assert fields == expected


@pytest.mark.parametrize(
    ("naflex", "nested", "kind"),
    [
        (False, True, "siglip_vision_model"),
        (False, False, "siglip_vision_model"),
        (True, True, "siglip2_vision_model"),
        (True, False, "siglip2_vision_model"),
    ],
)
def test_random_checkpoint_of_a_file(naflex: bool, nested: bool, kind: str, tmp_path: Path) -> None:
    """What the port reads into its configuration does not matter."""
    config = replace(SMALL, naflex=naflex, hidden_act="gelu", layer_norm_eps=1e-5)
    contents: dict[str, object] = reference.hf_config(config).to_dict()
    assert contents["model_type"] == kind
    if nested:
        contents = {"model_type": kind.removesuffix("_vision_model"), "vision_config": contents}
    misread = replace(config, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6)
    reference.write_random_checkpoint(tmp_path, misread, contents=contents)
    loaded = reference.load(tmp_path, pooling_head=True, dtype=torch.float32, naflex=naflex)
    assert loaded.config()["hidden_act"] == "gelu"
    assert loaded.config()["layer_norm_eps"] == 1e-5


def test_random_checkpoint_of_a_file_of_others(tmp_path: Path) -> None:
    """The port's configuration is all there is."""
    contents: dict[str, object] = {"model_cfg": {"vision_cfg": {}}}
    reference.write_random_checkpoint(tmp_path, SMALL, contents=contents)
    fields = reference.load(tmp_path, pooling_head=True, dtype=torch.float32).config()
    assert fields["embed_dim"] == SMALL.embed_dim


@pytest.mark.parametrize("recipe", RECIPES)
def test_random_checkpoint_depends_only_on_seed(tmp_path: Path, recipe: str) -> None:
    random_state = torch.get_rng_state()
    contents = {}
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        reference.write_random_checkpoint(tmp_path / name, SMALL, seed, recipe)
        contents[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert contents["one"] == contents["same"]
    assert contents["one"] != contents["other"]


def test_file_of_any_name(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint()
    file = folder / "encoder.safetensors"
    (folder / "model.safetensors").rename(file)
    side = reference.load(file, pooling_head=True, dtype=torch.float32).side()
    assert side.run(pixels(SMALL).float())["pooled"].shape == (2, 24)


IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 61, 3), dtype=np.uint8))


def process(source: Path | None = None) -> Tensor:
    """Process the image with the reference's processor for a checkpoint."""
    return reference.image_processors(SMALL, source)["pil"](IMAGE)["pixel_values"]


def resize_by_hand(resample: Image.Resampling) -> np.ndarray:
    resized = np.asarray(IMAGE.resize((16, 16), resample))
    return resized.transpose(2, 0, 1) / 255 * 2 - 1


def test_images_are_resized_by_default(tmp_path: Path) -> None:
    pixel_values = process()
    assert pixel_values.shape == (1, 3, 16, 16)
    assert pixel_values.dtype == torch.float32
    expected = resize_by_hand(Image.Resampling.BICUBIC)
    np.testing.assert_allclose(pixel_values[0].numpy(), expected, atol=1e-6)
    assert torch.equal(process(tmp_path), pixel_values)  # no preprocessor_config.json there


def test_images_are_resized_by_checkpoint_settings(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_processor_type": "SiglipImageProcessor", "resample": 2, "do_convert_rgb": null, '
        '"size": {"height": 99, "width": 99}}'
    )
    expected = resize_by_hand(Image.Resampling.BILINEAR)
    np.testing.assert_allclose(process(tmp_path)[0].numpy(), expected, atol=1e-6)


# --- releases of transformers ---------------------------------------------------------------------


@pytest.mark.parametrize("release", ["4.57.6", "5.22.1", "5.22.0.dev0", "4"])
def test_release_that_is_too_old(release: str) -> None:
    message = (
        rf"^the comparison needs transformers 5\.23 or newer, got {re.escape(release)}; "
        r"run: pip install 'siglip-port\[parity\]'$"
    )
    with pytest.raises(reference.UnsupportedReleaseError, match=message):
        reference.check_release(release)


@pytest.mark.parametrize("release", ["5.23.0", "5.23.0.dev0", "5.24", "6.0.1", "", "unknown"])
def test_release_that_is_supported_or_unknown(release: str) -> None:
    reference.check_release(release)


def test_required_release_is_that_of_the_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (requirement,) = project["project"]["optional-dependencies"]["parity"]
    assert requirement.startswith(f"transformers>={reference.required_release()},")


@pytest.mark.parametrize("path", ["NoSuchModel", "models.siglip9.NoSuchModel"])
def test_release_without_a_class(path: str) -> None:
    message = (
        rf"^transformers {reference.VERSION} has no NoSuchModel, expected that of release 5\.23; "
        r"run: pip install 'siglip-port\[parity\]'$"
    )
    with pytest.raises(reference.UnsupportedReleaseError, match=message):
        reference.library_object(path)


def test_transformers_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    message = r"^transformers cannot be imported \(.*\); run: pip install 'siglip-port\[parity\]'$"
    with pytest.raises(reference.UnsupportedReleaseError, match=message):
        reference.import_transformers.__wrapped__()


def test_incomplete_checkpoint_of_a_newer_release(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint()
    edit_config(folder, transformers_version="99.1.0.dev0")
    reference.load(folder, pooling_head=True, dtype=torch.float32)  # not refused as such
    edit_tensors(folder, lambda t: {k: v for k, v in t.items() if k != "head.probe"})
    message = (
        r"the first is head\.probe; its config\.json is of transformers 99\.1\.0\.dev0; run: "
        r"pip install 'transformers>=99\.1\.0'$"
    )
    with pytest.raises(reference.BrokenReferenceError, match=message):
        reference.load(folder, pooling_head=True, dtype=torch.float32)


def test_unreadable_checkpoint_of_a_newer_release(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint()
    edit_config(folder, transformers_version="99.1.0", num_attention_heads=[2, 2])
    message = r"transformers [\d.]+ cannot load it \(.*\); its config\.json is of transformers 99"
    with pytest.raises(reference.BrokenReferenceError, match=message):
        reference.load(folder, pooling_head=True, dtype=torch.float32)


def test_import_of_the_module_does_not_import_transformers() -> None:
    program = (
        "import sys, siglip_port.parity.siglip.verification, siglip_port.parity.siglip.reference;"
        "print('transformers' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert run.stdout == "False\n"
