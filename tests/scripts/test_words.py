"""scripts/words.py: the check of the glossary."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.words import GLOSSARY, check_file, find_files, read_glossary

PAGE = """
## Glossary

| not | but |
|---|---|
| widget, old thing | part |
| `found`, `*gadget*` | `result`, `part` |

## Next

| not | but |
|---|---|
| part | nothing |
"""


@pytest.mark.parametrize(
    ("name", "source", "problems"),
    [
        (
            "a.md",
            "A widget.\nTwo Old Things of a part.\n",
            ["1: not 'widget'", "2: not 'Old Thing"],
        ),
        ("a.py", '"""Of widgets."""\n', ["1: not 'widgets', but part"]),
        ("a.py", "x = 1  # a widget\n", ["1: not 'widget', but part"]),
        ("a.py", "x = f'''\n{1}\n a widget'''\n", ["3: not 'widget', but part"]),
        ("a.py", "found = 1\n", ["1: not `found`, but `result`, `part`"]),
        ("a.py", "found_it = 1\n", []),
        ("a.py", "def run(MAX_GADGET=1): ...\n", ["1: not `MAX_GADGET`"]),
        ("a.py", "class MyGadget: ...\n", ["1: not `MyGadget`"]),
        ("a.py", "x.gadget = widget = 1\n", ["1: not `gadget`"]),
        ("gadget.py", "", ["1: not `gadget`"]),
        ("a.py", "widget_of_others(found, key='old')\n", []),
    ],
)
def test_words(name: str, source: str, problems: list[str], tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(source, encoding="utf-8")
    result = list(check_file(path, read_glossary(PAGE)))
    assert len(result) == len(problems)
    for line, problem in zip(result, problems, strict=True):
        assert line.startswith(f"{path}:{problem}")


def test_no_glossary() -> None:
    with pytest.raises(ValueError, match=r"CONTRIBUTING\.md has no glossary"):
        read_glossary("# Contributing\n")


def test_glossary_of_contributing() -> None:
    glossary = read_glossary(GLOSSARY.read_text(encoding="utf-8"))
    phrase = next(term for term in glossary.terms if not term.startswith("`"))
    assert glossary.text.search(f"Two {phrase.capitalize()}s of it")
    assert glossary.words
    assert glossary.names


def test_find_files(tmp_path: Path) -> None:
    for name in ("b.py", "a.md", "c.json"):
        (tmp_path / name).touch()
    assert [path.name for path in find_files([tmp_path])] == ["a.md", "b.py"]
