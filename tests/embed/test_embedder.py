"""The function of a batch of rows that other programs call."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from siglip_port import SigLipVisionModel, optimize
from siglip_port.embed.embedder import Decoded, Embedder, decode
from tests.helpers.checkpoints import SMALL


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Five pictures; the third is broken."""
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(5):
        Image.fromarray(random.integers(0, 256, (20 + number, 30, 3)).astype(np.uint8)).save(
            folder / f"{number}.png"
        )
    (folder / "2.png").write_bytes(b"no")
    return [str(folder / f"{number}.png") for number in range(5)]


def test_columns_in_columns_out(tower: Path, files: list[str]) -> None:
    embedder = Embedder(tower, batch_size=2)
    found = embedder({"path": files, "label": list("abcde")})
    assert list(found) == ["path", "label", "width", "height", "embedding", "error"]
    assert found["path"] == files
    assert found["width"].tolist() == [30, 30, 0, 30, 30]
    assert found["height"].tolist() == [20, 21, 0, 23, 24]
    assert found["embedding"].shape == (5, embedder.embedding_dim)
    assert found["embedding"].dtype == np.float32
    assert [bool(error) for error in found["error"]] == np.isnan(found["embedding"]).all(1).tolist()
    assert found["error"][2] == "the picture cannot be read: it is of no kind that Pillow knows"
    good = [name for name in files if "2.png" not in name]
    expected = embedder.plain.embed_images(good).numpy()
    assert np.allclose(found["embedding"][[0, 1, 3, 4]], expected, rtol=1e-4, atol=1e-4)


def test_every_kind_of_column(tower: Path, files: list[str]) -> None:
    embedder = Embedder(tower)
    expected = repr(embedder({"path": files})["embedding"])
    contents = [Path(name).read_bytes() for name in files]
    columns: dict[str, Any] = {
        "bytes": contents,
        "image": [{"bytes": content, "path": None} for content in contents],
        "path": np.array(files, dtype=object),
    }
    for name, column in columns.items():
        found = embedder({name: column, "path": files})
        assert repr(found["embedding"]) == expected
        assert ("bytes" in found, "image" in found) == (False, False)
        assert list(found["path"]) == files
    assert (
        repr(Embedder(tower, column="png")({"png": contents, "path": ["x"] * 5})["embedding"])
        == expected
    )
    pixels = [np.asarray(Image.open(files[0])), np.asarray(Image.open(files[1]))]
    assert repr(embedder({"image": pixels})["embedding"]) == repr(
        embedder({"path": files[:2]})["embedding"]
    )
    assert (
        embedder({"image": [None, {"bytes": None, "path": None}]})["error"].tolist()
        == ["the row holds neither bytes nor a path"] * 2
    )
    assert embedder({"path": []})["embedding"].shape == (0, embedder.embedding_dim)
    with pytest.raises(
        ValueError, match="no column bytes or image or path, but png; name one by column="
    ):
        embedder({"png": contents})


def test_nothing_is_loaded_before_the_first_picture(
    tower: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(SigLipVisionModel, "from_hf", load)
    embedder = Embedder(tower)
    assert embedder.embedding_dim == SMALL.embed_dim
    assert Embedder(tower, output="tokens").embedding_dim == SMALL.embed_dim * SMALL.num_patches
    assert len(pickle.dumps(embedder)) < 10_000
    with pytest.raises(AssertionError):
        embedder.model  # noqa: B018


@pytest.mark.parametrize("in_memory", [False, True])
def test_it_can_be_pickled_at_any_time(in_memory: bool, tower: Path, files: list[str]) -> None:
    embedder = Embedder(SigLipVisionModel.from_hf(tower) if in_memory else tower, form="packed")
    before = pickle.dumps(embedder)
    expected = repr(embedder({"path": files}))
    for again in (pickle.loads(before), pickle.loads(pickle.dumps(embedder))):
        assert repr(again({"path": files})) == expected
    assert embedder.name == str(tower)
    assert (len(pickle.dumps(embedder)) < 10_000) != in_memory  # used or not
    assert len(pickle.dumps(embedder)) == len(before)


def test_what_is_chosen(tower: Path, files: list[str]) -> None:
    unit = Embedder(tower, normalize=True, dtype=torch.bfloat16, store="float16")({"path": files})[
        "embedding"
    ]
    assert unit.dtype == np.float16
    assert np.allclose(np.linalg.norm(unit[:2].astype(float), axis=1), 1, atol=1e-2)
    tokens = Embedder(tower, output="tokens")({"path": files})["embedding"]
    assert tokens.shape == (5, SMALL.embed_dim * SMALL.num_patches)


def test_a_vector_does_not_depend_on_its_company(tower: Path, files: list[str]) -> None:
    embedder = Embedder(tower, batch_size=4)
    whole = embedder({"path": [files[0], files[1], files[3]]})["embedding"]
    alone = embedder({"path": [files[0]]})["embedding"]
    assert np.array_equal(whole[:1], alone)


def test_threads_are_those_that_were_asked_for(tower: Path) -> None:
    seen, before = [], torch.get_num_threads()
    embedder = Embedder(tower, threads=before + 1)
    embedder.model.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    embedder.vectors([decode(np.zeros((4, 4, 3), np.uint8), embedder.processor)])
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


def test_what_is_no_number_is_an_error(tower: Path) -> None:
    embedder = Embedder(tower)
    with torch.no_grad():
        embedder.plain.transformer.post_layernorm.bias[0] = torch.nan
    rows, errors = embedder.vectors(
        [decode(np.zeros((4, 4, 3), np.uint8), embedder.processor), Decoded(None, None, "x", 0)]
    )
    assert errors == ["the model gave what is no number", "x"]
    assert np.isnan(rows).all()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number from 1 on, got 0"),
        ({"threads": True}, "threads must be a whole number from 1 on, got True"),
        ({"form": "fast"}, "form must be one of eager, packed"),
        ({"output": "all"}, "output must be pooled or tokens"),
        ({"store": "int8"}, "store float32 or float16, got 'pooled' and 'int8'"),
        ({"output": "tokens", "normalize": True}, "not normalised"),
        ({"backend": "cv2"}, "backend must be"),
    ],
)
def test_wrong_arguments(how: dict[str, Any], message: str, tower: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Embedder(tower, **how)


def test_models_that_do_not_fit(tower: Path) -> None:
    with pytest.raises(ValueError, match="optimized already"):
        Embedder(optimize(SigLipVisionModel.from_hf(tower), engines=[]))
    with pytest.raises(ValueError, match="no pooling head"):
        Embedder(SigLipVisionModel(replace(SMALL, pooling_head=False)))
    with pytest.raises(ValueError, match="pictures of one size"):
        Embedder(SigLipVisionModel(replace(SMALL, naflex=True)), output="tokens")
