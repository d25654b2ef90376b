"""Adapters beside the weights: refused, with the way out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from siglip_port import CheckpointError, SigLipVisionModel
from siglip_port.checkpoint.adapters import ADAPTER_CONFIG, describe_adapter
from siglip_port.checkpoint.inspect import inspect_checkpoint
from siglip_port.checkpoint.source import CONFIG, WEIGHTS
from siglip_port.embed.encoder import ModelSource
from siglip_port.hub import find_source
from tests.helpers.commands import run
from tests.helpers.damaged_files import assert_loads

load = SigLipVisionModel.from_hf

BASE = "google/siglip-base-patch16-224"


def add_adapter(folder: Path, peft_type: str = "LORA") -> None:
    """Write the configuration of an adapter beside the weights."""
    content = {"peft_type": peft_type, "base_model_name_or_path": BASE, "use_dora": True}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(content))


@pytest.mark.parametrize("source", ["", WEIGHTS], ids=["folder", "file"])
def test_adapter_beside_weights(encoder_copy: Path, model: SigLipVisionModel, source: str) -> None:
    assert_loads(encoder_copy / source, model)
    add_adapter(encoder_copy)
    message = (
        rf"^{encoder_copy / source} contains an adapter \(adapter_config.json, LORA\) of the base "
        rf"model '{BASE}', which changes .*merge_and_unload\(\)\).*; to load the model without it"
    )
    with pytest.raises(CheckpointError, match=message):
        load(encoder_copy / source)
    with pytest.raises(CheckpointError, match=message):
        load(encoder_copy / source, pooling_head=False, config=model.config)
    with pytest.raises(CheckpointError, match=message):
        inspect_checkpoint(find_source(encoder_copy / source))
    with pytest.raises(CheckpointError, match=message):
        ModelSource.from_checkpoint(encoder_copy / source)
    # The way out of the message.
    (encoder_copy / ADAPTER_CONFIG).unlink()
    assert_loads(encoder_copy / source, model)


def test_commands(encoder_copy: Path, tmp_path: Path) -> None:
    add_adapter(encoder_copy)
    output = tmp_path / "out"
    for command in (
        ("inspect", encoder_copy),
        ("extract", encoder_copy, output),
        ("export", encoder_copy, tmp_path / "a.onnx"),
    ):
        result = run(*command, code=1)
        assert "contains an adapter (adapter_config.json, LORA)" in result.stderr
    assert not output.exists()


def test_adapter_alone(encoder_copy: Path) -> None:
    (encoder_copy / WEIGHTS).unlink()
    (encoder_copy / CONFIG).unlink()
    add_adapter(encoder_copy)
    with pytest.raises(CheckpointError, match=r"contains an adapter .* merge it with peft"):
        load(encoder_copy)


def test_damaged_adapter_config(encoder_copy: Path) -> None:
    (encoder_copy / ADAPTER_CONFIG).write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config.json is not valid JSON"):
        load(encoder_copy)


def test_prompts_cannot_be_merged() -> None:
    message = describe_adapter("x", {"peft_type": "PREFIX_TUNING"})
    assert "merge_and_unload" not in message
    assert "cannot be merged; to load the model without it, load the base model, or" in message
    assert "merge_and_unload" in describe_adapter("x", {"peft_type": "IA3"})
