"""Layout of plots with one value per tap; the template draws them.

Taps run from left to right, powers of ten from bottom to top; 0, inf and nan, which have no
logarithm, get lanes.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

DRAWING_ORDER = ("bound", "broad", "line", "dots")  # from back to front

LEFT = 78.0
TOP = 44.0
LANE_HEIGHT = 9.0
CHARACTER_WIDTH = 7


@dataclass(frozen=True)
class Series:
    """Values of one legend entry.

    Attributes:
        name: Name in the legend.
        color: CSS class of the color.
        kind: Kind of marks, one of `DRAWING_ORDER`.
        values: Values by tap.
    """

    name: str
    color: str
    kind: str
    values: dict[str, float]

    @property
    def has_zeros(self) -> bool:
        """Whether a value is 0, so that the series needs a lane."""
        return 0.0 in self.values.values()

    @property
    def is_finite(self) -> bool:
        """Whether all values are finite."""
        return all(map(math.isfinite, self.values.values()))

    @property
    def is_constant(self) -> bool:
        """Whether all values are the same."""
        first = next(iter(self.values.values()))
        return all(math.isclose(first, value) for value in self.values.values())


@dataclass(frozen=True)
class Label:
    """Text in a plot.

    Attributes:
        x: Position of the anchor.
        y: Position of the baseline.
        text: Text to show.
        anchor: SVG `text-anchor`.
        css: CSS class.
        angle: Rotation in degrees.
    """

    x: float
    y: float
    text: str
    anchor: str = "middle"
    css: str = ""
    angle: int = 0


@dataclass(frozen=True)
class Box:
    """Rectangle of full height.

    Attributes:
        x: Left edge.
        width: Width.
        label: Label, if any.
        striped: Whether the box is filled.
        text: Tooltip.
    """

    x: float
    width: float
    label: Label | None = None
    striped: bool = False
    text: str = ""


@dataclass(frozen=True)
class Line:
    """Path.

    Attributes:
        css: CSS classes.
        path: SVG `d`.
        label: Label, if any.
    """

    css: str
    path: str
    label: Label | None = None


@dataclass
class Plot:
    """Elements of a plot.

    Attributes:
        legend: CSS classes and text of every series.
        view_box: SVG `viewBox`: left, top, width, height.
        min_width: Minimum width in pixels.
        top: Top of the plotting area.
        bottom: Bottom of the plotting area.
        blocks: Blocks of taps.
        guides: Grid lines at powers of ten.
        labels: Labels of the lanes.
        lines: Paths of the series.
        arrows: Horizontal positions of the arrows.
        arrow_label: Label of the first arrow.
        columns: One column per tap, with a tooltip.
    """

    legend: list[tuple[str, str]]
    view_box: tuple[float, float, float, float]
    min_width: float
    top: float
    bottom: float
    blocks: list[Box]
    guides: list[Line]
    labels: list[Label]
    lines: list[Line]
    arrows: list[float]
    arrow_label: Label | None
    columns: list[Box]


def build_plot(
    series: list[Series], hover_texts: Mapping[str, str], marked: Iterable[str] = ()
) -> Plot:
    """Lay out a plot.

    Args:
        series: Series to draw; those without values are skipped.
        hover_texts: Tooltip of each tap.
        marked: Taps with an arrow; the first one is labeled.
    """
    taps = TapAxis(tap_names(series))
    curves = [curve for curve in series if curve.values]
    curves.sort(key=lambda curve: DRAWING_ORDER.index(curve.kind))
    plane = Plane(taps, ErrorAxis.fit(curves), curves)
    arrows = [name for name in taps.x if name in set(marked)]
    top = 0 if arrows else 20
    return Plot(
        legend=[legend_entry(curve) for curve in curves if curve.kind != "bound"],
        view_box=(0, top, taps.right + 14, plane.bottom + taps.label_height - top),
        min_width=min(taps.right + 14, 1000),
        top=TOP,
        bottom=plane.bottom,
        blocks=plane.blocks(),
        guides=plane.guides(),
        labels=plane.lane_labels(),
        lines=[plane.line(curve) for curve in curves],
        arrows=[taps.x[name] for name in arrows],
        arrow_label=arrow_label(taps, arrows),
        columns=columns(taps, hover_texts),
    )


def tap_names(series: list[Series]) -> list[str]:
    """Return the taps of all series, in order of first appearance."""
    names: dict[str, None] = {}
    for curve in series:
        names |= dict.fromkeys(curve.values)
    return list(names)


@dataclass
class TapAxis:
    """Horizontal axis: taps, block by block.

    Attributes:
        names: Names of the taps.
        x: Center of each tap.
        blocks: Label, left and right edge of each block.
        right: Right end of the axis.
    """

    names: Sequence[str]
    x: dict[str, float] = field(default_factory=dict)
    blocks: list[tuple[str, float, float]] = field(default_factory=list)
    right: float = LEFT

    def __post_init__(self) -> None:
        count = len(self.names)
        step = min(max(1000 / count, 3), max(420 / count, 60))
        for block, members in itertools.groupby(self.names, block_of):
            self._add_block(block, list(members), step)

    def _add_block(self, block: str, members: list[str], step: float) -> None:
        width = max(step, 18 / len(members))
        left = self.right
        for i, name in enumerate(members):
            self.x[name] = left + width * (i + 0.5)
        self.right = left + width * len(members)
        self.blocks.append((block, left, self.right))

    @property
    def label_height(self) -> float:
        """Height of the labels of the blocks, which are rotated if they do not fit."""
        fits = all(fitting_end(block, right - left) for block, left, right in self.blocks)
        return 28 if fits else 76


def block_of(name: str) -> str:
    """Return the block of a tap: its path up to the first number, or the first part of it."""
    numbered = re.match(r"(?:[^.:]+\.)*?\d+(?=[.:]|$)", name)
    if numbered:
        return numbered[0]
    return re.split(r"[.:]", name)[0]


def fitting_end(path: str, width: float) -> str:
    """Return the longest end of a path that fits; empty if not even the last part does."""
    parts = path.split(".")
    for i in range(len(parts)):
        end = ".".join(parts[i:])
        if CHARACTER_WIDTH * len(end) < width:
            return end
    return ""


@dataclass(frozen=True)
class ErrorAxis:
    """Vertical axis: powers of ten.

    Attributes:
        low: Lowest power.
        high: Highest power.
        decade: Height of one power.
    """

    low: int
    high: int
    decade: float

    @classmethod
    def fit(cls, series: list[Series]) -> ErrorAxis:
        """Return the axis that contains all positive finite values."""
        logs = []
        for curve in series:
            logs += [math.log10(value) for value in curve.values.values() if 0 < value < math.inf]
        low = math.floor(min(logs, default=0.0))
        high = math.floor(max(logs, default=0.0)) + 1
        return cls(low, high, min(260 / (high - low), 60))

    @property
    def bottom(self) -> float:
        """Position of the lowest power."""
        return TOP + self.decade * (self.high - self.low)

    def y(self, value: float) -> float:
        """Return the position of a positive value."""
        return TOP + self.decade * (self.high - math.log10(value))


class Plane:
    """Plotting area, with a lane for the zeros of every series that has any."""

    def __init__(self, taps: TapAxis, errors: ErrorAxis, series: list[Series]) -> None:
        self.taps = taps
        self.errors = errors
        self.series = series
        self.lanes = [curve for curve in series if curve.has_zeros]
        self.bottom = errors.bottom
        if self.lanes:
            self.bottom += LANE_HEIGHT * len(self.lanes) + 10

    def y(self, curve: Series, value: float) -> float:
        """Return the position of a value of a series."""
        if not math.isfinite(value):
            return TOP - 8
        if value <= 0:
            return self.errors.bottom + LANE_HEIGHT * (self.lanes.index(curve) + 0.5) + 8
        return self.errors.y(value)

    def blocks(self) -> list[Box]:
        """Return the blocks, every other one filled."""
        boxes = []
        for i, (block, left, right) in enumerate(self.taps.blocks):
            label = block_label(block, left, right, self.bottom + 16)
            boxes.append(Box(left, right - left, label, striped=i % 2 == 0))
        return boxes

    def guides(self) -> list[Line]:
        """Return grid lines at powers of ten, at least 18 units apart."""
        lines = []
        for power in range(
            self.errors.low, self.errors.high + 1, math.ceil(18 / self.errors.decade)
        ):
            y = TOP + self.errors.decade * (self.errors.high - power)
            text = f"{10.0**power:g}" if -5 < power < 6 else f"1e{power:+03d}"
            label = Label(LEFT - 8, y + 4, text, "end")
            lines.append(Line("guide", self.horizontal(y), label))
        return lines

    def lane_labels(self) -> list[Label]:
        """Return the labels of the lanes."""
        labels = []
        if self.lanes:
            y = (self.errors.bottom + self.bottom) / 2 + 8
            labels.append(Label(LEFT - 8, y, "exactly 0", "end"))
        if not all(curve.is_finite for curve in self.series):
            labels.append(Label(LEFT - 8, TOP - 5, "inf or nan", "end"))
        return labels

    def line(self, curve: Series) -> Line:
        """Return the path of a series; a constant bound or line spans the whole width."""
        css = f"{curve.kind} {curve.color}"
        if curve.kind not in ("bound", "line") or not curve.is_constant:
            return Line(css, self.path(curve))
        first = next(iter(curve.values.values()))
        y = self.y(curve, first)
        label = None
        if curve.kind == "bound":
            label = Label(LEFT + 6, y - 5, f"{curve.name}: {first:.3g}", "start")
        return Line(css, self.horizontal(y), label)

    def path(self, curve: Series) -> str:
        """Return the SVG path through all values, joined between positive finite values."""
        path = ""
        is_drawing = False
        for name, value in curve.values.items():
            has_logarithm = 0 < value < math.inf
            place = f"{self.taps.x[name]:.1f},{self.y(curve, value):.1f}"
            if is_drawing and has_logarithm and curve.kind != "dots":
                path += f"L{place}"
            else:
                path += f"M{place}h0"
            is_drawing = has_logarithm
        return path

    def horizontal(self, y: float) -> str:
        """Return the SVG path from the left to the right edge."""
        return f"M{LEFT},{y:.1f}H{self.taps.right:.1f}"


def block_label(block: str, left: float, right: float, y: float) -> Label:
    """Return the label of a block, rotated and shortened if it does not fit."""
    center = (left + right) / 2
    text = fitting_end(block, right - left)
    if text:
        return Label(center, y, text)
    short = block if len(block) < 15 else f"{block[:13]}…"
    return Label(center + 5, y - 4, short, "end", angle=-45)


def arrow_label(taps: TapAxis, arrows: list[str]) -> Label | None:
    """Return the label of the first arrow, moved inside the plot."""
    if not arrows:
        return None
    name = arrows[0]
    x = min(taps.x[name], taps.right - CHARACTER_WIDTH * len(name))
    return Label(max(x, 4), 12, name, "start", "mark")


def columns(taps: TapAxis, hover_texts: Mapping[str, str]) -> list[Box]:
    """Return a column per tap, between the midpoints to its neighbors."""
    middles = [(left + right) / 2 for left, right in itertools.pairwise(taps.x.values())]
    edges = itertools.pairwise([LEFT, *middles, taps.right])
    boxes = []
    for name, (left, right) in zip(taps.x, edges, strict=True):
        boxes.append(Box(left, right - left, text=hover_texts[name]))
    return boxes


def legend_entry(curve: Series) -> tuple[str, str]:
    """Return CSS classes and text of a series in the legend. Bounds are labeled in the plot."""
    text = curve.name
    zeros = sum(value == 0 for value in curve.values.values())
    if zeros:
        text += f" ({zeros} of {len(curve.values)} exactly 0)"
    return f"{curve.kind} {curve.color}", text
