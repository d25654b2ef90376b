"""HTML report: one self-contained page, without scripts, fonts or other files.

It is rendered from the JSON report. This module computes the data; the text is in `templates/`.
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
from siglip_port.parity.report.format import format_factor, format_value, to_float
from siglip_port.parity.report.heat_map import build_patches, distances_of
from siglip_port.parity.report.json_report import Json, section_gates
from siglip_port.parity.report.plot import Plot, Series, build_plot
from siglip_port.parity.results import Measurement

MAX_FINDINGS_OPEN = 20

FREE_RUN = "float64, free-running"
FORCED_RUN = "float64, teacher-forced"
COLORS = {FREE_RUN: "c0", FORCED_RUN: "c1", "bfloat16": "c3", "float16": "c4"}
OTHER_COLOR = "c2"

MEASUREMENT_KEYS = ("error", "bound", "reference_error", "worst_vector_ratio")
"""JSON keys of the numbers of a `Measurement`, in its order."""


def image_data_uri(pixel_values: Tensor) -> str:
    """Encode an image as a PNG data URI.

    Args:
        pixel_values: Pixels [C, H, W] in [-1, 1]; unless C is 3, the first channel in gray.
    """
    from PIL import Image  # optional for all other reports

    levels = (pixel_values.detach().cpu().float() + 1) * 127.5
    levels = levels.nan_to_num().round().clamp(0, 255).byte()
    pixels = levels.permute(1, 2, 0) if levels.shape[0] == 3 else levels[0]
    file = io.BytesIO()
    Image.fromarray(pixels.contiguous().numpy()).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def render_page(report: Json, image: str) -> str:
    """Render the page.

    Args:
        report: JSON report (see `siglip_port.parity.report.json_report.to_json`).
        image: Data URI of the first image (see `image_data_uri`); empty for none.
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
        details=details(report),
    )


@functools.cache
def environment() -> jinja2.Environment:
    """Return the jinja2 environment of the templates, with autoescaping."""
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
    """Return the title of a section: checkpoint and weights."""
    return f"{section['name']} ({section['weights']})"


def measurements_of(gate: Json) -> list[Measurement]:
    """Return the measurements of a gate. NaN and infinity are strings in JSON."""
    measurements = []
    for item in gate["measurements"]:
        numbers = [float(item[key]) for key in MEASUREMENT_KEYS]
        measurement = Measurement(item["run"], item["reference"], item["port"], *numbers)
        measurements.append(measurement)
    return measurements


# --- findings -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """Large number with a label."""

    number: str
    label: str


@dataclass(frozen=True)
class FirstDifference:
    """First finding, which has the most precise location.

    Attributes:
        place: Module, tensor or output.
        finding: Finding of the report.
        tiles: Error, bound, and error / bound.
    """

    place: str
    finding: Json
    tiles: list[Tile]


def first_difference(report: Json) -> FirstDifference | None:
    """Return the first finding; None if nothing differs."""
    if report["equal"] or not report["findings"]:
        return None
    finding = report["findings"][0]
    place = finding["reference"] or finding["port"] or finding["message"]
    error = float(finding["error"])
    tiles = []
    if math.isfinite(error):
        tiles.append(Tile(f"{error:.1e}", "relative error"))
    bound = bound_of(report, finding)
    if bound is not None:
        factor = error / bound if bound else math.inf
        tiles.append(Tile(f"{bound:.1e}", "bound"))
        tiles.append(Tile(format_factor(factor), "times the bound"))
    return FirstDifference(place, finding, tiles)


def bound_of(report: Json, finding: Json) -> float | None:
    """Return the bound of the measurement of a finding; None without one."""
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
    """Row of the table of findings.

    Attributes:
        finding: Finding of the report.
        error: Relative error, formatted; empty if there is none.
    """

    finding: Json
    error: str


def finding_row(finding: Json) -> FindingRow:
    """Format the error of a finding."""
    error = float(finding["error"])
    return FindingRow(finding, "" if math.isnan(error) else f"{error:.1e}")


# --- gates ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LargestError:
    """Largest error of a gate, relative to its bound.

    Attributes:
        bound_ratio: Error / bound.
        measurement: Measurement of the report.
    """

    bound_ratio: float
    measurement: Json

    @property
    def percent(self) -> float:
        """Error / bound in percent, at most 100."""
        return 100 * min(self.bound_ratio, 1)


@dataclass(frozen=True)
class GateRow:
    """Row of the table of gates.

    Attributes:
        gate: Gate of the report.
        question: Question that the gate answers.
        result: `passed` or `failed`.
        largest: Largest error; None for a gate that does not measure.
    """

    gate: Json
    question: str
    result: str
    largest: LargestError | None


