from __future__ import annotations

import base64
import copy
import io
import json
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from PIL import Image

from siglip_port.parity.report import document as report
from siglip_port.parity.report import html
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
    """Reads a page; an unbalanced tag, or anything that a browser would fetch, is an error."""

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
        self.open += [] if tag == "meta" else [tag]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert len(dict(attrs)) == len(attrs), f"{tag} has an attribute twice"
        for name, value in attrs:
            assert name not in ("d", "x", "y", "width", "height") or not re.search(
                "nan|inf", value or ""
            ), value
            assert name not in ("src", "href", "srcset") or (value or "").startswith(
                ("data:", "#")
            ), value

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def make(error: float = 0.0, *, findings: int = 0, rounded: float = 1e-7) -> dict[str, Any]:
    """A report on two gates that measure.

    `error` is that of the last tap in float64, `rounded` that in float32.
    """
    semantics = [
        Measurement(run, tap, f"port.{tap}", 0.0, 1e-10) for run in RUNS for tap in TAPS[:-1]
    ]
    semantics += [Measurement(run, TAPS[-1], f"port.{TAPS[-1]}", error, 1e-10) for run in RUNS]
    rounding = [
        Measurement("float32", tap, f"port.{tap}", 1e-7, 3e-7, 1e-7, 0.2) for tap in TAPS[:-1]
    ]
    rounding.append(Measurement("float32", TAPS[-1], f"port.{TAPS[-1]}", rounded, 3e-7, 1e-7, 0.2))
    found = tuple(
        Finding("differs", TAPS[-1], f"port.{TAPS[-1]}", error, SCRIPT) for _ in range(findings)
    )
    gates = (
        GateResult("weights", 3, "equality of every bit"),
        GateResult("semantics", len(semantics), "1e-10", found, tuple(semantics)),
        GateResult("rounding float32", len(rounding), "3 x", (), tuple(rounding)),
    )
    return report.to_json(
        Comparison(
            (Section("checkpoint", "N1", gates), Section("small", "S1", gates[1:])),
            "random weights",
        ),
        environment={"torch": "2", SCRIPT: SCRIPT},
        config={"image_size": 29, "patch_size": 14},
        outputs=[
            {"point": "tokens", "shape": [2, 4, 8], "cosine_min": 0.999999999, SCRIPT: SCRIPT}
        ],
        provenance={"commit": None, "files": [], "dropped": {"name": SCRIPT}},
        patches={"grid": 2, "cosine": [1.0, 0.5, 1 - 1e-9, 1.0000000000000002]},
    )


@pytest.mark.parametrize("findings", [0, 1, 25])
def test_the_page_is_whole_and_alone(findings: int) -> None:
    page = html.page(make(1e-3 * findings, findings=findings), html.picture(torch.zeros(3, 28, 28)))
    tags = Reader(page).tags
    assert not {"script", "link", "img", "iframe"} & set(tags)
    assert not any(text in page for text in ("http", "url(", "@import", "src="))
    assert page.count("data:image/png") == 1  # the maps use the one picture, whatever their number
    assert tags.count("image") == 1
    assert tags.count("use") == 2


@pytest.mark.parametrize(
    "broken", ["<p><b></p>", "<p>", "</p>", '<img src="//x.org/y.png">', '<i id="a" id="b"></i>']
)
def test_the_reader_notices(broken: str) -> None:
    with pytest.raises((AssertionError, IndexError)):
        Reader(broken)


def test_text_is_escaped() -> None:
    found = make(1e-3, findings=1)
    for key in ("verdict", "weights"):
        found[key] = SCRIPT
    found["findings"][0] |= dict.fromkeys(("section", "gate", "what", "reference", "port"), SCRIPT)
    for section in found["sections"]:
        section |= {"name": SCRIPT, "weights": SCRIPT}
        for gate in section["gates"]:
            gate |= {"bound": SCRIPT} | ({} if gate["measurements"] else {"name": SCRIPT})
            for measurement in gate["measurements"]:
                measurement |= {"reference": SCRIPT, "port": SCRIPT, "run": SCRIPT}
    page = html.page(found, '"><script>')
    assert "<script" not in page
    assert Reader(page.replace('href="&quot;', 'href="#&quot;')).text.count(SCRIPT) > 20


def test_equal_and_different() -> None:
    equal, different = (
        Reader(html.page(make(error, findings=n), "")).text for error, n in ((0.0, 0), (1e-3, 2))
    )
    assert "✓ Equal" in equal
    assert "✗ Different" in different
    assert "part ways" not in equal
    place = different[different.index("part ways") :]
    assert (
        place.index("encoder.layers.1")
        < place.index("port.encoder.layers.1")
        < place.index("10,000,000")
    )
    assert "4 of 5" not in equal
    assert "3 of 5" in different  # the finding is in the checkpoint, and in the small tower


def test_what_is_exactly_0_is_drawn_too() -> None:
    page = html.page(make(), "")
    assert "exactly 0" in page
    assert "(5 of 5 exactly 0)" in page
    assert (
        html.page(make(1e-16), "").count("(4 of 5 exactly 0)") == 4
    )  # two runs of two checkpoints
    assert page.count('class="hit"') == 4 * len(TAPS)  # depth and ratios of both


