"""Plots: computations, locations, and the `plot` command."""

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
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from siglip_port import (
    SigLipVisionConfig,
    SigLipVisionModel,
    __version__,
    patchify,
    visualize,
)
from siglip_port.image_processing import ImageError
from tests.helpers.checkpoints import ODD, SMALL, edit_tensors
from tests.helpers.commands import run
from tests.helpers.models import random_model

PLOTS = [
    "patches.png",
    "patch_embedding.png",
    "position_embedding.png",
    "tokens_pca.png",
    "pooling_attention.png",
]
MODEL_PLOTS = ["patch_embedding.png", "position_embedding.png"]
NAFLEX = replace(SMALL, naflex=True, image_size=32)  # at most 16 patches


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def random_image(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def image_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("image") / "image.png"
    Image.fromarray(random_image(30, 50)).save(file)
    return file


def digests(files: list[Path]) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


# --- computations ---------------------------------------------------------------------------------


def test_principal_components_of_planted_ones() -> None:
    sizes = torch.tensor([10.0, 3.0, 1.0])
    scores = noise(50, 3) * sizes
    scores -= scores.mean(0)
    scores = torch.linalg.qr(scores)[0] * sizes  # uncorrelated: the principal components
    directions = torch.linalg.qr(noise(20, 3))[0].T
    result = visualize.first_three_scores(scores @ directions + 7 * noise(20))
    signs = (result * scores).sum(0).sign()
    assert torch.allclose(result, scores * signs, atol=1e-12)


def test_principal_components_of_covariance() -> None:
    tokens = noise(30, 8)
    scores, directions = visualize.principal_components(tokens)
    variances, vectors = torch.linalg.eigh(torch.cov(tokens.T))
    identity = torch.eye(8, dtype=torch.float64)
    assert scores.dtype == torch.float64
    assert torch.allclose(scores.square().sum(0) / 29, variances.flip(0), rtol=1e-10)
    assert torch.allclose((directions @ vectors.flip(1)).abs(), identity, atol=1e-10)
    assert torch.allclose(scores @ directions, tokens - tokens.mean(0), atol=1e-12)


def test_first_three_scores() -> None:
    tokens = noise(30, 8)
    scores, _ = visualize.principal_components(tokens)
    assert torch.equal(visualize.first_three_scores(tokens), scores[:, :3])
    low = visualize.first_three_scores(tokens.float())
    assert torch.equal(low, visualize.first_three_scores(tokens.float().double()))


def test_signs_of_components() -> None:
    """Signs do not depend on the order of rows or their sign."""
    tokens = noise(30, 8)
    _, directions = visualize.principal_components(tokens)
    assert (directions.gather(1, directions.abs().argmax(1, keepdim=True)) > 0).all()
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    shuffled = visualize.first_three_scores(tokens[order])
    assert torch.allclose(shuffled, visualize.first_three_scores(tokens)[order], atol=1e-12)
    assert torch.allclose(visualize.principal_components(-tokens)[1], directions, atol=1e-12)


def test_no_components_within_rounding() -> None:
    line = torch.arange(5.0)[:, None] * noise(1, 6) + 1000
    scores = visualize.first_three_scores(line)
    assert (scores[:, 0].abs() > 0.1).sum() == 4
    assert not scores[:, 1:].any()
    assert not visualize.first_three_scores(torch.full((4, 6), 0.1)).any()
    assert not visualize.first_three_scores(noise(1, 6)).any()


def test_to_colors() -> None:
    values = noise(200, 3) * torch.tensor([1.0, 50.0, 0.0])
    values[0, 0] = 1e6  # an outlier
    colors = visualize.to_colors(values)
    assert colors[:, :2].amin(0).tolist() == [0, 0]
    assert colors[:, :2].amax(0).tolist() == [1, 1]
    assert colors[:, 0].std() > 0.1
    assert not colors[:, 2].any()


def test_cosine_similarities() -> None:
    table = noise(9, 5)
    low = visualize.cosine_similarities(table.bfloat16())
    assert low.dtype == torch.float64
    assert torch.allclose(low.diagonal(), torch.ones(9, dtype=torch.float64), atol=1e-14)
    expected = torch.nn.functional.cosine_similarity(table[:, None], table[None], dim=-1)
    assert torch.allclose(visualize.cosine_similarities(table), expected, atol=1e-14)
    axes = torch.tensor([[2.0, 0], [0, 3], [-1, 0]])
    assert visualize.cosine_similarities(axes).tolist() == [[1, 0, -1], [0, 1, 0], [-1, 0, 1]]


def test_evenly_spaced() -> None:
    assert visualize.evenly_spaced(14, 7) == [0, 2, 4, 6, 9, 11, 13]
    assert visualize.evenly_spaced(3, 7) == [0, 1, 2]
    assert visualize.evenly_spaced(1, 7) == [0]


def test_mosaic() -> None:
    tiles = torch.arange(1.0, 4)[:, None, None].expand(3, 2, 1)
    rows = [[1, 0, 2], [1, 0, 2], [0, 0, 0], [3, 0, 0], [3, 0, 0]]
    assert visualize.mosaic(tiles, 2, empty=0).tolist() == rows
    colored = tiles[..., None].expand(3, 2, 1, 3)
    assert visualize.mosaic(colored, 3, empty=0).shape == (2, 5, 3)


# --- preprocessed images --------------------------------------------------------------------------


def test_view_shows_resized_image() -> None:
    pixels = random_image(60, 90)
    view = visualize.model_view(random_model(ODD), pixels)
    resized = np.asarray(Image.fromarray(pixels).resize((45, 45), Image.Resampling.BICUBIC))
    assert view.grid == (6, 6)  # 45 pixels are 6 whole patches of 7
    assert np.allclose(view.rgb.numpy() * 255, resized[:42, :42], atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"image_mean": [0.1, 0.4, 0.9], "image_std": [0.2, 0.5, 1.5]},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 1 / 127, "image_mean": [1.0] * 3},
    ],
)
def test_view_undoes_normalization(changes: dict[str, Any]) -> None:
    model = random_model()
    model.preprocessor_config |= changes
    pixels = random_image(16, 16)
    view = visualize.model_view(model, pixels)
    assert np.allclose(view.rgb.numpy() * 255, pixels, atol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(40, 90), (90, 40), (10, 300)])
