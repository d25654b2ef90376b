"""Plots of a model's weights and of its features for an image.

Needs matplotlib (extra `[plot]`), whose global state is unchanged: plots are created without pyplot
and rendered by Agg, which needs no display. After Dosovitskiy et al. 2020, arXiv 2010.11929, figure
7 (filters, positions) and Oquab et al. 2023, arXiv 2304.07193, figure 1 (tokens).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 (the name the field uses)
from torch import Tensor

from siglip_port import __version__
from siglip_port.atomic import commit_files, staging_dir
from siglip_port.extras import require
from siglip_port.image_processing import ImageInput, ImageProcessor, Pixels, move_pixels
from siglip_port.model import SigLipVisionModel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

POOLING_PLOT = "pooling_attention.png"
"""Plot of models with an attention pooling head only."""

FILTER_ROWS = 4
FILTER_COLUMNS = 7
"""Rows and columns of plotted principal components of the filters."""

MAX_POSITIONS = 7
"""Maximum rows and columns of plotted positions."""

OVERLAY_OPACITY = 0.65
TINY = 1e-300  # avoids division by zero


@dataclass(frozen=True)
class ModelView:
    """A preprocessed image.

    Attributes:
        pixels: Model input, a batch of one.
        rgb: Pixels of whole patches for display, [h * P, w * P, 3], 0 to 1.
        grid: Height and width in patches, (h, w).
    """

    pixels: Pixels
    rgb: Tensor
    grid: tuple[int, int]

    @property
    def panel_height(self) -> float:
        """Height of a panel over its width: the image's, clamped to [0.15, 2.5]."""
        rows, columns = self.grid
        return min(max(rows / columns, 0.15), 2.5)


@dataclass(frozen=True)
class ColorScale:
    """Colors of values.

    Attributes:
        colors: Name of a colormap of matplotlib; None for values that are colors.
        norm: Map of values to the colormap; None for values that are colors.
    """

    colors: str | None = None
    norm: Normalize | None = None


def model_view(model: SigLipVisionModel, image: ImageInput) -> ModelView:
    """Preprocess an image for a model and undo the normalization for display.

    Args:
        model: Fixed-size or NaFlex model.
        image: Path, encoded file (bytes), PIL image, or uint8 array or tensor.

    Raises:
        siglip_port.image_processing.ImageError: The image cannot be read or has no patch.
        ValueError: The model's preprocessing is unknown, or its `preprocessor_config` is not
            supported.
    """
    processor = ImageProcessor.for_model(model.config, model.preprocessing.checked_config())
    patch_size = model.config.patch_size
    values = processor.one(image)  # [3, H, W]
    pixels = processor.batch([values])
    rows = values.shape[1] // patch_size
    columns = values.shape[2] // patch_size
    rgb = values[:, : rows * patch_size, : columns * patch_size].movedim(0, -1).double()
    if processor.mean is not None and processor.std is not None:
        rgb = rgb * torch.tensor(processor.std).double() + torch.tensor(processor.mean).double()
    rgb = rgb / (255 * processor.factor)
    return ModelView(pixels, rgb.clamp(0, 1), (rows, columns))


# --- computations ---------------------------------------------------------------------------------