@dataclass(frozen=True)
class GateSection:
    """Gates of one checkpoint."""

    title: str
    rows: list[GateRow]


def gate_section(section: Json) -> GateSection:
    """Return the rows of the gates of one checkpoint."""
    rows = []
    for gate in section["gates"]:
        meaning = MEANING.get(gate["name"].split()[0])
        question = meaning.question if meaning else ""
        result = "passed" if gate["passed"] else "failed"
        rows.append(GateRow(gate, question, result, largest_error(gate)))
    return GateSection(section_title(section), rows)


def largest_error(gate: Json) -> LargestError | None:
    """Return the measurement with the largest error relative to its bound."""
    if not gate["measurements"]:
        return None
    largest = max(
        gate["measurements"], key=lambda measurement: to_float(measurement["bound_ratio"])
    )
    return LargestError(to_float(largest["bound_ratio"]), largest)


# --- plots ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TitledPlot:
    """Plot with a title."""

    title: str
    plot: Plot


def measuring_sections(report: Json) -> list[Json]:
    """Return the sections with measurements, the checkpoint first."""
    sections = []
    for section in report["sections"]:
        if any(gate["measurements"] for gate in section["gates"]):
            sections.append(section)
    return sorted(sections, key=lambda section: section["name"] != "checkpoint")


def depth_plots(report: Json) -> list[TitledPlot]:
    """Plot the errors at every tap in every run; one plot per checkpoint."""
    plots = []
    for section in measuring_sections(report):
        plots.append(TitledPlot(section_title(section), depth_plot(section)))
    return plots


def depth_plot(section: Json) -> Plot:
    """Plot the errors at every tap in every run on one checkpoint."""
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
    """Return the series of one run: errors of the port, rounding of the reference, and bound."""
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
            Series(f"{run}: port", color, "line", errors),
            Series(f"{run}: reference", color, "broad", noise),
        ]
    else:
        series = [Series(run, color, "dots", errors)]
    if run != FORCED_RUN:  # same bound as the free-running one
        label = "float64 bound" if run == FREE_RUN else f"{run} bound"
        series.append(Series(label, color, "bound", bounds))
    return series


def ratio_plots(report: Json) -> list[TitledPlot]:
    """Plot the rounding errors of port / reference at every tap; one plot per gate."""
    plots = []
    for section in measuring_sections(report):
        for gate in section["gates"]:
            if gate["name"].startswith("rounding") and gate["measurements"]:
                title = f"{gate['name']}: {section_title(section)}"
                plots.append(TitledPlot(title, ratio_plot(measurements_of(gate))))
    return plots


def ratio_plot(measurements: list[Measurement]) -> Plot:
    """Plot the rounding errors of port / reference at every tap."""
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
        Series("1: same as the reference", "c5", "line", ones),
        Series("bound", "bad", "bound", bounds),
        Series("port", "c0", "dots", inside),
        Series("port, outside its bound", "bad", "dots", outside),
    ]
    return build_plot(series, hover_texts(measurements))


def hover_texts(measurements: Iterable[Measurement]) -> dict[str, str]:
    """Return the tooltip of every tap: all its measurements."""
    texts: dict[str, str] = {}
    for item in measurements:
        text = f"\n{item.run}: {format_value(item.error)}, bound {format_value(item.bound)}"
        if not item.passed:
            text += ", FAILED"
        if item.noise:
            worst = format_value(item.worst)
            text += f"; reference {format_value(item.noise)}, worst vector error/bound {worst}"
        heading = f"{item.reference}\nport: {item.port}"
        texts[item.reference] = texts.get(item.reference, heading) + text
    return texts


# --- details --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Table of strings."""

    heads: list[str]
    rows: list[list[str]]


def output_table(report: Json) -> Table | None:
    """Return the table of the usual metrics; None if the report has none."""
    outputs = report.get("outputs")
    if not outputs:
        return None
    heads = list(dict.fromkeys(itertools.chain.from_iterable(outputs)))
    rows = [[format_value(item.get(head, "")) for head in heads] for item in outputs]
    return Table([head.replace("_", " ") for head in heads], rows)


def details(report: Json) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the remaining parts of the report: titles, and names with values."""
    sections = []
    for key in ("provenance", "config", "environment", "reference_shapes"):
        fields = report.get(key) or {}
        if fields:
            items = [(name, format_value(value)) for name, value in fields.items()]
            sections.append((key.replace("_", " ").capitalize(), items))
    return sections
