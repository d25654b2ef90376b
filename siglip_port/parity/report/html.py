"""The report as one page that explains itself: no script, no font, no file beside it.

It is made of the JSON alone.
"""

from __future__ import annotations

import base64
import io
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from torch import Tensor

from siglip_port.parity.gates import MEANING
from siglip_port.parity.results import Measurement

Json = dict[str, Any]

FINDINGS_SHOWN = 20
_FREE, _FORCED = "float64, free-running", "float64, teacher-forced"
_ASKS = {name: meaning.question for name, meaning in MEANING.items()}
_INTRO = """<p>A <b>port</b> is a second implementation of a neural network. This page says whether it computes the same
as the <b>reference</b>. Both were given the same weights and inputs, and compared at every <b>tap</b>: a point inside
where both must hold the same numbers. Errors are relative, ‖port - truth‖ / ‖truth‖, and the truth is the reference
computed in float64. Rest the pointer on a mark to read its figures.</p>"""
_DEPTH = """<p>From the first tap on the left to the outputs on the right. <b>Free-running</b>: the port runs on its
own, and what goes wrong early is carried on. <b>Teacher-forced</b>: every step is given the reference's right numbers,
so only a step that is itself wrong shows an error. Where rounding is judged, the broad pale line is what the reference
itself loses in that dtype, and the thin one is the port. A <b>dashed line</b> is the bound of what has its colour. A
red arrow is a finding.</p>"""
_RATIOS = """<p>How coarsely the port rounds, in units of how coarsely the reference does: 1 is just alike. The dashed
line is the bound; what is outside it, as a whole or with its worst vector, is red.</p>"""
_PATCHES = """<p>How alike the port's and the reference's vector of every patch are, drawn as 1 - cosine: 0 is the same
direction, 1 has nothing in common. Mean cosine <b>{}</b>, smallest <b>{}</b>.</p><p>{}</p>"""

