"""Layout of the heat maps of 1 - cosine per patch; the template draws them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from siglip_port.parity.report.format import format_cosine, to_float
from siglip_port.parity.report.json_report import Json

COLORS = ((13, 8, 135), (126, 3, 168), (204, 71, 120), (248, 149, 64), (240, 249, 33))
"""RGB colors from the lowest value to the highest."""

NOT_FINITE = "#888"
FIXED_SCALE = (-16.0, 0.0)
LEGEND_STEPS = 9


@dataclass(frozen=True)
class Cell:
    """One patch.

    Attributes:
        row: Row in the grid.
        column: Column in the grid.
        color: CSS color.
        value: 1 - cosine.
    """

    row: int
    column: int
    color: str
    value: float


@dataclass(frozen=True)
class HeatMap:
    """One heat map.

    Attributes:
        title: Title, with the kind of scale.
        cells: Patches, row by row.
        legend: CSS colors from the lowest value to the highest.
        low: Lowest value of the scale.
        high: Highest value of the scale.
    """

    title: str
    cells: list[Cell]
    legend: list[str]
    low: float
    high: float


@dataclass(frozen=True)
class Patches:
    """Cosine similarity per patch.

    Attributes:
        mean: Mean cosine, formatted.
        smallest: Smallest cosine, formatted.
        remark: Explanation of the cosines.
        side: Side of the image in patches; fractional if the image is not a multiple of the patch.
        maps: Heat maps with a fixed scale, and with the scale of this report.
    """

    mean: str
    smallest: str
    remark: str
    side: float
    maps: list[HeatMap]


def distances_of(report: Json) -> list[float]:
    """Return 1 - cosine of every patch, row by row."""
    patches = report.get("patches") or {}
    return [max(1 - float(cosine), 0.0) for cosine in patches.get("cosine", [])]


def build_patches(report: Json) -> Patches | None:
    """Lay out the heat maps of a report; None if no cosine is finite."""
    distances = distances_of(report)
    finite = [distance for distance in distances if math.isfinite(distance)]
    if not finite:
        return None
    grid = int(report["patches"]["grid"])
    config = report.get("config") or {}
    side = float(grid)
    if {"image_size", "patch_size"} <= config.keys():
        side = config["image_size"] / config["patch_size"]
    maps = [build_map("1 - cosine, fixed scale", distances, grid, *FIXED_SCALE)]
    logs = [math.log10(distance) for distance in finite if distance > 0]
    if logs:
        title = "1 - cosine, scaled to this report"
        maps.append(build_map(title, distances, grid, min(logs), max(logs)))
    return Patches(
        mean=format_cosine(sum(finite) / len(finite)),
        smallest=format_cosine(max(finite)),
        remark=remark(distances, report["equal"]),
        side=side,
        maps=maps,
    )


def build_map(title: str, distances: list[float], grid: int, low: float, high: float) -> HeatMap:
    """Lay out one heat map, with a scale from 10**low to 10**high."""
    cells = []
    for i, distance in enumerate(distances):
        cells.append(Cell(i // grid, i % grid, color_of(distance, low, high), distance))
    legend = []
    for i in range(LEGEND_STEPS):
        power = low + (high - low) * i / (LEGEND_STEPS - 1)
        legend.append(color_of(10**power, low, high))
    return HeatMap(title, cells, legend, 10**low, 10**high)


def color_of(value: float, low: float, high: float) -> str:
    """Return a CSS color: larger values are brighter and more opaque."""
    if not math.isfinite(value):
        return NOT_FINITE
    position = position_on_scale(value, low, high)
    i = min(int(position * (len(COLORS) - 1)), len(COLORS) - 2)
    part = position * (len(COLORS) - 1) - i
    channels = [
        round(start + (end - start) * part)
        for start, end in zip(COLORS[i], COLORS[i + 1], strict=True)
    ]
    return f"rgba({','.join(map(str, channels))},{0.1 + 0.7 * position:.2f})"


def position_on_scale(value: float, low: float, high: float) -> float:
    """Return the position of a value between 10**low and 10**high, from 0 to 1."""
    if value == 0:
        return 0.0
    if high == low:
        return 0.5
    return min(max((math.log10(value) - low) / (high - low), 0), 1)


def remark(distances: list[float], equal: bool) -> str:
    """Explain how to read the cosines."""
    largest = max(map(to_float, distances))
    if largest == 0:
        return "All cosines are exactly 1."
    if not math.isfinite(largest):
        return "Gray patches are not finite."
    if largest >= 1e-3:
        return ""
    digits = -math.ceil(math.log10(largest))
    explanation = "the rest is rounding"
    if not equal:
        explanation = "yet the models differ: a relative error e lowers a cosine by only e²/2"
    return f"All cosines are 1 to {digits} digits; {explanation}. No gate depends on cosines."