def test_what_is_outside_its_bound_is_red() -> None:
    assert "outside its bound" not in html.page(make(rounded=3e-7), "")
    page = html.page(make(rounded=3.1e-7), "")
    assert "outside its bound" in page
    assert [path.count("h0") for path in re.findall(r'class="dots bad" d="(.*?)"', page)] == [1, 1]
    assert [path.count("h0") for path in re.findall(r'class="dots c0" d="(.*?)"', page)] == [
        5,
        5,
        4,
        4,
    ]  # depth, then ratios


@pytest.mark.parametrize("error", [0.0, 5e-324, 1e308, math.inf, math.nan])
@pytest.mark.parametrize("noise", [0.0, 1e-300, math.inf, math.nan])
def test_no_figure_is_too_much(error: float, noise: float) -> None:
    found = make(error, findings=1, rounded=error)
    for section in found["sections"]:
        for measurement in section["gates"][-1]["measurements"]:
            measurement |= {
                "noise": noise if math.isfinite(noise) else str(noise),
                "bound": str(3 * noise),
            }
    found["patches"]["cosine"] = ["nan", "inf", "-inf", 1.0]
    found["outputs"][0]["cosine_min"] = "nan"
    text = Reader(html.page(found, "")).text
    assert math.isfinite(error) or "inf or nan" in text
    assert "inf or nan" not in Reader(html.page(make(1e-3, findings=1), "")).text


def test_keys_may_be_missing() -> None:
    whole = make(1e-3, findings=1)
    for key in ("config", "patches", "outputs", "provenance", "environment", "reference_shapes"):
        less = {name: value for name, value in whole.items() if name != key}
        Reader(html.page(less, ""))
        Reader(html.page(whole | {key: None}, ""))
    nothing = report.to_json(Comparison(()))
    assert "no gate was run" in Reader(html.page(nothing, "")).text


def test_other_findings_than_of_modules() -> None:
    gates = (
        GateResult("liveness", 1, "equality", (Finding("two runs differ"),)),
        GateResult("semantics", 0, "1e-10"),
    )
    text = Reader(
        html.page(report.to_json(Comparison((Section("Tower", "as given", gates),))), "")
    ).text
    assert "gate semantics checked nothing" in text
    assert "two runs differ" in text
    assert "nan" not in text  # there is no error to speak of


def test_the_page_is_always_the_same() -> None:
    found = make(1e-3, findings=3)
    before = copy.deepcopy(found)
    page = html.page(found, "data:")
    assert page == html.page(json.loads(report.dumps(found)), "data:")
    assert found == before
    assert page != html.page(make(2e-3, findings=3), "data:")


def test_many_findings_are_folded() -> None:
    few, many = (
        html.page(make(1e-3, findings=n), "") for n in (10, 11)
    )  # each is in both checkpoints
    assert "2 more" not in few
    assert "2 more" in many
    assert (few.count("<code>encoder"), many.count("<code>encoder")) == (
        21,
        23,
    )  # the first is also on top


@pytest.mark.parametrize(
    ("cosine", "says"),
    [
        ([1.0] * 4, "All are exactly 1."),
        ([1.0, 1.0, 1.0, 1 - 2e-9], "All are 1 to 8 digits"),
        ([1.0, 1.0, 1.0, 0.5], "smallest <b>0.5</b>"),
        ([1.0, 1.0, "nan", 1.0], "not finite"),
        (["nan"] * 4, "No cosine is finite"),
    ],
)
def test_patches(cosine: list[float | str], says: str) -> None:
    found = make()
    found["patches"]["cosine"] = cosine
    page = html.page(found, "data:")
    assert says in page
    assert ("what remains is rounding" in page) == ("digits" in says)


def test_a_picture_that_is_no_multiple_of_its_patches() -> None:
    page = html.page(make(), "data:")
    assert 'viewBox="0 0 2.07143 2.07143"' in page  # 29 pixels, patches of 14
    assert page.count("row 1, column 1:") == 2


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_picture(channels: int) -> None:
    values = torch.tensor([-1.0, 0.0, 1.0, 7.0]).reshape(1, 2, 2).repeat(channels, 1, 1).bfloat16()
    head, _, data = html.picture(values).partition(",")
    assert head == "data:image/png;base64"
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.size == (2, 2)
    assert image.mode == ("RGB" if channels == 3 else "L")
    assert list(image.convert("L").tobytes()) == [0, 128, 255, 255]


def test_picture_keeps_its_colours_and_its_rows() -> None:
    values = torch.full((3, 2, 2), -1.0)
    values[2, 0, 1] = 1.0  # blue, above on the right
    image = Image.open(io.BytesIO(base64.b64decode(html.picture(values).partition(",")[2])))
    assert image.getpixel((1, 0)) == (0, 0, 255)
    assert image.getpixel((0, 1)) == (0, 0, 0)