_COLOURS = {_FREE: "c0", _FORCED: "c1", "bfloat16": "c3", "float16": "c4"}
_KINDS = ("bound", "broad", "line", "dots")  # in this order they are drawn, one over the other
_HEAT = ((13, 8, 135), (126, 3, 168), (204, 71, 120), (248, 149, 64), (240, 249, 33))
_LEFT, _TOP, _LANE = 78.0, 44.0, 9.0
_CSS = """
:root{color-scheme:light dark;--bg:#f4f6f8;--card:#fff;--ink:#1b2430;--soft:#5b6777;--line:#dde3ea;--stripe:#f3f5f9;
--good:#15803d;--bad:#d02020;--c0:#1f6feb;--c1:#e08700;--c2:#0d9488;--c3:#8b5cf6;--c4:#db2777;--c5:#7b8696}
@media(prefers-color-scheme:dark){:root{--bg:#0e1319;--card:#171e27;--ink:#e6ebf1;--soft:#9aa7b6;--line:#303b48;
--stripe:#1d2631;--good:#4cc38a;--bad:#ff6b6b;--c0:#5b9dff;--c1:#f5a83b;--c2:#2dc7b7;--c3:#ab8bff;--c4:#f472b0}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1180px;margin:auto;padding:16px}p{max-width:84ch;margin:.4em 0 .8em}h2{margin:0 0 .3em;font-size:1.25rem}
section,header{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:18px 20px;margin:0 0 16px;
overflow-wrap:anywhere}header{color:#fff;border:0;background:#15703a}header.different{background:#b91c1c}h1{margin:0;
font-size:2.1rem;line-height:1.2}h1 small{font-size:1rem;font-weight:400}small{color:var(--soft);font-size:.85em}
header small{color:inherit;opacity:.9}header p{max-width:none}code{font:.95em ui-monospace,monospace}
.tiles{display:flex;flex-wrap:wrap;gap:10px 40px;margin:12px 0}.tiles b{display:block;font-size:1.5rem;line-height:1.3}
.guilty{border:2px solid var(--bad)}.guilty>code{font-size:1.4rem;font-weight:600}.guilty h2,.failed{color:var(--bad)}
.passed{color:var(--good)}.failed,.passed{font-weight:600}.wide{overflow-x:auto}table{border-collapse:collapse;
width:100%;min-width:840px;font-size:.9rem;overflow-wrap:normal}th,td{text-align:left;vertical-align:top;
padding:6px 14px 6px 0;border-bottom:1px solid var(--line)}td>small{display:block;min-width:13em}
.group th{padding-top:18px}.bar{display:block;width:120px;height:7px;border-radius:4px;background:var(--line);
margin:5px 0;overflow:hidden}.bar i{display:block;height:100%;background:var(--good)}.bar .failed{background:var(--bad)}
details{margin:8px 0}summary{cursor:pointer;padding:4px 0;font-weight:600}dl{display:grid;
grid-template-columns:max-content 1fr;gap:2px 20px;margin:6px 0;font-size:.9rem}dt{color:var(--soft)}dd{margin:0}
figure{margin:0 0 10px}figcaption{font-weight:600;margin:8px 0 4px}.keys{display:flex;flex-wrap:wrap;gap:2px 22px;
font-size:.85rem}.keys i{display:inline-block;width:18px;height:3px;border-radius:5px;background:var(--c);
margin-right:7px;vertical-align:middle}.keys .dots i{width:9px;height:9px}.keys .broad i{height:9px;opacity:.35}
.plot{display:block;width:100%}.plot text{font-size:11.5px;fill:var(--soft);paint-order:stroke;stroke:var(--card);
stroke-width:3px}.plot path{fill:none;stroke:var(--c)}.plot .guide{stroke:var(--line)}.plot .dots{stroke-width:5.5;
stroke-linecap:round}.plot .line{stroke-width:1.6;stroke-linecap:round}.plot .broad{stroke-width:8;stroke-linecap:round;
opacity:.3;stroke-linejoin:round}.plot .bound{stroke-dasharray:6 4}.plot path.mark{fill:var(--bad);stroke:var(--bad);
stroke-opacity:.4}.plot text.mark{fill:var(--bad);font-weight:600}.stripe{fill:var(--stripe)}.hit{fill:transparent}
.hit:hover{fill:var(--ink);fill-opacity:.1}.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}
.c4{--c:var(--c4)}.c5{--c:var(--c5)}.bad{--c:var(--bad)}.maps{display:flex;flex-wrap:wrap;gap:20px}
.maps figure{flex:0 1 350px}.maps svg{display:block;border-radius:6px}.scale{height:10px;border-radius:5px;
margin:8px 0 2px}.ends{display:flex;justify-content:space-between;font-size:.8rem;color:var(--soft)}
@media(max-width:600px){main{padding:8px}section,header{padding:14px}h1{font-size:1.6rem}dl{grid-template-columns:1fr}}
@media print{*{print-color-adjust:exact}body{background:none}table{min-width:0}figure,tr{break-inside:avoid}
.plot{min-width:0!important}.wide{overflow:visible}}
"""


