"""big_vision's `.npz` files, written by the transforms of its converters, not by the key map."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from siglip_port import CheckpointError, SigLipVisionModel
from siglip_port.parity.metrics import relative_error
from siglip_port.parity.stress_weights import randomize
from tests.helpers.checkpoints import ODD, pixels
from tests.helpers.flax import flax, save_arrays, write_npz
from tests.helpers.other_libraries import timm_encoder

load = SigLipVisionModel.from_hf


@pytest.mark.parametrize("root", ["params/img/", "img/"])
@pytest.mark.parametrize("scanned", [False, True], ids=["indexed", "scanned"])
@pytest.mark.parametrize("naflex", [False, True], ids=["fixed", "naflex"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_big_vision(root: str, scanned: bool, naflex: bool, dtype: str, tmp_path: Path) -> None:
    # Without a configuration file, the image size is six patches of seven pixels.
    config = replace(ODD, naflex=naflex, image_size=42)
    original = SigLipVisionModel(config)
    randomize(original)
    original = original.to(getattr(torch, dtype)).float()
    path = tmp_path / "encoder.npz"
    write_npz(path, flax(config, original.state_dict(), scanned=scanned), root, dtype)
    model = load(path)
    assert model.config == config
    assert next(model.parameters()).dtype == getattr(torch, dtype)
    state = model.state_dict()
    assert all(torch.equal(state[name].float(), t) for name, t in original.state_dict().items())
    assert model.provenance is not None
    assert ("blocks stacked" in model.provenance.layout) == scanned
    assert model.provenance.ignored == {"logit scale and bias": 1, "text encoder": 1}
    model.save_hf(tmp_path / "hf")
    assert all(torch.equal(t, state[n]) for n, t in load(tmp_path / "hf").state_dict().items())


@torch.no_grad()
def test_timm_reads_big_vision(tmp_path: Path) -> None:
    """timm's own reader of `.npz` files is an independent second reference."""
    original = SigLipVisionModel(replace(ODD, image_size=42))
    randomize(original)
    write_npz(
        tmp_path / "encoder.npz",
        flax(original.config, original.state_dict(), scanned=False),
        "params/img/",
    )
    reference: Any = timm_encoder("vit_base_patch32_siglip_256", img_size=42).eval()
    reference.load_pretrained(str(tmp_path / "encoder.npz"), prefix="params/img/")
    x = pixels(original.config).float()
    model = load(tmp_path / "encoder.npz")
    assert relative_error(model(x), reference.forward_features(x)) <= 1e-5
    assert relative_error(model.embed(x), reference(x)) <= 1e-5
    assert torch.equal(model(x), original.eval()(x))


def test_paligemma(tmp_path: Path) -> None:
    """PaliGemma has no pooling head, and its projector is under the encoder's prefix."""
    config = replace(ODD, pooling_head=False, image_size=42)
    original = SigLipVisionModel(config)
    randomize(original)
    arrays = flax(config, original.state_dict(), scanned=True)
    arrays |= {"head/kernel": np.ones((72, 16)), "head/bias": np.ones(16)}
    stored = {f"params/img/{name}": array.astype(np.float32) for name, array in arrays.items()}
    stored["params/llm/layers/mlp/linear"] = np.ones(3, np.float32)
    save_arrays(tmp_path / "pt.npz", stored)
    model = load(tmp_path / "pt.npz")
    assert model.config == config
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in original.state_dict().items())
    assert model.provenance is not None
    assert model.provenance.ignored == {"language model": 1, "projector": 2}


def test_pickled_arrays(tmp_path: Path) -> None:
    arrays = flax(replace(ODD, image_size=42), SigLipVisionModel(ODD).state_dict(), scanned=False)
    stored = {f"img/{name}": array for name, array in arrays.items()}
    pickled = np.array([print], dtype=object)
    save_arrays(tmp_path / "a.npz", {**stored, "evil": pickled})
    # A pickled array outside the encoder is not read.
    assert load(tmp_path / "a.npz").provenance is not None
    save_arrays(tmp_path / "a.npz", {**stored, "img/MAPHead_0/probe": pickled})
    with pytest.raises(
        CheckpointError, match=r"dtype: expected one of F64, F32, F16, BF16, got a pickle"
    ):
        load(tmp_path / "a.npz")


def test_npz_beside_timm_config(tmp_path: Path) -> None:
    original = SigLipVisionModel(replace(ODD, image_size=42))
    write_npz(
        tmp_path / "encoder.npz",
        flax(original.config, original.state_dict(), scanned=False),
        "img/",
    )
    (tmp_path / "config.json").write_text('{"architecture": "vit_base_patch16_siglip_224"}')
    # The layout has the tanh GELU, although timm's model of this name has the exact one.
    assert load(tmp_path / "encoder.npz").config == original.config
    with pytest.raises(
        CheckpointError, match=r"contains neither .*; pass the file encoder.npz itself"
    ):
        load(tmp_path)
