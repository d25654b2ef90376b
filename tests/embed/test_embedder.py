"""`Embedder`, the function of a batch of rows."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import daft
import numpy as np
import pytest
import torch
from PIL import Image

from siglip_port import CheckpointError, SigLipVisionModel, optimize
from siglip_port.embed import Embedder
from siglip_port.embed.decode import DecodedImage, decode
from tests.helpers.checkpoints import SMALL, edit_tensors
from tests.helpers.embedding import image_paths


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Five images; the third is broken."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for number in range(5):
        pixels = random.integers(0, 256, (20 + number, 30, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "2.png").write_bytes(b"no")
    return [str(folder / f"{number}.png") for number in range(5)]


def read_files(files: list[str]) -> list[bytes]:
    return [Path(file).read_bytes() for file in files]


@pytest.fixture
def embedder(encoder_folder: Path) -> Embedder:
    return Embedder(encoder_folder)


def test_columns(encoder_folder: Path, files: list[str]) -> None:
    embedder = Embedder(encoder_folder, batch_size=2)
    rows = embedder({"path": files, "label": list("abcde")})
    assert list(rows) == ["path", "label", "width", "height", "embedding", "error"]
    assert rows["path"] == files
    assert rows["width"].tolist() == [30, 30, 0, 30, 30]
    assert rows["height"].tolist() == [20, 21, 0, 23, 24]
    assert rows["embedding"].shape == (5, embedder.embedding_dim)
    assert rows["embedding"].dtype == np.float32
    has_error = [bool(error) for error in rows["error"]]
    assert has_error == np.isnan(rows["embedding"]).all(1).tolist()
    assert rows["error"][2] == "the image cannot be read: not an image format that Pillow supports"
    readable = [*files[:2], *files[3:]]
    expected = embedder.base_model.embed_images(readable).numpy()
    assert np.allclose(rows["embedding"][[0, 1, 3, 4]], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["bytes", "image", "path"])
def test_column_of_images(name: str, embedder: Embedder, files: list[str]) -> None:
    contents = read_files(files)
    columns: dict[str, Any] = {
        "bytes": contents,
        "image": [{"bytes": content, "path": None} for content in contents],
        "path": np.array(files, dtype=object),
    }
    rows = embedder({name: columns[name], "path": files})
    assert repr(rows["embedding"]) == repr(embedder({"path": files})["embedding"])
    assert "bytes" not in rows
    assert "image" not in rows
    assert list(rows["path"]) == files


def test_named_column(encoder_folder: Path, embedder: Embedder, files: list[str]) -> None:
    contents = read_files(files)
    rows = Embedder(encoder_folder, column="png")({"png": contents, "path": ["x"] * 5})
    assert repr(rows["embedding"]) == repr(embedder({"path": files})["embedding"])


def test_column_of_arrays(embedder: Embedder, files: list[str]) -> None:
    pixels = [np.asarray(Image.open(file)) for file in files[:2]]
    expected = embedder({"path": files[:2]})["embedding"]
    assert repr(embedder({"image": pixels})["embedding"]) == repr(expected)


def test_column_without_images(embedder: Embedder) -> None:
    errors = embedder({"image": [None, {"bytes": None, "path": None}]})["error"]
    assert errors.tolist() == ["the row contains neither bytes nor a path"] * 2
    assert embedder({"path": []})["embedding"].shape == (0, embedder.embedding_dim)
    message = "batch has no column bytes or image or path, only png; pass column="
    with pytest.raises(ValueError, match=message):
        embedder({"png": [b""]})


def test_weights_load_lazily(encoder_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(SigLipVisionModel, "from_hf", load)
    embedder = Embedder(encoder_folder)
    assert embedder.embedding_dim == SMALL.embed_dim
    assert (
        Embedder(encoder_folder, tokens=True).embedding_dim == SMALL.embed_dim * SMALL.num_patches
    )
    assert len(pickle.dumps(embedder)) < 10_000
    with pytest.raises(AssertionError):
        embedder.load()


@pytest.mark.parametrize("in_memory", [False, True])
def test_pickle(in_memory: bool, encoder_folder: Path, files: list[str]) -> None:
    source = SigLipVisionModel.from_hf(encoder_folder) if in_memory else encoder_folder
    embedder = Embedder(source, engine="prepacked")
    before = pickle.dumps(embedder)
    expected = repr(embedder({"path": files}))
    after = pickle.dumps(embedder)
    assert len(after) == len(before)
    assert (len(after) < 10_000) != in_memory
    for pickled in (before, after):
        assert repr(pickle.loads(pickled)({"path": files})) == expected
    assert embedder.name == str(encoder_folder)


def test_output_options(encoder_folder: Path, files: list[str]) -> None:
    options: dict[str, Any] = {
        "normalize": True,
        "dtype": torch.bfloat16,
        "output_dtype": "float16",
    }
    unit = Embedder(encoder_folder, **options)({"path": files})["embedding"]
    assert unit.dtype == np.float16
    assert np.allclose(np.linalg.norm(unit[:2].astype(float), axis=1), 1, atol=1e-2)
    tokens = Embedder(encoder_folder, tokens=True)({"path": files})["embedding"]
    assert tokens.shape == (5, SMALL.embed_dim * SMALL.num_patches)


def test_embedding_does_not_depend_on_batch(encoder_folder: Path, files: list[str]) -> None:
    embedder = Embedder(encoder_folder, batch_size=4)
    batched = embedder({"path": [files[0], files[1], files[3]]})["embedding"]
    single = embedder({"path": [files[0]]})["embedding"]
    assert np.array_equal(batched[:1], single)


def test_threads(encoder_folder: Path) -> None:
    threads = []
    before = torch.get_num_threads()
    embedder = Embedder(encoder_folder, threads=before + 1)
    embedder.model.register_forward_pre_hook(lambda *_: threads.append(torch.get_num_threads()))
    embedder.encode([decode(np.zeros((4, 4, 3), np.uint8), embedder.processor)])
    assert threads == [before + 1]
    assert torch.get_num_threads() == before


def test_nan_embedding_is_error(embedder: Embedder) -> None:
    with torch.no_grad():
        embedder.base_model.transformer.post_layernorm.bias[0] = torch.nan
    black = decode(np.zeros((4, 4, 3), np.uint8), embedder.processor)
    vectors, errors = embedder.encode([black, DecodedImage(None, None, "x", 0)])
    assert errors == ["the model returned NaN or Inf", "x"]
    assert np.isnan(vectors).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a positive integer, got 0"),
        ({"threads": True}, "threads must be a positive integer, got True"),
        ({"engine": "quick"}, "engine must be one of eager, prepacked"),
        ({"engine": "fastest"}, "engine must be one of eager, prepacked"),
        ({"engine": None}, "engine must be one of eager, prepacked"),
        ({"tokens": "all"}, "tokens must be True or False, got 'all'"),
        ({"output_dtype": "int8"}, "output_dtype must be one of float32, float16, got 'int8'"),
        ({"tokens": True, "normalize": True}, "normalize cannot be combined with tokens"),
        ({"normalize": 1}, "normalize must be True or False, got 1"),
        ({"backend": "cv2"}, "backend must be"),
        ({"dtype": "bf16"}, "dtype must be one of torch.float32, .*, got 'bf16'"),
        ({"dtype": torch.float64}, "dtype must be one of .*, got torch.float64"),
        ({"dtype": torch.int8}, "dtype int8 requires the engine int8, got 'eager'"),
        (
            {"engine": "int8", "dtype": "float16"},
            "the engine int8 computes in int8, got dtype torch.float16; omit the dtype",
        ),
        ({"device": "abacus"}, "device must be the name of a device, such as .*, got 'abacus'"),
        ({"device": "meta"}, "device must hold data, got 'meta'"),
        ({"column": 3}, "column must be the name of a column, got 3"),
    ],
)
def test_wrong_option(options: dict[str, Any], message: str, encoder_folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Embedder(encoder_folder, **options)


def test_dtype_by_name(encoder_folder: Path, files: list[str]) -> None:
    named = Embedder(encoder_folder, dtype="bfloat16")
    assert named.model.dtype == torch.bfloat16
    rows = Embedder(encoder_folder, dtype=torch.bfloat16)({"path": files})
    assert repr(named({"path": files})["embedding"]) == repr(rows["embedding"])
    assert Embedder(encoder_folder, dtype="auto").dtype is None


def test_device_of_another_machine(encoder_folder: Path) -> None:
    assert Embedder(encoder_folder, device="cuda:7").device == "cuda:7"


def test_url_and_folder(embedder: Embedder, tmp_path: Path) -> None:
    errors = embedder({"path": ["https://example.org/a.jpg", str(tmp_path)]})["error"]
    assert errors.tolist() == [
        "the image cannot be read: it is a URL; download it first, or pass its bytes",
        "the image cannot be read: not a regular file but a folder; pass its files, or use "
        "siglip-port embed",
    ]


def test_unusable_model(encoder_folder: Path) -> None:
    with pytest.raises(ValueError, match="model is already optimized; pass the original model"):
        Embedder(optimize(SigLipVisionModel.from_hf(encoder_folder), engines=[]))
    with pytest.raises(ValueError, match="no pooling head"):
        Embedder(SigLipVisionModel(replace(SMALL, pooling_head=False)))
    with pytest.raises(ValueError, match=r"num_channels of the model must be 3 .* got 1"):
        Embedder(SigLipVisionModel(replace(SMALL, num_channels=1)))
    with pytest.raises(ValueError, match="revision requires a Hub id, got 'main' with a model"):
        Embedder(SigLipVisionModel(SMALL), revision="main")
    with pytest.raises(ValueError, match="tokens of a NaFlex model cannot be stored"):
        Embedder(SigLipVisionModel(replace(SMALL, naflex=True)), tokens=True)


def test_daft(photos: Path, embedder: Embedder) -> None:
    kind = daft.DataType.embedding(daft.DataType.float32(), embedder.embedding_dim)

    @daft.func.batch(return_dtype=kind)
    def vectors(path: daft.Series) -> daft.Series:
        return daft.Series.from_numpy(embedder({"path": path.to_pylist()})["embedding"]).cast(kind)

    files = image_paths(photos)
    table = daft.from_pydict({"path": files})
    rows = table.with_column("embedding", vectors(table["path"])).to_pydict()
    assert rows["path"] == files
    expected = embedder({"path": files})["embedding"]
    assert np.array_equal(np.array(rows["embedding"]), expected, equal_nan=True)


def test_selection_of_encoder(encoder_copy: Path, files: list[str]) -> None:
    """The arguments that errors name select one of several encoders."""
    expected = Embedder(encoder_copy)({"path": files})["embedding"]
    config = SigLipVisionModel.from_hf(encoder_copy).config
    edit_tensors(
        encoder_copy,
        lambda tensors: {
            f"{prefix}.{name}": tensor * (1 + (prefix == "b"))
            for prefix in "ab"
            for name, tensor in tensors.items()
        },
    )
    with pytest.raises(CheckpointError, match=r"; pass layout= and prefix=$"):
        Embedder(encoder_copy)
    (encoder_copy / "config.json").unlink()
    embedder = Embedder(
        encoder_copy.parent,
        subfolder=encoder_copy.name,
        layout="huggingface",
        prefix="a.vision_model.",
        config=config,
    )
    rows = pickle.loads(pickle.dumps(embedder))({"path": files})
    assert np.array_equal(rows["embedding"], expected, equal_nan=True)