def principal_components(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the principal components of rows in float64, by decreasing variance.

    Each component's sign makes its largest entry positive. Components within rounding error of zero
    variance are omitted.

    Args:
        rows: Finite values [N, D].

    Returns:
        Scores [N, K] and unit-length components [K, D].
    """
    rows = rows.detach().cpu().double()
    bases, lengths, directions = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    significant = lengths > rows.norm() * max(rows.shape) * torch.finfo(rows.dtype).eps
    signs = directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()  # [K, 1]
    scores = bases * lengths * signs[:, 0]
    return scores[:, significant], (directions * signs)[significant]


def first_three_scores(tokens: Tensor) -> Tensor:
    """Return scores of the first three principal components: [N, D] -> [N, 3], float64.

    Missing components are zero.
    """
    scores = principal_components(tokens)[0][:, :3]
    return F.pad(scores, (0, 3 - scores.shape[1]))


def to_colors(values: Tensor) -> Tensor:
    """Scale each column to [0, 1] from its 1st to its 99th percentile: [N, 3] -> [N, 3]."""
    low = torch.quantile(values, 0.01, dim=0)
    high = torch.quantile(values, 0.99, dim=0)
    return ((values - low) / (high - low).clamp(min=TINY)).clamp(0, 1)


def cosine_similarities(positions: Tensor) -> Tensor:
    """Return pairwise cosine similarities of position embeddings: [N, D] -> [N, N], float64."""
    unit = F.normalize(positions.detach().cpu().double(), dim=1)
    return unit @ unit.T


def evenly_spaced(side: int, max_count: int) -> list[int]:
    """Return at most `max_count` evenly spaced integers from 0 to side - 1."""
    numbers = torch.linspace(0, side - 1, min(side, max_count), dtype=torch.float64)
    return [round(number) for number in numbers.tolist()]


def mosaic(tiles: Tensor, columns: int, empty: float) -> Tensor:
    """Arrange tiles in a grid, row by row, separated by one pixel.

    Args:
        tiles: K tiles [K, h, w] or [K, h, w, 3].
        columns: Tiles per row.
        empty: Value between tiles and in the unused part of the last row.

    Returns:
        [rows * (h + 1) - 1, columns * (w + 1) - 1] or [..., 3].
    """
    height, width = tiles.shape[1:3]
    rows = max(-(-len(tiles) // columns), 1)
    size = (rows * (height + 1) - 1, columns * (width + 1) - 1)
    canvas = tiles.new_full((*size, *tiles.shape[3:]), empty)
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        top = row * (height + 1)
        left = column * (width + 1)
        canvas[top : top + height, left : left + width] = tile
    return canvas


# --- the plots ------------------------------------------------------------------------------------


@torch.inference_mode()
def draw(model: SigLipVisionModel, image: ImageInput, folder: str | os.PathLike[str]) -> list[Path]:
    """Plot a model's weights and its features for an image as PNG files.

    Writes `patches.png`, `patch_embedding.png`, `position_embedding.png`, `tokens_pca.png` and, if
    the model has an attention pooling head, `pooling_attention.png`. The same model and image give
    the same bytes.

    Args:
        model: Fixed-size or NaFlex model in `eval()` mode.
        image: Path, encoded file (bytes), PIL image, or uint8 array or tensor.
        folder: Output folder, created if missing. Existing files of these names are replaced,
            all or none.

    Returns:
        Paths of the files.

    Raises:
        siglip_port.image_processing.ImageError: The image cannot be read.
        ValueError: The model does not accept the image, or its tokens contain NaN or Inf.
        OSError: The folder is not writable.
        siglip_port.extras.MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib")
    folder = Path(folder)
    view = model_view(model, image)
    plots = draw_plots(model, view)
    with staging_dir(folder) as staging:
        files = []
        for name, figure in plots.items():
            files.append(staging / name)
            add_caption(figure, describe_source(model))
            # Omit matplotlib's version, which would change the bytes.
            figure.savefig(staging / name, format="png", dpi=150, metadata={"Software": None})
        commit_files(files, folder)
    return [folder / name for name in plots]


def describe_source(model: SigLipVisionModel) -> str:
    """Return the source of the weights, with commit, and the version of this package."""
    provenance = model.provenance
    source = "random weights"
    if provenance is not None:
        source = provenance.source
        if provenance.commit is not None:
            source += f" at commit {provenance.commit[:12]}"
        elif provenance.origin is not None:
            source = provenance.origin
    return f"{source}, siglip_port {__version__}"


def add_caption(figure: Figure, text: str) -> None:
    """Add a line below everything else in a figure."""
    figure.supxlabel(text, fontsize="x-small", color="gray")


def draw_plots(model: SigLipVisionModel, view: ModelView) -> dict[str, Figure]:
    """Draw the plots of `draw`, keyed by file name."""
    embeddings = model.transformer.embeddings
    pixels = move_pixels(view.pixels, model.device)
    tokens: Tensor = model(**pixels)  # [1, N, D]
    count = view.grid[0] * view.grid[1]
    image_tokens = tokens[0, :count]  # without padding
    if not image_tokens.isfinite().all():
        raise ValueError(
            "tokens of this image contain NaN or Inf; check the weights with `siglip-port inspect`"
        )
    plots = {
        "patches.png": draw_patches(view),
        "patch_embedding.png": draw_filters(embeddings.patch_embedding.weight),
        "position_embedding.png": draw_positions(embeddings.position_embedding.weight),
        "tokens_pca.png": draw_tokens(view, image_tokens),
    }
    if model.pooling_head is not None:
        attention = model.pooling_attention(tokens, pixels.get("pixel_attention_mask"))  # [1, H, N]
        plots[POOLING_PLOT] = draw_attention(view, attention[0, :, :count])
    return plots


def new_figure(width: float, height: float) -> Figure:
    """Create an empty figure of this size in inches, with constrained layout."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def show_image(axes: Axes, rgb: Tensor, title: str) -> None:
    """Show an image [h, w, 3], 0 to 1."""
    axes.imshow(rgb.numpy(), interpolation="nearest")
    axes.set_title(title)
    axes.axis("off")


def show_overlay(
    axes: Axes, view: ModelView, values: Tensor, title: str, scale: ColorScale
) -> AxesImage:
    """Overlay patch values on the grayscale image.

    Args:
        axes: Target axes.
        view: Image.
        values: Values [h, w], or colors [h, w, 3].
        title: Title of the axes.
        scale: Color scale of values.
    """
    show_image(axes, view.rgb.mean(-1, keepdim=True).expand(-1, -1, 3), title)
    height, width = view.rgb.shape[:2]
    return axes.imshow(
        values.numpy(),
        alpha=OVERLAY_OPACITY,
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        interpolation="nearest",
        cmap=scale.colors,
        norm=scale.norm,
    )


def attention_scale(values: Tensor) -> ColorScale:
    """Return a color scale for attention in units of uniform attention: white at 1.

    It reaches at least 2, else almost uniform attention would look peaked.
    """
    from matplotlib.colors import TwoSlopeNorm

    norm = TwoSlopeNorm(vcenter=1, vmin=0, vmax=max(2.0, float(values.max())))
    return ColorScale("RdBu_r", norm)


def draw_patches(view: ModelView) -> Figure:
    """Plot the image with its patch borders."""
    rows, columns = view.grid
    height, width = view.rgb.shape[:2]
    size = height // rows
    figure = new_figure(6, 6 * view.panel_height + 0.4)
    axes = figure.subplots()
    title = f"{height} x {width} pixels: {rows} x {columns} patches of {size} x {size}"
    show_image(axes, view.rgb, title)
    horizontal = [size * row - 0.5 for row in range(rows + 1)]
    vertical = [size * column - 0.5 for column in range(columns + 1)]
    for color, line in (("black", 1.2), ("white", 0.5)):  # visible on dark and on bright
        axes.hlines(horizontal, -0.5, width - 0.5, color, linewidth=line)
        axes.vlines(vertical, -0.5, height - 0.5, color, linewidth=line)
    return figure


def draw_filters(weight: Tensor) -> Figure:
    """Plot principal components of the patch embedding's filters, [D, 3, P, P]."""
    scores, directions = principal_components(weight.flatten(1))
    shares = scores.square().sum(0) / scores.square().sum().clamp(min=TINY)
    directions = directions[: FILTER_ROWS * FILTER_COLUMNS]
    tiles = directions.unflatten(1, weight.shape[1:]).movedim(1, -1)  # [K, P, P, 3]
    tiles = 0.5 + 0.5 * tiles / tiles.abs().amax((1, 2, 3), keepdim=True)
    figure = new_figure(7, 4.6)
    title = (
        f"First {len(directions)} principal components of {len(weight)} patch embedding filters\n"
        f"({shares[: len(directions)].sum():.0%} of variance; scaled individually, gray is 0)"
    )
    show_image(figure.subplots(), mosaic(tiles, FILTER_COLUMNS, empty=1.0), title)
    return figure


def draw_positions(table: Tensor) -> Figure:
    """Plot cosine similarities of learned position embeddings [N, D] of a square grid."""
    side = round(len(table) ** 0.5)
    indices = evenly_spaced(side, MAX_POSITIONS)
    similarities = cosine_similarities(table).unflatten(0, (side, side)).unflatten(2, (side, side))
    tiles = similarities[indices][:, indices].flatten(0, 1)
    figure = new_figure(7, 6.4)
    axes = figure.subplots()
    image = mosaic(tiles, len(indices), empty=torch.nan)
    shown = axes.imshow(image.numpy(), vmax=1, interpolation="nearest")
    centers = [tile * (side + 1) + (side - 1) / 2 for tile in range(len(indices))]
    labels = [str(index) for index in indices]
    axes.set_xticks(centers, labels)
    axes.set_yticks(centers, labels)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel("position column")
    axes.set_ylabel("position row")
    axes.set_title(f"Cosine similarity of position embeddings, {side} x {side}")
    figure.colorbar(shown, ax=axes, label="cosine similarity", shrink=0.8)
    return figure


def draw_tokens(view: ModelView, tokens: Tensor) -> Figure:
    """Plot the first three principal components of the tokens [h * w, D] as colors."""
    tokens = tokens.detach().cpu().double()
    scores = first_three_scores(tokens)
    total = (tokens - tokens.mean(0)).square().sum().clamp(min=TINY)
    shares = ", ".join(f"{share:.0%}" for share in scores.square().sum(0) / total)
    figure = new_figure(12, 4 * view.panel_height + 0.8)
    figure.suptitle(
        f"First three principal components of the tokens as red, green and blue: {shares} of "
        "variance"
    )
    colors = to_colors(scores).unflatten(0, view.grid)
    image_axes, overlay_axes, color_axes = figure.subplots(1, 3)
    show_image(image_axes, view.rgb, "image")
    show_overlay(overlay_axes, view, colors, "overlay", ColorScale())
    show_image(color_axes, colors, "components")
    return figure


def draw_attention(view: ModelView, attention: Tensor) -> Figure:
    """Plot the attention weights of the pooling head's probe, [H, h * w]."""
    maps = (attention.detach().cpu().double() * attention.shape[1]).unflatten(1, view.grid)
    columns = min(len(maps), 4)
    rows = -(-len(maps) // columns)
    height = max(rows * (2 * view.panel_height + 0.3), 5 * view.panel_height + 1)
    figure = new_figure(5.5 + 2 * columns, height + 0.6)
    figure.suptitle(
        "Attention of the pooling head's probe per patch; 1 (white) is uniform attention"
    )
    mean_part, heads_part = figure.subfigures(1, 2, squeeze=False, width_ratios=(5, 2 * columns))[0]
    mean = maps.mean(0)
    axes = mean_part.subplots()
    shown = show_overlay(axes, view, mean, f"mean of {len(maps)} heads", attention_scale(mean))
    # Below a tall image, the labels of the color bar would be cut off.
    location = "bottom" if view.panel_height <= 1 else "right"
    mean_part.colorbar(shown, ax=axes, shrink=0.7, location=location)
    panels = heads_part.subplots(rows, columns, squeeze=False).flatten()
    for head, (axes, values) in enumerate(zip(panels, maps, strict=False)):
        title = f"head {head}: {float(values.min()):.2g} to {float(values.max()):.3g}"
        show_overlay(axes, view, values, title, attention_scale(values))
        axes.title.set_fontsize("small")
    for axes in panels[len(maps) :]:
        axes.axis("off")
    return figure
