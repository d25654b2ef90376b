"""`README.md` of saved encoders, read by huggingface_hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from siglip_port import SigLipVisionConfig, SigLipVisionModel
from siglip_port.checkpoint.extract import extract_model
from siglip_port.checkpoint.model_card import CARD, MARKER
from tests.helpers.checkpoints import SMALL, MakeCheckpoint
from tests.helpers.models import random_model

ORIGIN = "google/siglip-base-patch16-224"
COMMIT = "0123456789" * 4


def from_hub(folder: Path) -> SigLipVisionModel:
    """Load a folder as if it were a repository on the Hub."""
    model = SigLipVisionModel.from_hf(folder)
    assert model.provenance is not None
    model.provenance = replace(model.provenance, origin=f"{ORIGIN}@{COMMIT}")
    return model


@pytest.mark.parametrize(
    ("config", "tags"),
    [
        (SMALL, ["siglip", "vision", "sentence-transformers"]),
        (replace(SMALL, naflex=True), ["siglip", "vision", "sentence-transformers"]),
        (replace(SMALL, pooling_head=False), ["siglip", "vision"]),
        (
            replace(SMALL, pooling_head=False, mean_pooling=True),
            ["siglip", "vision", "sentence-transformers"],
        ),
        (
            replace(SMALL, pooling_head=False, mean_pooling=True, naflex=True),
            ["siglip", "vision"],
        ),
    ],
    ids=["head", "naflex", "headless", "mean", "naflex-mean"],
)
def test_card(config: SigLipVisionConfig, tags: list[str], tmp_path: Path) -> None:
    random_model(config).save_hf(tmp_path / "source")
    from_hub(tmp_path / "source").save_hf(tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / CARD)
    assert card.data.to_dict() == {
        "base_model": ORIGIN,
        "library_name": "transformers",
        "pipeline_tag": "image-feature-extraction",
        "tags": tags,
    }
    assert f"Loaded from `{ORIGIN}` at commit `{COMMIT}`" in card.text
    assert f"{config.num_encoder_blocks} blocks of width {config.embed_dim}" in card.text
    assert "SigLipVisionModel.from_hf(folder)" in card.text
    assert ("SentenceTransformer(folder)" in card.text) == ("sentence-transformers" in tags)


def test_unknown_origin(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = checkpoint()
    SigLipVisionModel.from_hf(folder).save_timm(tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / CARD)
    assert card.data.base_model is None
    assert card.data.license is None
    assert card.data.library_name == "timm"
    assert "The origin of the weights is not recorded." in card.text
    assert "timm.create_model" in card.text
    assert str(folder) not in card.content  # a path of this machine
    assert folder.name not in card.content


def test_license_of_the_source(tmp_path: Path) -> None:
    random_model().save_hf(tmp_path / "source")
    source = tmp_path / "source" / CARD
    cases = {
        "---\nlicense: apache-2.0\ntags:\n- a\n---\ntext": {"license": "apache-2.0"},
        "---\r\nlicense: mit\r\n---\r\n": {"license": "mit"},
        "---\ntags:\n- a\nlicense: other\nlicense_name: gemma\n---\n": {
            "license": "other",
            "license_name": "gemma",
        },
        "license: mit\n": {},
        "---\ntags:\n- a\n---\nlicense: mit\n": {},
        "---\nlicense: [mit, gpl]\n---\n": {},
        "---\nlicense: mit\n": {},
        "": {},
    }
    for number, (text, expected) in enumerate(cases.items()):
        source.write_bytes(text.encode())
        out, again = tmp_path / f"{number}", tmp_path / f"again {number}"
        SigLipVisionModel.from_hf(tmp_path / "source").save_hf(out)
        SigLipVisionModel.from_hf(out).save_hf(again)
        for folder in (out, again):
            data = ModelCard.load(folder / CARD).data.to_dict()
            assert {key: data[key] for key in data if key.startswith("license")} == expected


def test_other_readme_is_kept(tmp_path: Path) -> None:
    model = random_model()
    for number, content in enumerate([b"mine", b"", b"\xff\xfe", b"x" * 2**21 + MARKER.encode()]):
        for write in (SigLipVisionModel.save_hf, extract_model):
            folder = tmp_path / f"{write.__name__} {number}"
            folder.mkdir()
            (folder / CARD).write_bytes(content)
            write(model, folder)
            assert (folder / CARD).read_bytes() == content
    folder = tmp_path / "folder"
    (folder / CARD).mkdir(parents=True)
    extraction = extract_model(model, folder)
    assert extraction.skipped == (folder / CARD,)
    assert folder / CARD not in extraction.files
    assert (folder / CARD).is_dir()


def test_own_card_is_replaced(tmp_path: Path) -> None:
    random_model().save_timm(tmp_path)
    assert "timm.create_model" in (tmp_path / CARD).read_text()
    extraction = extract_model(random_model(), tmp_path)
    assert extraction.skipped == ()
    assert "timm.create_model" not in (tmp_path / CARD).read_text()
    assert MARKER in (tmp_path / CARD).read_text().splitlines()
