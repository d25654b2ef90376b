"""Every ViT architecture of timm: equal outputs or a refusal, with `pytest -m catalog -rP`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.timm_catalog import VARIANTS, build_small, check_variant, verdict


@pytest.mark.catalog
@pytest.mark.parametrize("variant", VARIANTS)
def test_timm_catalog(variant: str, tmp_path: Path) -> None:
    counts, wrong = check_variant(variant, tmp_path)
    print(f"{variant}: {sum(counts.values())} architectures, {dict(counts)}")
    assert wrong == []
    assert counts["equal"] + counts["refused"] > 0, "no architecture accepts these arguments"
    if not VARIANTS[variant]:
        assert counts["equal"] >= 36


def test_difference_detected(tmp_path: Path) -> None:
    built = build_small("vit_base_patch16_siglip_224", {})
    assert built is not None
    model, arguments = built
    assert verdict(model, arguments, tmp_path) == "equal"
    assert verdict(model, {**arguments, "qk_norm": True}, tmp_path) == "refused"
    result = verdict(model, {**arguments, "num_heads": 4}, tmp_path)
    assert result.startswith("tokens: relative error")
