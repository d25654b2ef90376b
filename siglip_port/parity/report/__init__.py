"""What a comparison found, for people and for programs.

The JSON is the source of truth; Markdown, JUnit's XML and the HTML page are made of it. The page is
in `siglip_port.parity.report.html`, which needs jinja2 (torch brings it).
"""

from siglip_port.parity.report.baseline import against_baseline
from siglip_port.parity.report.json_report import SCHEMA, Json, dumps, output_metrics, to_json
from siglip_port.parity.report.junit import to_junit
from siglip_port.parity.report.markdown import to_markdown
from siglip_port.parity.report.table import colored, gate_table

__all__ = [
    "SCHEMA",
    "Json",
    "against_baseline",
    "colored",
    "dumps",
    "gate_table",
    "output_metrics",
    "to_json",
    "to_junit",
    "to_markdown",
]
