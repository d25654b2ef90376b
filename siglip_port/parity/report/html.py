"""The report as one page that explains itself: no script, no font, no file beside it.

It is made of the JSON report alone. This module computes what the page says; the text itself is in
`templates/`.
"""

from __future__ import annotations

import base64
import functools
import io
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import jinja2
from torch import Tensor

from siglip_port.parity.gates import MEANING
from siglip_port.parity.report.format import format_times, format_value, to_float
from siglip_port.parity.report.heat_map import build_patches, distances_of
from siglip_port.parity.report.json_report import Json, section_gates
from siglip_port.parity.report.plot import Plot, Series, build_plot
from siglip_port.parity.results import Measurement

MAX_FINDINGS_OPEN = 20

FREE_RUN = "float64, free-running"
FORCED_RUN = "float64, teacher-forced"
COLORS = {FREE_RUN: "c0", FORCED_RUN: "c1", "bfloat16": "c3", "float16": "c4"}
OTHER_COLOR = "c2"


def image_data_uri(pixel_values: Tensor) -> str:
    """An image as a PNG inside a data URI.

    Args:
        pixel_values: [C, S, S], floats in [-1, 1]; of other than 3 channels, the first is drawn in
            gray.
    """
    from PIL import Image  # not needed to import this module

    levels = (pixel_values.detach().cpu().float() + 1) * 127.5
    levels = levels.nan_to_num().round().clamp(0, 255).byte()
    pixels = levels.permute(1, 2, 0) if levels.shape[0] == 3 else levels[0]
    file = io.BytesIO()
    Image.fromarray(pixels.contiguous().numpy()).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def render_page(report: Json, image: str) -> str:
    """The whole page.

    Args:
        report: the JSON report (see `siglip_port.parity.report.json_report.to_json`).
        image: what `image_data_uri` returned for the first image; empty for none.
    """
    gates = [gate for _, gate in section_gates(report)]
    findings = list(map(finding_row, report["findings"]))
    template = environment().get_template("report.html.j2")
    return template.render(
        report=report,
        gates_passed=sum(gate["passed"] for gate in gates),
        num_gates=len(gates),
        num_checked=sum(gate["checked"] for gate in gates),
        environment=format_value(report.get("environment") or ""),
        first_difference=first_difference(report),
        depth_plots=depth_plots(report),
        ratio_plots=ratio_plots(report),
        image=image,
        has_cosines=bool(distances_of(report)),
        patches=build_patches(report),
        gate_sections=list(map(gate_section, report["sections"])),
        findings_open=findings[:MAX_FINDINGS_OPEN],
        findings_folded=findings[MAX_FINDINGS_OPEN:],
        outputs=output_table(report),
        records=records(report),
    )


