"""Reports words that the glossary of CONTRIBUTING.md rules out.

    uv run scripts/words.py [PATH ...]

Checks Python files (names, docstrings, comments, strings) and Markdown files.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GLOSSARY = ROOT / "CONTRIBUTING.md"
PATHS = ("siglip_port", "scripts", "tests", "docs", "README.md", "compare_origin.py")


@dataclass(frozen=True)
class Glossary:
    """The left column of the glossary.

    Attributes:
        text: pattern of the terms that are ruled out in text.
        names: names that are ruled out.
        words: words that are ruled out within names.
        terms: term -> replacement.
    """

    text: re.Pattern[str]
    names: frozenset[str]
    words: frozenset[str]
    terms: dict[str, str]


def read_glossary(page: str) -> Glossary:
    """Read the table under the heading `Glossary`.

    Raises:
        ValueError: the page has no glossary.
    """
    terms: dict[str, str] = {}
    table = page.partition("\n## Glossary\n")[2].partition("\n## ")[0]
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not line.startswith("| ") or cells[0] == "not":
            continue
        for term in cells[0].split(", "):
            terms[term.strip()] = cells[1]
    phrases = [term for term in terms if not term.startswith("`")]
    if not phrases:
        raise ValueError(f"{GLOSSARY.name} has no glossary")
    text = re.compile(rf"\b(?:{'|'.join(phrases)})s?\b", re.IGNORECASE)
    names = frozenset(term.strip("`") for term in terms if re.fullmatch(r"`\w+`", term))
    words = frozenset(term.strip("`*") for term in terms if term.startswith("`*"))
    return Glossary(text, names, words, terms)


def words_of_name(name: str) -> list[str]:
    """Split a name such as `MAX_SIZE`, `max_size` or `MaxSize` into words, in lower case."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def names_of_module(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and name of each binding of a module."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def texts_of_module(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of all comments and strings of a module, docstrings included."""
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in kinds:
            for offset, line in enumerate(token.string.splitlines()):
                yield token.start[0] + offset, line


def check_file(path: Path, glossary: Glossary) -> Iterator[str]:
    """Yield `path:line: problem` for each term that is ruled out."""
    source = path.read_text(encoding="utf-8")
    texts: Iterable[tuple[int, str]] = enumerate(source.splitlines(), 1)
    if path.suffix == ".py":
        texts = texts_of_module(source)
        names = [*names_of_module(ast.parse(source)), (1, path.stem)]
        for line, name in names:
            if name in glossary.names:
                yield f"{path}:{line}: not `{name}`, but {glossary.terms[f'`{name}`']}"
            for word in sorted(glossary.words.intersection(words_of_name(name))):
                yield f"{path}:{line}: not `{name}`, but {glossary.terms[f'`*{word}*`']}"
    for line, text in texts:
        for match in glossary.text.finditer(text):
            term = match[0].lower()
            instead = glossary.terms.get(term) or glossary.terms[term.removesuffix("s")]
            yield f"{path}:{line}: not '{match[0]}', but {instead}"


def find_files(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield the Python and Markdown files below these paths."""
    for path in paths:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.suffix in (".py", ".md") and file != Path(__file__).resolve():
                yield file


def main() -> int:
    """Check files; return 1 if they contain a term that is ruled out."""
    parser = argparse.ArgumentParser(description="Report words that the glossary rules out.")
    parser.add_argument("paths", nargs="*", type=Path, help="Files and folders. [default: all]")
    paths = parser.parse_args().paths or [ROOT / path for path in PATHS]
    glossary = read_glossary(GLOSSARY.read_text(encoding="utf-8"))
    problems = [problem for file in find_files(paths) for problem in check_file(file, glossary)]
    for problem in problems:
        print(problem.removeprefix(f"{ROOT}/"))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
