"""Every ViT architecture of timm: equal outputs or a refusal, with `pytest -m catalog -rP`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.timm_catalog import VARIANTS, check_variant


@pytest.mark.catalog
@pytest.mark.parametrize("variant", VARIANTS)
def test_timm_catalog(variant: str, tmp_path: Path) -> None:
    counts, wrong = check_variant(variant, tmp_path)
    print(f"{variant}: {sum(counts.values())} architectures, {dict(counts)}")
    assert wrong == []
    assert counts["equal"] + counts["refused"] > 0, "no architecture accepts these arguments"
    if not VARIANTS[variant]:
        assert counts["equal"] >= 36
