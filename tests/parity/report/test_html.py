from __future__ import annotations

import base64
import copy
import io
import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from siglip_port.parity.report import Json, dumps, to_json
from siglip_port.parity.report.html import image_data_uri, render_page
from siglip_port.parity.results import Comparison, Finding, GateResult, Measurement, Section

SCRIPT = "<script>alert('&')</script>"
TAPS = (
    "embeddings",
    "encoder.layers.0.mlp:input",
    "encoder.layers.0",
    "encoder.layers.1.mlp:input",
    "encoder.layers.1",
)
RUNS = ("float64, free-running", "float64, teacher-forced")


class Reader(HTMLParser):
    """Parses a page; unbalanced tags and external resources are errors."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert len(dict(attrs)) == len(attrs), f"{tag} has an attribute twice"
        for name, value in attrs:
            text = value or ""
            if name in ("d", "x", "y", "width", "height"):
                assert not re.search("nan|inf", text), text
            if name in ("src", "href", "srcset"):
                assert text.startswith(("data:", "#")), text

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read_text(report: Json) -> str:
    """Return the text of the page of a report."""
    return " ".join(Reader(render_page(report, "")).text.split())


def make_report(error: float = 0.0, *, findings: int = 0, rounded: float = 1e-7) -> Json:
    """Make a report of two gates that measure.

    Args:
        error: error of the last tap in float64.
        findings: number of findings.
        rounded: error of the last tap in float32.
    """
    *others, last = TAPS
    numerics = [Measurement(run, tap, f"port.{tap}", 0.0, 1e-10) for run in RUNS for tap in others]
    numerics += [Measurement(run, last, f"port.{last}", error, 1e-10) for run in RUNS]
    rounding = [Measurement("float32", tap, f"port.{tap}", 1e-7, 3e-7, 1e-7, 0.2) for tap in others]
    rounding.append(Measurement("float32", last, f"port.{last}", rounded, 3e-7, 1e-7, 0.2))
    finding = Finding("differs", last, f"port.{last}", error, SCRIPT)
    gates = (
        GateResult("weights", 3, "bitwise equality"),
        GateResult("numerics", len(numerics), "1e-10", (finding,) * findings, tuple(numerics)),
        GateResult("rounding float32", len(rounding), "3 x", (), tuple(rounding)),
    )
    sections = (Section("checkpoint", "N1", gates), Section("small", "S1", gates[1:]))
    return to_json(
        Comparison(sections, "random weights"),
        environment={"torch": "2", SCRIPT: SCRIPT},
        config={"image_size": 29, "patch_size": 14},
        outputs=[
            {"point": "tokens", "shape": [2, 4, 8], "cosine_min": 0.999999999, SCRIPT: SCRIPT}
        ],
        provenance={"commit": None, "files": [], "ignored": {"name": SCRIPT}},
        patches={"grid": 2, "cosine": [1.0, 0.5, 1 - 1e-9, 1.0000000000000002]},
    )


@pytest.mark.parametrize("findings", [0, 1, 25])
def test_page_is_well_formed_and_self_contained(findings: int) -> None:
    report = make_report(1e-3 * findings, findings=findings)
    page = render_page(report, image_data_uri(torch.zeros(3, 28, 28)))
    tags = Reader(page).tags
    assert not {"script", "link", "img", "iframe"} & set(tags)
    assert not any(text in page for text in ("http", "url(", "@import", "src="))
    assert page.startswith("<!DOCTYPE html>\n")
    assert page.count("data:image/png") == 1  # shared by all heat maps
    assert tags.count("image") == 1
    assert tags.count("use") == 2


@pytest.mark.parametrize(
    "broken", ["<p><b></p>", "<p>", "</p>", '<img src="//x.org/y.png">', '<i id="a" id="b"></i>']
)
def test_reader_rejects_broken_pages(broken: str) -> None:
    with pytest.raises((AssertionError, IndexError)):
        Reader(broken)


def test_text_is_escaped() -> None:
    report = make_report(1e-3, findings=1)
    for key in ("verdict", "weights"):
        report[key] = SCRIPT
    report["findings"][0] |= dict.fromkeys(
        ("section", "gate", "message", "reference", "port"), SCRIPT
    )
    for section in report["sections"]:
        section |= {"name": SCRIPT, "weights": SCRIPT}
        for gate in section["gates"]:
            gate["bound"] = SCRIPT
            if not gate["measurements"]:
                gate["name"] = SCRIPT
            for measurement in gate["measurements"]:
                measurement |= {"reference": SCRIPT, "port": SCRIPT, "run": SCRIPT}
    page = render_page(report, '"><script>')
    assert "<script" not in page
    assert 'href="&#34;&gt;&lt;script&gt;"' in page
    page = page.replace('href="&#34;', 'href="#&#34;')
    assert Reader(page).text.count(SCRIPT) > 20


def test_page_of_equal_models() -> None:
    text = read_text(make_report())
    assert "✓ Equal" in text
    assert "First difference" not in text
    assert "4 of 5" not in text


def test_page_of_different_models() -> None:
    text = read_text(make_report(1e-3, findings=2))
    assert "✗ Different" in text
    text_after = text[text.index("First difference") :]
    positions = [
        text_after.index("encoder.layers.1"),
        text_after.index("port: port.encoder.layers.1"),
        text_after.index("10,000,000"),
    ]
    assert positions == sorted(positions)
    assert "3 of 5" in text  # the checkpoint and the small model each have the finding


def test_zeros_are_drawn_and_counted() -> None:
    page = render_page(make_report(), "")
    assert "exactly 0" in page
    assert "(5 of 5 exactly 0)" in page
    assert page.count('class="hit"') == 4 * len(TAPS)  # depth and ratios of both
    page = render_page(make_report(1e-16), "")
    assert page.count("(4 of 5 exactly 0)") == 4  # two runs of two checkpoints


def test_error_outside_its_bound_is_red() -> None:
    assert "outside its bound" not in render_page(make_report(rounded=3e-7), "")
    page = render_page(make_report(rounded=3.1e-7), "")
    assert "outside its bound" in page
    outside = re.findall(r'class="dots bad" d="(.*?)"', page)
    inside = re.findall(r'class="dots c0" d="(.*?)"', page)
    assert [path.count("h0") for path in outside] == [1, 1]
    assert [path.count("h0") for path in inside] == [5, 5, 4, 4]  # depth, then ratios


@pytest.mark.parametrize("error", [0.0, 5e-324, 1e308, math.inf, math.nan])
@pytest.mark.parametrize("noise", [0.0, 1e-300, math.inf, math.nan])
def test_extreme_numbers(error: float, noise: float) -> None:
    report = make_report(error, findings=1, rounded=error)
    for section in report["sections"]:
        for measurement in section["gates"][-1]["measurements"]:
            measurement["reference_error"] = noise if math.isfinite(noise) else str(noise)
            measurement["bound"] = str(3 * noise)
    report["patches"]["cosine"] = ["nan", "inf", "-inf", 1.0]
    report["outputs"][0]["cosine_min"] = "nan"
    text = read_text(report)
    assert math.isfinite(error) or "inf or nan" in text


def test_no_lane_for_finite_values() -> None:
    assert "inf or nan" not in read_text(make_report(1e-3, findings=1))


@pytest.mark.parametrize(
    "key", ["config", "patches", "outputs", "provenance", "environment", "reference_shapes"]
)
def test_optional_keys(key: str) -> None:
    report = make_report(1e-3, findings=1)
    read_text(report | {key: None})
    report.pop(key, None)
    read_text(report)


def test_page_without_gates() -> None:
    assert "no gate ran" in read_text(to_json(Comparison(())))


def test_findings_without_module() -> None:
    gates = (
        GateResult("sensitivity", 1, "equality", (Finding("two runs differ"),)),
        GateResult("numerics", 0, "1e-10"),
    )
    text = read_text(to_json(Comparison((Section("Encoder", "as given", gates),))))
    assert "gate numerics checked nothing" in text
    assert "two runs differ" in text
    assert "nan" not in text  # the finding has no error


def test_page_is_deterministic() -> None:
    report = make_report(1e-3, findings=3)
    original = copy.deepcopy(report)
    page = render_page(report, "data:")
    assert page == render_page(json.loads(dumps(report)), "data:")
    assert report == original
    assert page != render_page(make_report(2e-3, findings=3), "data:")


def test_many_findings_are_folded() -> None:
    few = render_page(make_report(1e-3, findings=10), "")  # each in both checkpoints
    many = render_page(make_report(1e-3, findings=11), "")
    assert "2 more" not in few
    assert "2 more" in many
    assert few.count("<code>encoder") == 21  # the first also at the top
    assert many.count("<code>encoder") == 23


@pytest.mark.parametrize(
    ("cosine", "text"),
    [
        ([1.0] * 4, "All cosines are exactly 1."),
        ([1.0, 1.0, 1.0, 1 - 2e-9], "All cosines are 1 to 8 digits"),
        ([1.0, 1.0, 1.0, 0.5], "smallest 0.5"),
        ([1.0, 1.0, "nan", 1.0], "not finite"),
        (["nan"] * 4, "No cosine is finite"),
    ],
)
def test_cosines_of_patches(cosine: list[float | str], text: str) -> None:
    report = make_report()
    report["patches"]["cosine"] = cosine
    page_text = read_text(report)
    assert text in page_text
    assert ("the rest is rounding" in page_text) == ("digits" in text)


def test_image_is_not_multiple_of_its_patches() -> None:
    page = render_page(make_report(), "data:")
    assert 'viewBox="0 0 2.07143 2.07143"' in page  # 29 pixels, patches of 14
    assert page.count("row 1, column 1:") == 2


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_image_data_uri(channels: int) -> None:
    values = torch.tensor([-1.0, 0.0, 1.0, 7.0]).reshape(1, 2, 2).repeat(channels, 1, 1).bfloat16()
    uri = image_data_uri(values)
    assert uri.startswith("data:image/png;base64,")
    image = open_data_uri(uri)
    assert image.size == (2, 2)
    assert image.mode == ("RGB" if channels == 3 else "L")
    assert list(image.convert("L").tobytes()) == [0, 128, 255, 255]


def test_image_keeps_its_colors_and_rows() -> None:
    values = torch.full((3, 2, 2), -1.0)
    values[2, 0, 1] = 1.0  # blue, top right
    image = open_data_uri(image_data_uri(values))
    assert image.getpixel((1, 0)) == (0, 0, 255)
    assert image.getpixel((0, 1)) == (0, 0, 0)


def open_data_uri(uri: str) -> Image.Image:
    """The image inside a data URI."""
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
