"""Adapters (LoRA and others) beside the weights, which transformers would apply."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from siglip_port.checkpoint.errors import CheckpointError, HubUnreachableError
from siglip_port.checkpoint.json_files import read_json
from siglip_port.checkpoint.source import Source

ADAPTER_CONFIG = "adapter_config.json"

PROMPTS = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT")
"""Types of adapters that add tokens instead of changing weights, and cannot be merged."""


def refuse_adapter(source: Source) -> None:
    """Raise CheckpointError if the checkpoint contains an adapter.

    transformers would apply it; without it, the model is the one before the fine-tuning. Offline,
    an adapter that is not cached is not detected.

    Args:
        source: Source of the files.
    """
    try:
        path = source.get(ADAPTER_CONFIG)
    except HubUnreachableError:
        return
    if path is not None:
        raise CheckpointError(describe_adapter(source.title, read_json(path)))


def describe_adapter(title: str, content: Mapping[str, Any]) -> str:
    """Return why an adapter is refused, and what to do.

    Args:
        title: Name of the checkpoint.
        content: Contents of `adapter_config.json`.
    """
    kind = str(content.get("peft_type") or "unknown type")
    base = content.get("base_model_name_or_path")
    of_base = f" of the base model {base!r}" if base else ""
    base_source = repr(base) if base else "the base model"
    way_out = (
        f"merge it with peft (PeftModel.from_pretrained(...).merge_and_unload()), save the result "
        f"with save_pretrained and load that; to load the model without it, load {base_source}, or "
        f"move {ADAPTER_CONFIG} out of a local folder"
    )
    if kind in PROMPTS:
        way_out = (
            "it adds tokens to the input and cannot be merged; to load the model without it, load "
            f"{base_source}, or move {ADAPTER_CONFIG} out of a local folder"
        )
    return (
        f"{title} contains an adapter ({ADAPTER_CONFIG}, {kind}){of_base}, which changes what the "
        f"model computes and is not applied; {way_out}"
    )
