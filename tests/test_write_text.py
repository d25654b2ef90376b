from __future__ import annotations

from pathlib import Path

import pytest

from siglip_port.atomic import write_text


def test_write_text_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    write_text(target, "one")
    with pytest.raises(UnicodeEncodeError):
        write_text(target, "\ud800")
    assert target.read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