def test_view_of_naflex_shows_packed_patches(height: int, width: int) -> None:
    view = visualize.model_view(random_model(NAFLEX), random_image(height, width))
    assert [list(view.grid)] == view.pixels["spatial_shapes"].tolist()
    count = view.grid[0] * view.grid[1]
    assert int(view.pixels["pixel_attention_mask"].sum()) == count
    patches = patchify(view.rgb.movedim(-1, 0) * 2 - 1, 8)
    packed = view.pixels["pixel_values"][0, :count].double()
    assert torch.allclose(packed, patches, atol=1e-6)


# --- the plots ------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, NAFLEX])
def test_draw(config: SigLipVisionConfig, tmp_path: Path) -> None:
    model = random_model(config)
    folder = tmp_path / "a" / "b"
    files = visualize.draw(model, random_image(30, 50), folder)
    assert files == [folder / name for name in PLOTS]
    assert sorted(folder.iterdir()) == sorted(files)
    for file in files:
        with Image.open(file) as image:
            image.load()  # the whole file
            assert image.format == "PNG"
            assert min(image.size) > 200
            assert len(np.unique(np.asarray(image.convert("L")))) > 10
            assert "Software" not in image.info
    before = digests(files)
    after = digests(visualize.draw(model, random_image(30, 50, seed=1), folder))
    unchanged = [name for name in PLOTS if after[name] == before[name]]
    assert unchanged == MODEL_PLOTS


def plant_attention(model: SigLipVisionModel, tokens: Tensor, patch: int) -> None:
    """Set the probe so that its score is 5 for one of the tokens [N, D] and 0 for the others."""
    assert model.pooling_head is not None
    attention = model.pooling_head.attention
    scores = torch.zeros(len(tokens))
    scores[patch] = 5 * attention.head_dim**0.5
    heads = tokens.unflatten(1, (attention.num_heads, -1)).unbind(1)
    probe = torch.cat([torch.linalg.pinv(head) @ scores for head in heads])
    with torch.no_grad():
        for linear in (attention.q_proj, attention.k_proj):
            linear.weight.copy_(torch.eye(len(probe)))
            linear.bias.zero_()
        model.pooling_head.probe.copy_(probe)


