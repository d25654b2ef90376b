"""The figures: what is drawn, where it lands, and the command that writes them."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from siglip_port import SigLipVisionConfig, SigLipVisionModel, patchify
from siglip_port import visualize as figures
from siglip_port.image_processing import ImageError
from siglip_port.parity import randomise
from tests.helpers.checkpoints import ODD, SMALL, edit_tensors
from tests.helpers.commands import run

ALL = [
    *("patches.png", "patch_embedding.png", "position_embedding.png"),
    *("tokens_pca.png", "pooling_attention.png"),
]
NAFLEX = replace(SMALL, naflex=True, image_size=32)  # at most 16 patches


def made(config: SigLipVisionConfig) -> SigLipVisionModel:
    model = SigLipVisionModel(config).eval()
    randomise(model, seed=0)
    return model


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def picture(height: int, width: int, seed: int = 0) -> Any:  # noqa: ANN401 (an array of numpy's)
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(picture(30, 50)).save(file)
    return file


def digests(files: list[Path]) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


# --- what is computed -----------------------------------------------------------------------------


def test_principal_components_are_those_that_were_planted() -> None:
    lengths, directions = (
        noise(50, 3) * torch.tensor([10.0, 3.0, 1.0]),
        torch.linalg.qr(noise(20, 3))[0].T,
    )
    lengths -= lengths.mean(0)
    lengths = torch.linalg.qr(lengths)[0] * torch.tensor(
        [10.0, 3.0, 1.0]
    )  # uncorrelated, so that they are the answer
    found = figures.principal(lengths @ directions + 7 * noise(20))
    signs = (found * lengths).sum(0).sign()
    assert torch.allclose(found, lengths * signs, atol=1e-12)


def test_principal_components_are_those_of_the_covariance() -> None:
    tokens = noise(30, 8)
    found, directions = figures.components(tokens)
    sizes, vectors = torch.linalg.eigh(torch.cov(tokens.T))
    assert found.dtype == torch.float64
    assert torch.allclose(found.square().sum(0) / 29, sizes.flip(0), rtol=1e-10)
    assert torch.allclose(
        (directions @ vectors.flip(1)).abs(), torch.eye(8, dtype=torch.float64), atol=1e-10
    )
    assert torch.allclose(found @ directions, tokens - tokens.mean(0), atol=1e-12)
    assert torch.equal(figures.principal(tokens), found[:, :3])
    assert torch.equal(
        figures.principal(tokens.float()), figures.principal(tokens.float().double())
    )


def test_the_signs_of_components_are_no_accident() -> None:
    tokens = noise(30, 8)
    _, directions = figures.components(tokens)
    assert (directions.gather(1, directions.abs().argmax(1, keepdim=True)) > 0).all()
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(
        figures.principal(tokens[order]), figures.principal(tokens)[order], atol=1e-12
    )
    assert torch.allclose(figures.components(-tokens)[1], directions, atol=1e-12)


def test_components_that_only_rounding_makes_are_none() -> None:
    line = torch.arange(5.0)[:, None] * noise(1, 6) + 1000
    found = figures.principal(line)
    assert (found[:, 0].abs() > 0.1).sum() == 4
    assert not found[:, 1:].any()
    assert not figures.principal(torch.full((4, 6), 0.1)).any()
    assert not figures.principal(noise(1, 6)).any()


def test_colours_reach_from_0_to_1() -> None:
    values = noise(200, 3) * torch.tensor([1.0, 50.0, 0.0])
    values[0, 0] = 1e6  # does not take the range from the others
    found = figures.colours(values)
    assert (found[:, :2].amin(0).tolist(), found[:, :2].amax(0).tolist()) == ([0, 0], [1, 1])
    assert found[:, 0].std() > 0.1
    assert not found[:, 2].any()


def test_similarities() -> None:
    table = noise(9, 5)
    found = figures.similarities(table.bfloat16())
    assert found.dtype == torch.float64
    assert torch.allclose(found.diagonal(), torch.ones(9, dtype=torch.float64), atol=1e-14)
    expected = torch.nn.functional.cosine_similarity(table[:, None], table[None], dim=-1)
    assert torch.allclose(figures.similarities(table), expected, atol=1e-14)
    assert figures.similarities(torch.tensor([[2.0, 0], [0, 3], [-1, 0]])).tolist() == [
        [1, 0, -1],
        [0, 1, 0],
        [-1, 0, 1],
    ]


def test_spread() -> None:
    assert figures.spread(14, 7) == [0, 2, 4, 6, 9, 11, 13]
    assert figures.spread(3, 7) == [0, 1, 2]
    assert figures.spread(1, 7) == [0]


def test_mosaic() -> None:
    tiles = torch.arange(1.0, 4)[:, None, None].expand(3, 2, 1)
    assert figures.mosaic(tiles, 2, empty=0).tolist() == [
        [1, 0, 2],
        [1, 0, 2],
        [0, 0, 0],
        [3, 0, 0],
        [3, 0, 0],
    ]
    assert figures.mosaic(tiles[..., None].expand(3, 2, 1, 3), 3, empty=0).shape == (2, 5, 3)


# --- the picture as the tower sees it -------------------------------------------------------------


def test_the_picture_is_what_was_resized() -> None:
    pixels = picture(60, 90)
    seen = figures.see(made(ODD), pixels)  # 45 pixels, of which 6 patches of 7 are seen
    resized = np.asarray(Image.fromarray(pixels).resize((45, 45), Image.Resampling.BICUBIC))
    assert seen.grid == (6, 6)
    assert np.allclose(seen.rgb.numpy() * 255, resized[:42, :42], atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"image_mean": [0.1, 0.4, 0.9], "image_std": [0.2, 0.5, 1.5]},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 1 / 127, "image_mean": [1.0] * 3},
    ],
)
def test_normalising_is_undone(changes: dict[str, Any]) -> None:
    model, pixels = made(SMALL), picture(16, 16)
    model.preprocessor_config |= changes
    assert np.allclose(figures.see(model, pixels).rgb.numpy() * 255, pixels, atol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(40, 90), (90, 40), (10, 300)])
def test_the_picture_of_a_naflex_tower_is_what_was_packed(height: int, width: int) -> None:
    seen = figures.see(made(NAFLEX), picture(height, width))
    assert [list(seen.grid)] == seen.pixels["spatial_shapes"].tolist()
    count = seen.grid[0] * seen.grid[1]
    assert int(seen.pixels["pixel_attention_mask"].sum()) == count
    patches = patchify(seen.rgb.movedim(-1, 0) * 2 - 1, 8)
    assert torch.allclose(seen.pixels["pixel_values"][0, :count].double(), patches, atol=1e-6)


# --- the figures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, NAFLEX])
def test_files(config: SigLipVisionConfig, tmp_path: Path) -> None:
    model, folder = made(config), tmp_path / "a" / "b"
    files = figures.draw(model, picture(30, 50), folder)
    assert files == [folder / name for name in ALL]
    assert sorted(folder.iterdir()) == sorted(files)
    for file in files:
        with Image.open(file) as image:
            image.load()  # the whole file
            assert image.format == "PNG"
            assert min(image.size) > 200
            assert len(np.unique(np.asarray(image.convert("L")))) > 10
            assert "Software" not in image.info
    before = digests(files)
    after = digests(figures.draw(model, picture(30, 50, seed=1), folder))
    assert [name for name in ALL if after[name] != before[name]] == [ALL[0], *ALL[3:]]


def plant(model: SigLipVisionModel, tokens: Tensor, patch: int) -> None:
    """Gives the pooling head a probe whose scores are 5 for one of the tokens [N, D], and 0 for the others."""
    assert model.pooling_head is not None
    attention = model.pooling_head.attention
    wanted = torch.zeros(len(tokens))
    wanted[patch] = 5 * attention.head_dim**0.5
    slices = tokens.unflatten(1, (attention.num_heads, -1)).unbind(1)
    probe = torch.cat([torch.linalg.pinv(part) @ wanted for part in slices])
    with torch.no_grad():
        for linear in (attention.q_proj, attention.k_proj):
            linear.weight.copy_(torch.eye(len(probe)))
            linear.bias.zero_()
        model.pooling_head.probe.copy_(probe)


@pytest.mark.parametrize(("config", "patch"), [(SMALL, (0, 1)), (NAFLEX, (0, 4)), (NAFLEX, (1, 2))])
def test_attention_lands_where_the_token_is(
    config: SigLipVisionConfig,
    patch: tuple[int, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = made(config)
    seen = figures.see(model, picture(24, 60))
    pixels: dict[str, Any] = dict(seen.pixels)
    rows, columns = seen.grid
    assert config is SMALL or (
        rows < columns and rows * columns < 16
    )  # of another shape than the tower's, and padded
    with torch.no_grad():
        plant(model, model(**pixels)[0, : rows * columns], patch[0] * columns + patch[1])
    drawn: list[Figure] = []
    original = figures._attention

    def kept(*given: Any) -> Figure:  # noqa: ANN401
        drawn.append(original(*given))
        return drawn[-1]

    monkeypatch.setattr(figures, "_attention", kept)
    figures.draw(model, picture(24, 60), tmp_path)
    (figure,) = drawn
    panels = [axes.get_images() for axes in figure.axes if len(axes.get_images()) == 2]
    assert len(panels) == 1 + config.num_attention_heads
    for below, above in panels:
        values = np.asarray(above.get_array())
        assert values.shape == (rows, columns)
        assert int(values.argmax()) == patch[0] * columns + patch[1]
        share = np.exp(5) / (np.exp(5) + values.size - 1)  # padding has none
        assert values.max() == pytest.approx(share * values.size, rel=1e-3)
        assert above.get_extent() == below.get_extent()  # on the whole picture, and not upside down


def test_positions_and_filters_are_drawn_in_their_places() -> None:
    model = made(replace(SMALL, image_size=72))  # 9 x 9
    table = model.transformer.embeddings.position_embedding.weight
    tiles = np.asarray(figures._positions(table).axes[0].get_images()[0].get_array())
    assert tiles.shape == (69, 69)
    chosen = figures.spread(9, 7)
    expected = torch.nn.functional.cosine_similarity(
        table[chosen[2] * 9 + chosen[5]], table, dim=-1
    ).view(9, 9)
    assert np.allclose(tiles[20:29, 50:59], expected.detach().numpy(), atol=1e-6)
    assert tiles[20 + chosen[2], 50 + chosen[5]] == pytest.approx(1)

    weight = torch.zeros(24, 3, 8, 8)
    weight[::2, 0, 1, 2] = (
        1  # half of the filters see red in one place: one component, and that is it
    )
    shown = np.asarray(figures._filters(weight).axes[0].get_images()[0].get_array())
    assert shown[1, 2].tolist() == [1, 0.5, 0.5]
    assert (shown[:8, :8] != 0.5).sum() == 1


def test_without_an_attention_pooling_head(photo: Path, tmp_path: Path) -> None:
    made(replace(SMALL, pooling_head=False)).save_hf(tmp_path / "tower")
    done = run("figures", photo, "-o", tmp_path / "out", "--model", tmp_path / "tower")
    assert done.stdout.splitlines() == [str(tmp_path / "out" / name) for name in ALL[:-1]]
    assert (
        done.stderr
        == "pooling_attention.png is left out: the tower has no attention pooling head\n"
    )
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted(ALL[:-1])
    averaged = made(replace(SMALL, pooling_head=False, mean_pooling=True))
    assert [file.name for file in figures.draw(averaged, photo, tmp_path / "out")] == ALL[:-1]


def test_all_files_or_none(photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ALL[0]).write_text("old")
    original = Figure.savefig

    def full(figure: Figure, file: Path, **options: Any) -> None:  # noqa: ANN401
        if file.name == ALL[-1]:
            raise OSError("no space left")
        original(figure, file, **options)

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="no space left"):
        figures.draw(made(SMALL), photo, tmp_path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(ALL[0], "old")]


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    model = made(SMALL)
    with pytest.raises(ImageError, match="of no kind that Pillow knows"):
        figures.draw(model, b"no", tmp_path)
    model.transformer.post_layernorm.bias.data[3] = torch.nan
    with pytest.raises(
        ValueError,
        match="tokens of this picture that are NaN or infinite: see `siglip-port inspect`",
    ):
        figures.draw(model, picture(9, 9), tmp_path)
    assert not list(tmp_path.iterdir())


# --- the command ----------------------------------------------------------------------------------


def test_the_command(tower: Path, photo: Path, tmp_path: Path) -> None:
    done = run("figures", photo, "-o", tmp_path / "out", "--model", tower, "--offline")
    files = [tmp_path / "out" / name for name in ALL]
    assert done.stdout.splitlines() == [str(file) for file in files]
    assert done.stderr == ""
    code = (
        "import sys; from pathlib import Path; from siglip_port import SigLipVisionModel, visualize as figures;"
        "figures.draw(SigLipVisionModel.from_hf(sys.argv[1]), sys.argv[2], sys.argv[3]);"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tower), str(photo), str(tmp_path / "again")]
    other = subprocess.run(command, capture_output=True, text=True, check=True)
    assert other.stdout == "False\n"
    assert digests([tmp_path / "again" / name for name in ALL]) == digests(files)


def test_the_picture_is_read_before_the_model_is_looked_for(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no")
    done = run(
        "figures",
        tmp_path / "broken.png",
        "-o",
        tmp_path / "out",
        "--model",
        tmp_path / "none",
        code=1,
    )
    sentence = f"{tmp_path / 'broken.png'}: the picture cannot be read: it is of no kind that Pillow knows\n"
    assert (done.stdout, done.stderr) == ("", sentence)
    done = run("figures", tmp_path / "none.png", "-o", tmp_path / "out", code=1)
    assert "none.png: the picture cannot be read: No such file" in done.stderr
    assert not (tmp_path / "out").exists()


def test_weights_that_are_no_numbers_end_in_a_sentence(
    tower: Path, photo: Path, tmp_path: Path
) -> None:
    SigLipVisionModel.from_hf(tower).save_hf(tmp_path / "bad")
    edit_tensors(
        tmp_path / "bad",
        lambda tensors: {name: tensor * torch.nan for name, tensor in tensors.items()},
    )
    done = run("figures", photo, "-o", tmp_path / "out", "--model", tmp_path / "bad", code=1)
    assert done.stderr.startswith("the tower makes tokens of this picture that are NaN or infinite")
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_folder(tower: Path, photo: Path) -> None:
    done = run("figures", photo, "-o", photo, "--model", tower, code=2)
    assert "is a file" in done.stderr


def test_without_the_extra(photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run("figures", photo, "-o", tmp_path / "out", code=2)
    sentence = "this needs matplotlib, which is not installed: install siglip-port[figures]\n"
    assert (done.stdout, done.stderr) == ("", sentence)