def picture(pixel_values: Tensor) -> str:
    """A picture as a PNG inside a data URI.

    Args:
        pixel_values: [C, S, S], floats in [-1, 1]; of other than 3 channels, the first is drawn in
            grey.
    """
    from PIL import Image  # not needed to import this module

    levels = (
        ((pixel_values.detach().cpu().float() + 1) * 127.5)
        .nan_to_num()
        .round()
        .clamp(0, 255)
        .byte()
    )
    pixels = levels.permute(1, 2, 0) if levels.shape[0] == 3 else levels[0]
    file = io.BytesIO()
    Image.fromarray(pixels.contiguous().numpy()).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def page(report: dict[str, Any], picture: str) -> str:
    """The whole page.

    Args:
        report: the JSON report (see `siglip_port.parity.report.document.to_json`).
        picture: what `picture` returned for the first picture; empty for none.
    """
    measured = [section for section in report["sections"] if _measured(section["gates"])]
    measured.sort(
        key=lambda section: section["name"] != "checkpoint"
    )  # apart from it, they stay in order
    depth = [_figure(_name(section), _depth(section)) for section in measured]
    ratios = [
        _figure(f"{gate['name']}: {_name(section)}", _ratio(gate))
        for section in measured
        for gate in section["gates"]
        if gate["name"].startswith("rounding") and gate["measurements"]
    ]
    more = _folded(f"More checkpoints: {len(depth) - 1}", "".join(depth[1:]))
    body = [
        _banner(report),
        _guilty(report),
        _section("What this is", _INTRO),
        _section("Error over depth", _DEPTH + depth[0] + more if depth else ""),
        _section("The picture, patch by patch", _patches(report, picture)),
        _section(
            "Rounding, against the reference's own", _RATIOS + "".join(ratios) if ratios else ""
        ),
        _section("The gates", _gates(report)),
        _section("What was found", _findings(report["findings"])),
        _section("For the record", _record(report)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8">'
        f"<title>Parity: {'equal' if report['equal'] else 'different'}</title>"
        f'<meta name="viewport" content="width=device-width, '
        f'initial-scale=1"><style>{_CSS}</style></head>\n'
        f"<body><main>\n{''.join(body)}</main></body>\n</html>\n"
    )


def _measured(gates: Iterable[Json]) -> list[Measurement]:
    """The measurements of some gates. What is not finite is a text in JSON."""
    return [
        Measurement(
            m["run"],
            m["reference"],
            m["port"],
            *(float(m[k]) for k in ("error", "bound", "noise", "worst")),
        )
        for gate in gates
        for m in gate["measurements"]
    ]


# --- text -----------------------------------------------------------------------------------------


def _section(title: str, body: str, look: str = "") -> str:
    return f'<section class="{look}"><h2>{escape(title)}</h2>{body}</section>\n' if body else ""


def _figure(title: str, body: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{body}</figure>\n"


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>" if body else ""


def _table(heads: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML; a row of a single cell is a heading across all columns."""
    body = "".join(f"<th>{head}</th>" for head in heads)
    for row in rows:
        cells = "".join(f"<td>{cell}</td>" for cell in row)
        body += (
            f"</tr>\n<tr>{cells}"
            if len(row) > 1
            else f'</tr>\n<tr class="group"><th colspan="9">{row[0]}</th>'
        )
    return f'<div class="wide"><table><tr>{body}</tr></table></div>'


def _tiles(tiles: Iterable[tuple[str, str]]) -> str:
    return f'<div class="tiles">{"".join(f"<div><b>{escape(n)}</b>{escape(what)}</div>" for n, what in tiles)}</div>'


def _name(section: Json) -> str:
    return f"{section['name']} ({section['weights']})"


def _short(value: object) -> str:
    """Near 1 are cosines, whose last digits are the point.

    Of other numbers, the first digits are.
    """
    if isinstance(value, float):
        return f"{value:.12g}" if 0.9 < value < 1.1 else f"{value:.2g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_short(item)}" for key, item in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_short, value)) or "none"
    return "none" if value is None else str(value)


def _banner(report: Json) -> str:
    gates = [gate for section in report["sections"] for gate in section["gates"]]
    passed = f"{sum(gate['passed'] for gate in gates)} of {len(gates)}"
    checked = f"{sum(gate['checked'] for gate in gates):,}"
    return (
        f'<header class="{"equal" if report["equal"] else "different"}">'
        f"<h1>{'✓ Equal' if report['equal'] else '✗ Different'} "
        f"<small>{escape(report['weights'])}</small></h1>"
        f"{_tiles([(passed, 'gates passed'), (checked, 'things checked')])}<p>{escape(report['verdict'])}</p>"
        f"<small>{escape(_short(report.get('environment') or ''))}</small></header>\n"
    )


def _guilty(report: Json) -> str:
    """The first finding, large: the best address that there is of what makes the two differ."""
    if report["equal"] or not report["findings"]:
        return ""
    first = report["findings"][0]
    error, where = float(first["error"]), (first["section"], first["gate"])
    gates = [
        gate
        for s in report["sections"]
        for gate in s["gates"]
        if (s["name"], gate["name"]) == where
    ]
    bounds = [
        m.bound for m in _measured(gates) if (m.reference, m.error) == (first["reference"], error)
    ]
    tiles = [(f"{error:.1e}", "relative error")] if math.isfinite(error) else []
    if bounds:
        tiles.append((f"{bounds[0]:.1e}", "may be at most"))
        times = error / bounds[0] if bounds[0] else math.inf
        tiles.append((f"{times:,.0f}" if times >= 100 else f"{times:.3g}", "times what it may be"))
    body = f"<code>{escape(first['reference'] or first['port'] or first['what'])}</code>"
    body += f"<p>in the port: <code>{escape(first['port'])}</code></p>" if first["port"] else ""
    body += (
        _tiles(tiles)
        + f"<p>Gate {escape(first['gate'])}, {escape(first['section'])}: {escape(first['what'])}.</p>"
    )
    body += f"<p>Looks like: <b>{escape(first['hint'])}</b></p>" if first["hint"] else ""
    return _section("Where the two part ways first", body, "guilty")


def _gates(report: Json) -> str:
    rows = []
    for section in report["sections"]:
        rows.append([escape(_name(section))])
        for gate in section["gates"]:
            share, result = "", "passed" if gate["passed"] else "failed"
            if gate["measurements"]:
                part, most = max(
                    ((_nan_last(m["share"]), m) for m in gate["measurements"]),
                    key=lambda item: item[0],
                )
                bar = f'<i class="{"failed" if part > 1 else ""}" style="width:{100 * min(part, 1):.1f}%"></i>'
                share = f'{part:.3g}<span class="bar">{bar}</span>'
                share += f"<small>{escape(most['reference'])}, {escape(most['run'])}</small>"
            what = f"<b>{escape(gate['name'])}</b><small>{_ASKS.get(gate['name'].split()[0], '')}</small>"
            bound = f"<small>{escape(gate['bound'])}</small>"
            rows.append(
                [
                    what,
                    f'<span class="{result}">{result}</span>',
                    f"{gate['checked']:,}",
                    share,
                    bound,
                ]
            )
    return _table(
        ["gate", "result", "checked", "largest share of its bound", "bound, and why"], rows
    )


def _nan_last(value: float | str) -> float:
    return math.inf if math.isnan(float(value)) else float(value)


def _findings(findings: list[Json]) -> str:
    if not findings:
        return "<p>Nothing that is not as it must be.</p>"
    rows = [
        (
            f"<code>{escape(f['reference'])}</code>"
            + (f"<small>port: {escape(f['port'])}</small>" if f["port"] else ""),
            f"{escape(f['gate'])}<small>{escape(f['section'])}</small>",
            "" if math.isnan(float(f["error"])) else f"{float(f['error']):.1e}",
            escape(f["what"]),
            escape(f["hint"]),
        )
        for f in findings
    ]
    heads = ("where", "gate", "relative error", "what", "looks like")
    more = _table(heads, rows[FINDINGS_SHOWN:]) if rows[FINDINGS_SHOWN:] else ""
    return _table(heads, rows[:FINDINGS_SHOWN]) + _folded(
        f"{len(rows) - FINDINGS_SHOWN} more", more
    )


def _record(report: Json) -> str:
    """All else that the report holds.

    Figures that people ask for, on which no gate rests, first.
    """
    text, outputs = "", report.get("outputs")
    if outputs:
        heads = list(dict.fromkeys(key for item in outputs for key in item))
        rows = [[escape(_short(item.get(head, ""))) for head in heads] for item in outputs]
        text = _table((escape(head.replace("_", " ")) for head in heads), rows)
        text = f"<details open><summary>Figures for people; no gate rests on them</summary>{text}</details>"
    for key in ("provenance", "config", "environment", "reference_shapes"):
        items = "".join(
            f"<dt>{escape(k)}</dt><dd>{escape(_short(v))}</dd>"
            for k, v in (report.get(key) or {}).items()
        )
        text += _folded(key.replace("_", " ").capitalize(), f"<dl>{items}</dl>" if items else "")
    return text


# --- plots ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Series:
    """One figure for each tap: its name, its colour, and how it is drawn, one of `_KINDS`."""

    name: str
    colour: str
    kind: str
    values: dict[str, float]


class _Plot:
    """Taps from left to right, powers of ten from bottom to top, and lanes for 0, inf and nan, which have no log."""

    def __init__(self, series: list[_Series]) -> None:
        self.series = sorted(
            (one for one in series if one.values), key=lambda one: _KINDS.index(one.kind)
        )
        names = list(dict.fromkeys(name for one in series for name in one.values))
        step = min(max(1000 / len(names), 3), max(420 / len(names), 60))
        self.x: dict[str, float] = {}
        self.blocks: list[tuple[str, float, float]] = []
        self.right = _LEFT
        for block, taps in itertools.groupby(names, _block):
            members = list(taps)
            width = max(step, 18 / len(members))
            self.x |= {name: self.right + width * (i + 0.5) for i, name in enumerate(members)}
            self.blocks.append((block, self.right, self.right + width * len(members)))
            self.right += width * len(members)
        logs = [
            math.log10(v) for one in series for v in one.values.values() if 0 < v < math.inf
        ] or [0.0]
        self.low, self.high = math.floor(min(logs)), math.floor(max(logs)) + 1
        self.decade = min(260 / (self.high - self.low), 60)
        self.bottom = _TOP + self.decade * (self.high - self.low)
        self.lanes = [one for one in self.series if 0.0 in one.values.values()]
        self.floor = self.bottom + (_LANE * len(self.lanes) + 10 if self.lanes else 0)

    def y(self, one: _Series, value: float) -> float:
        if not math.isfinite(value):
            return _TOP - 8
        if value <= 0:
            return self.bottom + _LANE * (self.lanes.index(one) + 0.5) + 8
        return _TOP + self.decade * (self.high - math.log10(value))

    def draw(self, hover: Mapping[str, str], marks: Iterable[str] = ()) -> str:
        """The legend and the plot, with a text to hover at each tap, and arrows at some, the first of them named."""
        body = self._grid() + "".join(map(self._path, self.series))
        marked = [name for name in self.x if name in set(marks)]
        for name in marked:
            body += f'<path class="mark" d="M{self.x[name]:.1f},{self.floor:.1f}V28l-4,-8h8l-4,8"/>'
        for name in marked[:1]:
            body += _label(
                max(min(self.x[name], self.right - 7 * len(name)), 4), 12, name, "start", "mark"
            )
        edges = [
            _LEFT,
            *(sum(pair) / 2 for pair in itertools.pairwise(self.x.values())),
            self.right,
        ]
        for name, (left, right) in zip(self.x, itertools.pairwise(edges), strict=True):
            body += f'<rect class="hit" x="{left:.1f}" y="{_TOP - 14}" width="{right - left:.1f}" '
            body += (
                f'height="{self.floor - _TOP + 14:.1f}"><title>{escape(hover[name])}</title></rect>'
            )
        width, top = self.right + 14, 0 if marked else 20
        below = (
            28 if all(_fitting(block, right - left) for block, left, right in self.blocks) else 76
        )
        size = f"min-width:{min(width, 1000):.0f}px;max-width:{width:.0f}px"
        box = f"0 {top} {width:.1f} {self.floor + below - top:.1f}"
        svg = f'<svg class="plot" role="img" viewBox="{box}" style="{size}">{body}</svg>'
        keys = "".join(
            _key(one) for one in self.series if one.kind != "bound"
        )  # bounds are named in the plot
        return f'<div class="keys">{keys}</div><div class="wide">{svg}</div>'

    def _grid(self) -> str:
        body = ""
        for i, (block, left, right) in enumerate(self.blocks):
            box = f'x="{left:.1f}" y="{_TOP}" width="{right - left:.1f}" height="{self.floor - _TOP:.1f}"'
            body += f'<rect class="stripe" {box}/>' if i % 2 == 0 else ""
            x, y, text = (left + right) / 2, self.floor + 16, _fitting(block, right - left)
            short = block if len(block) < 15 else f"{block[:13]}…"
            body += _label(x, y, text) if text else _label(x + 5, y - 4, short, "end", turn=-45)
        for power in range(self.low, self.high + 1, math.ceil(18 / self.decade)):
            y = _TOP + self.decade * (self.high - power)
            body += f'<path class="guide" d="M{_LEFT},{y:.1f}H{self.right:.1f}"/>'
            text = f"{10.0**power:g}" if -5 < power < 6 else f"1e{power:+03d}"
            body += _label(_LEFT - 8, y + 4, text, "end")
        if self.lanes:
            body += _label(_LEFT - 8, (self.bottom + self.floor) / 2 + 8, "exactly 0", "end")
        if not all(math.isfinite(value) for one in self.series for value in one.values.values()):
            body += _label(_LEFT - 8, _TOP - 5, "inf or nan", "end")
        return body

    def _path(self, one: _Series) -> str:
        path, drawing, first = "", False, next(iter(one.values.values()))
        for name, value in one.values.items():
            joined = drawing and 0 < value < math.inf and one.kind != "dots"
            path += f"{'L' if joined else 'M'}{self.x[name]:.1f},{self.y(one, value):.1f}{'' if joined else 'h0'}"
            drawing = 0 < value < math.inf
        label = ""
        if one.kind in ("bound", "line") and all(
            math.isclose(first, value) for value in one.values.values()
        ):
            y = self.y(one, first)
            path = f"M{_LEFT},{y:.1f}H{self.right:.1f}"
            label = (
                _label(_LEFT + 6, y - 5, f"{one.name}: {first:.3g}", "start")
                if one.kind == "bound"
                else ""
            )
        return f'<path class="{one.kind} {one.colour}" d="{path}"/>{label}'


def _key(one: _Series) -> str:
    zeros = sum(value == 0 for value in one.values.values())
    count = f" ({zeros} of {len(one.values)} exactly 0)" if zeros else ""
    return f'<span class="{one.kind} {one.colour}"><i></i>{escape(one.name)}{count}</span>'


def _label(
    x: float, y: float, text: str, anchor: str = "middle", look: str = "", turn: int = 0
) -> str:
    turned = f' transform="rotate({turn} {x:.1f} {y:.1f})"' if turn else ""
    return f'<text class="{look}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turned}>{escape(text)}</text>'


def _fitting(block: str, width: float) -> str:
    """As much of the end of a path as has room; nothing if not even its last part has."""
    parts = block.split(".")
    ends = (".".join(parts[i:]) for i in range(len(parts)))
    return next((end for end in ends if 7 * len(end) < width), "")


def _block(name: str) -> str:
    """What a tap belongs to: its path up to the first number, else the first part of it."""
    numbered = re.match(r"(?:[^.:]+\.)*?\d+(?=[.:]|$)", name)
    return numbered[0] if numbered else re.split(r"[.:]", name)[0]


def _hover(found: Iterable[Measurement]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for m in found:
        text = (
            f"\n{m.run}: {_short(m.error)}, bound {_short(m.bound)}{'' if m.passed else ', FAILED'}"
        )
        text += (
            f"; the reference {_short(m.noise)}, worst vector {_short(m.worst)} of its bound"
            if m.noise
            else ""
        )
        texts[m.reference] = texts.get(m.reference, f"{m.reference}\nin the port: {m.port}") + text
    return texts


def _depth(section: Json) -> str:
    """Errors at every tap, of every run."""
    found, series = _measured(section["gates"]), []
    for run in dict.fromkeys(m.run for m in found):
        mine = [m for m in found if m.run == run]
        colour, rounds = _COLOURS.get(run, "c2"), any(m.noise for m in mine)
        error, noise = {m.reference: m.error for m in mine}, {m.reference: m.noise for m in mine}
        series.append(
            _Series(
                f"{run}: the port" if rounds else run, colour, "line" if rounds else "dots", error
            )
        )
        series += [_Series(f"{run}: the reference", colour, "broad", noise)] if rounds else []
        if run != _FORCED:  # its bound is that of the free-running one
            label = "bound of the float64 runs" if run == _FREE else f"bound of {run}"
            series.append(
                _Series(label, colour, "bound", {m.reference: m.bound for m in mine if m.bound > 0})
            )
    return _Plot(series).draw(
        _hover(found), [f["reference"] for g in section["gates"] for f in g["findings"]]
    )


def _ratio(gate: Json) -> str:
    """The port's rounding in units of the reference's, at every tap."""
    found = _measured([gate])
    series = [
        _Series("1: as the reference", "c5", "line", {m.reference: 1.0 for m in found}),
        _Series(
            "bound", "bad", "bound", {m.reference: m.bound / m.noise for m in found if m.noise}
        ),
        _Series("the port", "c0", "dots", {m.reference: m.ratio for m in found if m.passed}),
        _Series(
            "the port, outside its bound",
            "bad",
            "dots",
            {m.reference: m.ratio for m in found if not m.passed},
        ),
    ]
    return _Plot(series).draw(_hover(found))


# --- patches --------------------------------------------------------------------------------------


def _patches(report: Json, picture: str) -> str:
    """Heat maps of 1 - cosine over the picture.

    On a scale that is always the same, and on this report's own.
    """
    patches, config = report.get("patches") or {}, report.get("config") or {}
    away = [max(1 - float(cosine), 0.0) for cosine in patches.get("cosine", [])]
    finite = [value for value in away if math.isfinite(value)]
    if not finite:
        return "<p>No cosine is finite.</p>" if away else ""
    # Pixels beyond the last whole patch belong to none.
    grid = int(patches["grid"])
    side = (
        config["image_size"] / config["patch_size"]
        if {"image_size", "patch_size"} <= config.keys()
        else grid
    )
    svg = f'<svg viewBox="0 0 {side:g} {side:g}">{{}}</svg>'
    image = f'<image id="input" href="{escape(picture)}" width="{side:g}" height="{side:g}"/>'
    maps = _figure("The picture", svg.format(image)) if picture else ""
    logs = [math.log10(value) for value in finite if value > 0]
    scales = {"1 - cosine, fixed scale": (-16.0, 0.0)}
    scales |= {"1 - cosine, this report's own scale": (min(logs), max(logs))} if logs else {}
    for title, (low, high) in scales.items():
        cells = "".join(
            f'<rect x="{i % grid}" y="{i // grid}" width="1" height="1" '
            f'fill="{_heat(value, low, high)}">'
            f"<title>row {i // grid}, column {i % grid}: 1 - cosine = {value:.3g}</title></rect>"
            for i, value in enumerate(away)
        )
        colours = ",".join(_heat(10 ** (low + (high - low) * i / 8), low, high) for i in range(9))
        ends = f'<div class="ends"><span>{10**low:.2g}</span><span>{10**high:.2g}</span></div>'
        legend = (
            f'<div class="scale" style="background:linear-gradient(90deg,{colours})"></div>{ends}'
        )
        maps += _figure(
            title, svg.format(('<use href="#input"/>' if picture else "") + cells) + legend
        )
    text = _PATCHES.format(
        _cosine(sum(finite) / len(finite)), _cosine(max(finite)), _digits(away, report["equal"])
    )
    return f'{text}<div class="maps">{maps}</div>'


def _cosine(away: float) -> str:
    return f"1 - {away:.1e}" if 0 < away < 1e-3 else f"{1 - away:.6g}"


def _digits(away: list[float], equal: bool) -> str:
    """What the cosines tell, and what they do not."""
    most = max(away, key=_nan_last)
    if most == 0:
        return "All are exactly 1."
    if not most < 1e-3:
        return "" if math.isfinite(most) else "Those that are grey are not finite."
    rest = (
        "what remains is rounding"
        if equal
        else "yet the two differ: an error e takes only e²/2 from a cosine"
    )
    return f"All are 1 to {-math.ceil(math.log10(most))} digits; {rest}. No gate rests on cosines."


def _heat(value: float, low: float, high: float) -> str:
    """The larger, the brighter and the less transparent."""
    if not math.isfinite(value):
        return "#888"
    share = (
        0.0
        if value == 0
        else 0.5
        if high == low
        else min(max((math.log10(value) - low) / (high - low), 0), 1)
    )
    i = min(int(share * (len(_HEAT) - 1)), len(_HEAT) - 2)
    part = share * (len(_HEAT) - 1) - i
    red, green, blue = (
        round(a + (b - a) * part) for a, b in zip(_HEAT[i], _HEAT[i + 1], strict=True)
    )
    return f"rgba({red},{green},{blue},{0.1 + 0.7 * share:.2f})"