@functools.cache
def environment() -> jinja2.Environment:
    """Where the templates are, and how they are read: everything is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("siglip_port.parity.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["px"] = lambda value: f"{value:.1f}"
    return environment


def section_title(section: Json) -> str:
    """A checkpoint, and what weights it has."""
    return f"{section['name']} ({section['weights']})"


def measurements_of(gate: Json) -> list[Measurement]:
    """The measurements of a gate. What is not finite is a text in JSON."""
    measurements = []
    for item in gate["measurements"]:
        numbers = [float(item[key]) for key in ("error", "bound", "noise", "worst")]
        measurement = Measurement(item["run"], item["reference"], item["port"], *numbers)
        measurements.append(measurement)
    return measurements


# --- what differs ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """A large number, and what it is."""

    number: str
    label: str


@dataclass(frozen=True)
class FirstDifference:
    """The first finding: the best address that there is of what makes the two differ.

    Attributes:
        place: the module, tensor or output.
        finding: of the report.
        tiles: its error, and that beside its bound.
    """

    place: str
    finding: Json
    tiles: list[Tile]


def first_difference(report: Json) -> FirstDifference | None:
    """What is shown large; None where nothing differs."""
    if report["equal"] or not report["findings"]:
        return None
    finding = report["findings"][0]
    place = finding["reference"] or finding["port"] or finding["what"]
    error = float(finding["error"])
    tiles = []
    if math.isfinite(error):
        tiles.append(Tile(f"{error:.1e}", "relative error"))
    bound = bound_of(report, finding)
    if bound is not None:
        times = error / bound if bound else math.inf
        tiles.append(Tile(f"{bound:.1e}", "may be at most"))
        tiles.append(Tile(format_times(times), "times what it may be"))
    return FirstDifference(place, finding, tiles)


def bound_of(report: Json, finding: Json) -> float | None:
    """The bound of the measurement that a finding is about, if there is one."""
    for section, gate in section_gates(report):
        if (section["name"], gate["name"]) != (finding["section"], finding["gate"]):
            continue
        for measurement in measurements_of(gate):
            same_place = measurement.reference == finding["reference"]
            if same_place and measurement.error == float(finding["error"]):
                return measurement.bound
    return None


@dataclass(frozen=True)
class FindingRow:
    """One row of the table of findings.

    Attributes:
        finding: of the report.
        error: its relative error; empty where there is none.
    """

    finding: Json
    error: str


def finding_row(finding: Json) -> FindingRow:
    """One finding, its error as text."""
    error = float(finding["error"])
    return FindingRow(finding, "" if math.isnan(error) else f"{error:.1e}")


# --- the table of gates ---------------------------------------------------------------------------


@dataclass(frozen=True)
class LargestShare:
    """How much of its bound a gate uses at most.

    Attributes:
        share: 1 is all of it.
        measurement: of the report, where it is.
    """

    share: float
    measurement: Json

    @property
    def percent(self) -> float:
        """The share in percent, at most 100."""
        return 100 * min(self.share, 1)


@dataclass(frozen=True)
class GateRow:
    """One row of the table of gates.

    Attributes:
        gate: of the report.
        question: that it answers.
        result: `passed` or `failed`.
        largest: None for a gate that does not measure.
    """

    gate: Json
    question: str
    result: str
    largest: LargestShare | None


@dataclass(frozen=True)
class GateSection:
    """The gates of one checkpoint."""

    title: str
    rows: list[GateRow]


def gate_section(section: Json) -> GateSection:
    """The gates of one checkpoint."""
    rows = []
    for gate in section["gates"]:
        meaning = MEANING.get(gate["name"].split()[0])
        question = meaning.question if meaning else ""
        result = "passed" if gate["passed"] else "failed"
        rows.append(GateRow(gate, question, result, largest_share(gate)))
    return GateSection(section_title(section), rows)


def largest_share(gate: Json) -> LargestShare | None:
    """The measurement that takes up the largest share of its bound."""
    if not gate["measurements"]:
        return None
    largest = max(gate["measurements"], key=lambda measurement: to_float(measurement["share"]))
    return LargestShare(to_float(largest["share"]), largest)


# --- plots ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """A plot with a title."""

    title: str
    plot: Plot


def measuring_sections(report: Json) -> list[Json]:
    """The sections with measurements, the checkpoint itself first."""
    sections = []
    for section in report["sections"]:
        if any(gate["measurements"] for gate in section["gates"]):
            sections.append(section)
    return sorted(sections, key=lambda section: section["name"] != "checkpoint")


def depth_plots(report: Json) -> list[Figure]:
    """Errors at every tap, of every run; one plot a checkpoint."""
    figures = []
    for section in measuring_sections(report):
        figures.append(Figure(section_title(section), depth_plot(section)))
    return figures


def depth_plot(section: Json) -> Plot:
    """Errors at every tap, of every run on one checkpoint."""
    measurements = []
    marked = []
    for gate in section["gates"]:
        measurements += measurements_of(gate)
        marked += [finding["reference"] for finding in gate["findings"]]
    by_run: dict[str, list[Measurement]] = {}
    for item in measurements:
        by_run.setdefault(item.run, []).append(item)
    series = []
    for run, items in by_run.items():
        series += run_series(run, items)
    return build_plot(series, hover_texts(measurements), marked)


def run_series(run: str, measurements: list[Measurement]) -> list[Series]:
    """The port's errors in one run, the reference's where it rounds too, and the bound."""
    color = COLORS.get(run, OTHER_COLOR)
    errors = {}
    noise = {}
    bounds = {}
    for item in measurements:
        errors[item.reference] = item.error
        noise[item.reference] = item.noise
        if item.bound > 0:
            bounds[item.reference] = item.bound
    if any(noise.values()):
        series = [
            Series(f"{run}: the port", color, "line", errors),
            Series(f"{run}: the reference", color, "broad", noise),
        ]
    else:
        series = [Series(run, color, "dots", errors)]
    if run != FORCED_RUN:  # its bound is that of the free-running one
        label = "bound of the float64 runs" if run == FREE_RUN else f"bound of {run}"
        series.append(Series(label, color, "bound", bounds))
    return series


def ratio_plots(report: Json) -> list[Figure]:
    """The port's rounding in units of the reference's, at every tap; one plot a gate."""
    figures = []
    for section in measuring_sections(report):
        for gate in section["gates"]:
            if gate["name"].startswith("rounding") and gate["measurements"]:
                title = f"{gate['name']}: {section_title(section)}"
                figures.append(Figure(title, ratio_plot(measurements_of(gate))))
    return figures


def ratio_plot(measurements: list[Measurement]) -> Plot:
    """The port's rounding in units of the reference's, at every tap."""
    bounds = {}
    inside = {}
    outside = {}
    for item in measurements:
        if item.noise:
            bounds[item.reference] = item.bound / item.noise
        if item.passed:
            inside[item.reference] = item.ratio
        else:
            outside[item.reference] = item.ratio
    ones = dict.fromkeys((item.reference for item in measurements), 1.0)
    series = [
        Series("1: as the reference", "c5", "line", ones),
        Series("bound", "bad", "bound", bounds),
        Series("the port", "c0", "dots", inside),
        Series("the port, outside its bound", "bad", "dots", outside),
    ]
    return build_plot(series, hover_texts(measurements))


def hover_texts(measurements: Iterable[Measurement]) -> dict[str, str]:
    """All measurements at a tap, as a text to hover."""
    texts: dict[str, str] = {}
    for item in measurements:
        text = f"\n{item.run}: {format_value(item.error)}, bound {format_value(item.bound)}"
        if not item.passed:
            text += ", FAILED"
        if item.noise:
            worst = format_value(item.worst)
            text += f"; the reference {format_value(item.noise)}, worst vector {worst} of its bound"
        heading = f"{item.reference}\nin the port: {item.port}"
        texts[item.reference] = texts.get(item.reference, heading) + text
    return texts


# --- for the record -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Texts in rows, under heads."""

    heads: list[str]
    rows: list[list[str]]


def output_table(report: Json) -> Table | None:
    """Metrics that people ask for, on which no gate rests; None where there are none."""
    outputs = report.get("outputs")
    if not outputs:
        return None
    heads = list(dict.fromkeys(itertools.chain.from_iterable(outputs)))
    rows = [[format_value(item.get(head, "")) for head in heads] for item in outputs]
    return Table([head.replace("_", " ") for head in heads], rows)


def records(report: Json) -> list[tuple[str, list[tuple[str, str]]]]:
    """All else that the report holds: titles, and names with values."""
    records = []
    for key in ("provenance", "config", "environment", "reference_shapes"):
        fields = report.get(key) or {}
        if fields:
            items = [(name, format_value(value)) for name, value in fields.items()]
            records.append((key.replace("_", " ").capitalize(), items))
    return records
