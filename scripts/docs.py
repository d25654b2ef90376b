"""Writes the tables and counts of README.md and docs/ from where they are measured or defined.

    uv run scripts/docs.py            rewrite every generated block
    uv run scripts/docs.py --check    fail where a block is out of date

A block lies between `<!-- generated: NAME -->` and `<!-- end -->`; NAME is a key of `BLOCKS`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def to_markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format a table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def read_json(name: str) -> Any:  # noqa: ANN401 (whatever the file holds)
    """Read a file of docs/."""
    return json.loads((ROOT / "docs" / name).read_text(encoding="utf-8"))


def checkpoints() -> str:
    """The published checkpoints: a row a size, a column a family, image sizes by patch size."""
    from siglip_port.checkpoint.registry import PUBLISHED, SIZES

    cells: dict[tuple[str, str], list[str]] = defaultdict(list)
    parameters: dict[str, int] = {}
    for published in PUBLISHED:
        _, family, name = re.split(r"[/-]", published.repo, maxsplit=2)
        parameters.setdefault(published.size, published.vision_parameters)
        name = name.removeprefix(f"{published.size}-")
        cells[published.size, family].append(f"`{name}`")
    rows = []
    for size in SIZES:
        siglip = ", ".join(cells[size, "siglip"])
        if cells[size, "medsiglip"]:
            siglip += "; `google/medsiglip-448`"
        siglip2 = ", ".join(cells[size, "siglip2"])
        rows.append((f"{size}, {parameters[size] / 1e6:,.0f} M", siglip or "none", siglip2))
    header = ["vision encoder", "`google/siglip-SIZE-...`", "`google/siglip2-SIZE-...`"]
    return to_markdown(header, rows)


def commands() -> str:
    """The commands of `siglip-port`."""
    import typer.main

    from siglip_port.cli.app import app

    group = typer.main.get_command(app)
    rows = []
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        rows.append((f"`siglip-port {name}`", command.get_short_help_str(limit=100)))
    return to_markdown(["command", "purpose"], rows)


BLOCKS: dict[str, Callable[[], str]] = {
    "checkpoints": checkpoints,
    "commands": commands,
}


def update(page: str) -> str:
    """Rewrite the generated blocks of a page."""

    def replace(match: re.Match[str]) -> str:
        return match[1] + BLOCKS[match[2]]() + match[3]

    return BLOCK.sub(replace, page)


def main() -> int:
    """Update or check the pages; return 1 where a block was out of date and `--check` was given."""
    parser = argparse.ArgumentParser(description="Update the generated blocks of the docs.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if out of date")
    check = parser.parse_args().check
    outdated = []
    for path in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
    ]:
        old = path.read_text(encoding="utf-8")
        new = update(old)
        if new != old:
            outdated.append(path.relative_to(ROOT).as_posix())
            if not check:
                path.write_text(new, encoding="utf-8")
    if check and outdated:
        print(f"out of date: {', '.join(outdated)}; run: uv run scripts/docs.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
