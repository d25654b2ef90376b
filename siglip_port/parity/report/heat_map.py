"""Heat maps of 1 - cosine over the image, patch by patch: what to draw. The template draws it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from siglip_port.parity.report.format import format_cosine, to_float
from siglip_port.parity.report.json_report import Json

COLORS = ((13, 8, 135), (126, 3, 168), (204, 71, 120), (248, 149, 64), (240, 249, 33))
"""Red, green and blue from the lowest value to the highest."""

NOT_FINITE = "#888"
FIXED_SCALE = (-16.0, 0.0)
LEGEND_STEPS = 9


@dataclass(frozen=True)
class Cell:
    """One patch.

    Attributes:
        row: of the grid.
        column: of it.
        color: of CSS.
        value: 1 - cosine.
    """

    row: int
    column: int
    color: str
    value: float


@dataclass(frozen=True)
class HeatMap:
    """One map.

    Attributes:
        title: what its scale is.
        cells: row by row.
        legend: colors from the lowest value to the highest.
        low: the lowest value.
        high: the highest one.
    """

    title: str
    cells: list[Cell]
    legend: list[str]
    low: float
    high: float


@dataclass(frozen=True)
class Patches:
    """How alike the vectors of every patch are.

    Attributes:
        mean: of the cosines, as text.
        smallest: of them, as text.
        remark: what they tell, and what they do not.
        side: of the image, in patches; not whole where pixels beyond the last one belong to none.
        maps: on a scale that is always the same, and on this report's own.
    """

    mean: str
    smallest: str
    remark: str
    side: float
    maps: list[HeatMap]


def distances_of(report: Json) -> list[float]:
    """1 - cosine of every patch, row by row."""
    patches = report.get("patches") or {}
    return [max(1 - float(cosine), 0.0) for cosine in patches.get("cosine", [])]


def build_patches(report: Json) -> Patches | None:
    """Lay out the maps of a report; None where no cosine is finite."""
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
        title = "1 - cosine, this report's own scale"
        maps.append(build_map(title, distances, grid, min(logs), max(logs)))
    return Patches(
        mean=format_cosine(sum(finite) / len(finite)),
        smallest=format_cosine(max(finite)),
        remark=remark(distances, report["equal"]),
        side=side,
        maps=maps,
    )


def build_map(title: str, distances: list[float], grid: int, low: float, high: float) -> HeatMap:
    """Lay out one map, on a scale between two powers of ten."""
    cells = []
    for i, distance in enumerate(distances):
        cells.append(Cell(i // grid, i % grid, color_of(distance, low, high), distance))
    legend = []
    for i in range(LEGEND_STEPS):
        power = low + (high - low) * i / (LEGEND_STEPS - 1)
        legend.append(color_of(10**power, low, high))
    return HeatMap(title, cells, legend, 10**low, 10**high)


def color_of(value: float, low: float, high: float) -> str:
    """The larger a value, the brighter and the less transparent."""
    if not math.isfinite(value):
        return NOT_FINITE
    share = share_of_scale(value, low, high)
    i = min(int(share * (len(COLORS) - 1)), len(COLORS) - 2)
    part = share * (len(COLORS) - 1) - i
    channels = [
        round(start + (end - start) * part)
        for start, end in zip(COLORS[i], COLORS[i + 1], strict=True)
    ]
    return f"rgba({','.join(map(str, channels))},{0.1 + 0.7 * share:.2f})"


def share_of_scale(value: float, low: float, high: float) -> float:
    """Where a value lies between two powers of ten, from 0 to 1."""
    if value == 0:
        return 0.0
    if high == low:
        return 0.5
    return min(max((math.log10(value) - low) / (high - low), 0), 1)


def remark(distances: list[float], equal: bool) -> str:
    """What the cosines tell, and what they do not."""
    largest = max(map(to_float, distances))
    if largest == 0:
        return "All are exactly 1."
    if not math.isfinite(largest):
        return "Those that are gray are not finite."
    if largest >= 1e-3:
        return ""
    digits = -math.ceil(math.log10(largest))
    rest = "what remains is rounding"
    if not equal:
        rest = "yet the two differ: an error e takes only e²/2 from a cosine"
    return f"All are 1 to {digits} digits; {rest}. No gate rests on cosines."