@pytest.mark.parametrize(("config", "patch"), [(SMALL, (0, 1)), (NAFLEX, (0, 4)), (NAFLEX, (1, 2))])
def test_attention_of_planted_token(config: SigLipVisionConfig, patch: tuple[int, int]) -> None:
    model = random_model(config)
    view = visualize.model_view(model, random_image(24, 60))
    rows, columns = view.grid
    # The NaFlex image has another shape than the model's grid, and padding.
    assert config is SMALL or (rows < columns and rows * columns < 16)
    number = patch[0] * columns + patch[1]
    with torch.no_grad():
        plant_attention(model, model(**view.pixels)[0, : rows * columns], number)
        figure = visualize.draw_plots(model, view)["pooling_attention.png"]
    panels = [axes.get_images() for axes in figure.axes if len(axes.get_images()) == 2]
    assert len(panels) == 1 + config.num_attention_heads
    for below, above in panels:
        values = np.asarray(above.get_array())
        assert values.shape == (rows, columns)
        assert int(values.argmax()) == number
        share = np.exp(5) / (np.exp(5) + values.size - 1)  # none on padding
        assert values.max() == pytest.approx(share * values.size, rel=1e-3)
        assert above.get_extent() == below.get_extent()  # on the whole image, not upside down


def shown_values(figure: Figure) -> NDArray[Any]:
    return np.asarray(figure.axes[0].get_images()[0].get_array())


def test_location_of_positions() -> None:
    model = random_model(replace(SMALL, image_size=72))  # 9 x 9
    table = model.transformer.embeddings.position_embedding.weight
    tiles = shown_values(visualize.draw_positions(table))
    assert tiles.shape == (69, 69)
    indices = visualize.evenly_spaced(9, 7)
    position = table[indices[2] * 9 + indices[5]]
    expected = torch.nn.functional.cosine_similarity(position, table, dim=-1).view(9, 9)
    assert np.allclose(tiles[20:29, 50:59], expected.detach().numpy(), atol=1e-6)
    assert tiles[20 + indices[2], 50 + indices[5]] == pytest.approx(1)


def test_location_of_filters() -> None:
    weight = torch.zeros(24, 3, 8, 8)
    weight[::2, 0, 1, 2] = 1  # red at one pixel is the only component
    tiles = shown_values(visualize.draw_filters(weight))
    assert tiles[1, 2].tolist() == [1, 0.5, 0.5]
    assert (tiles[:8, :8] != 0.5).sum() == 1


def test_model_without_attention_pooling(image_path: Path) -> None:
    averaged = random_model(replace(SMALL, pooling_head=False, mean_pooling=True))
    with torch.inference_mode():
        plots = visualize.draw_plots(averaged, visualize.model_view(averaged, image_path))
    assert list(plots) == PLOTS[:-1]


def test_draw_writes_all_files_or_none(
    image_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / PLOTS[0]).write_text("old")

    def save_until_full(_: Figure, file: Path, **options: object) -> None:
        if file.name == PLOTS[-1]:
            raise OSError("no space left")
        file.touch()

    monkeypatch.setattr(Figure, "savefig", save_until_full)
    with pytest.raises(OSError, match="no space left"):
        visualize.draw(random_model(), image_path, tmp_path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(PLOTS[0], "old")]


def test_unreadable_image_and_nan_weights(tmp_path: Path) -> None:
    model = random_model()
    with pytest.raises(ImageError, match="not an image format that Pillow supports"):
        visualize.draw(model, b"no", tmp_path)
    model.transformer.post_layernorm.bias.data[3] = torch.nan
    message = (
        "tokens of this image contain NaN or Inf; check the weights with `siglip-port inspect`"
    )
    with pytest.raises(ValueError, match=message):
        visualize.draw(model, random_image(9, 9), tmp_path)
    assert not list(tmp_path.iterdir())


