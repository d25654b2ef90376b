"""Reports of a comparison: JSON, Markdown, JUnit XML and HTML.

All others are rendered from the JSON report. The HTML page is in `siglip_port.parity.report.html`,
which needs jinja2, a dependency of torch.
"""

from siglip_port.parity.report.badge import one_line, to_badge
from siglip_port.parity.report.baseline import against_baseline
from siglip_port.parity.report.json_report import SCHEMA, Json, dumps, output_metrics, to_json
from siglip_port.parity.report.junit import to_junit
from siglip_port.parity.report.markdown import to_markdown
from siglip_port.parity.report.origin import describe_origin
from siglip_port.parity.report.table import colored, gate_table

__all__ = [
    "SCHEMA",
    "Json",
    "against_baseline",
    "colored",
    "describe_origin",
    "dumps",
    "gate_table",
    "one_line",
    "output_metrics",
    "to_badge",
    "to_json",
    "to_junit",
    "to_markdown",
]
