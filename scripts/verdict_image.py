"""Draws docs/images/verdict.svg: the output of `siglip-port verify` for a planted bug.

uv run scripts/verdict_image.py
"""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from scripts.selftest.catalog.activation import ACTIVATION
from siglip_port.cli import verify

IMAGE = Path(__file__).resolve().parent.parent / "docs" / "images" / "verdict.svg"
MUTANT = "gelu_exact"
WIDTH = 124
MAX_FINDINGS = 2


def run_verify() -> list[str]:
    """Verify a port with the planted bug; return the lines that it prints."""
    output = io.StringIO()
    mutant = next(mutant for mutant in ACTIVATION if mutant.name == MUTANT)
    with mutant.applied(), contextlib.redirect_stdout(output):
        verify.main(["--weights", "random"])
    return output.getvalue().splitlines()


def select_lines(lines: list[str]) -> list[str]:
    """Return the gates, the first findings, and the verdict."""
    start = next(number for number, line in enumerate(lines) if line.startswith("gate "))
    end = lines.index("", start)
    findings = lines[end + 1 : lines.index("", end + 1)]
    return [*lines[start:end], "", *findings[:MAX_FINDINGS], "", lines[-1]]


def draw(lines: list[str]) -> str:
    """Draw lines as a terminal in SVG, without web fonts."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), color_system="truecolor")
    console.print(Text("$ uv run compare_origin.py", style="bold"))
    for line in lines:
        text = Text(line)
        text.highlight_regex(r"\bFAILED\b|^DIFFERENT.*", "bold red")
        text.highlight_regex(r"\bpassed\b", "green")
        text.highlight_regex(r"looks like: [^;]+", "bold yellow")
        console.print(text)
    svg = console.export_svg(title="siglip-port verify", theme=MONOKAI, unique_id="verdict")
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)


def main() -> None:
    """Verify the port and write the image."""
    IMAGE.write_text(draw(select_lines(run_verify())), encoding="utf-8")
    print(f"written: {IMAGE.name}")


if __name__ == "__main__":
    main()