def test_model_without_rgb(image_path: Path, tmp_path: Path) -> None:
    model = random_model(replace(SMALL, num_channels=1))
    with pytest.raises(ValueError, match=r"num_channels of the model must be 3 .* got 1"):
        visualize.draw(model, image_path, tmp_path)
    assert not list(tmp_path.iterdir())


# --- the command ----------------------------------------------------------------------------------


def test_plot_command(encoder_folder: Path, image_path: Path, tmp_path: Path) -> None:
    """The command writes the same bytes as `draw`, without importing pyplot."""
    result = run("plot", image_path, "-o", tmp_path / "out", "--model", encoder_folder, "--offline")
    files = [tmp_path / "out" / name for name in PLOTS]
    assert result.stdout.splitlines() == [str(file) for file in files]
    assert result.stderr == ""
    program = (
        "import sys; from siglip_port import SigLipVisionModel, visualize;"
        "visualize.draw(SigLipVisionModel.from_hf(sys.argv[1]), sys.argv[2], sys.argv[3]);"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    arguments = [
        sys.executable,
        "-c",
        program,
        str(encoder_folder),
        str(image_path),
        str(tmp_path / "again"),
    ]
    other = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert other.stdout == "False\n"
    assert digests([tmp_path / "again" / name for name in PLOTS]) == digests(files)


def test_command_without_pooling_head(image_path: Path, tmp_path: Path) -> None:
    random_model(replace(SMALL, pooling_head=False)).save_hf(tmp_path / "model")
    out = tmp_path / "out"
    result = run("plot", image_path, "-o", out, "--model", tmp_path / "model")
    assert result.stdout.splitlines() == [str(out / name) for name in PLOTS[:-1]]
    note = "pooling_attention.png skipped: the model has no attention pooling head\n"
    assert result.stderr == note
    assert sorted(file.name for file in out.iterdir()) == sorted(PLOTS[:-1])


def test_command_reads_image_before_model(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no")
    out = tmp_path / "out"
    result = run("plot", broken, "-o", out, "--model", tmp_path / "none", code=1)
    message = "the image cannot be read: not an image format that Pillow supports"
    assert (result.stdout, result.stderr) == ("", f"{broken}: {message}\n")
    result = run("plot", tmp_path / "none.png", "-o", out, code=1)
    assert "none.png: the image cannot be read: No such file" in result.stderr
    assert not out.exists()


def test_command_with_nan_weights(encoder_folder: Path, image_path: Path, tmp_path: Path) -> None:
    def make_nan(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor * torch.nan for name, tensor in tensors.items()}

    SigLipVisionModel.from_hf(encoder_folder).save_hf(tmp_path / "bad")
    edit_tensors(tmp_path / "bad", make_nan)
    result = run("plot", image_path, "-o", tmp_path / "out", "--model", tmp_path / "bad", code=1)
    message = "tokens of this image contain NaN or Inf"
    assert result.stderr.startswith(message)
    assert not (tmp_path / "out").exists()


def test_command_output_is_file(encoder_folder: Path, image_path: Path) -> None:
    result = run("plot", image_path, "-o", image_path, "--model", encoder_folder, code=2)
    assert "is a file" in result.stderr


def test_command_without_matplotlib(
    image_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("plot", image_path, "-o", tmp_path / "out", code=2)
    message = "matplotlib is not installed; run: pip install 'siglip-port[plot]'\n"
    assert (result.stdout, result.stderr) == ("", message)


def test_attention_scale_is_centered_on_uniform_attention() -> None:
    for largest in (1.01, 9.0):
        norm = visualize.attention_scale(torch.tensor([0.0, largest])).norm
        assert norm is not None
        assert norm(1.0) == pytest.approx(0.5)
        assert norm(0.0) == 0


def test_source_is_described() -> None:
    model = SigLipVisionModel(SMALL)
    assert visualize.describe_source(model) == f"random weights, siglip_port {__version__}"


def test_source_of_checkpoint_is_described(tmp_path: Path) -> None:
    SigLipVisionModel(SMALL).save_hf(tmp_path)
    text = visualize.describe_source(SigLipVisionModel.from_hf(tmp_path))
    assert text == f"{tmp_path}, siglip_port {__version__}"
