"""Prints every message of the package, by file and line, as a user reads it.

    uv run scripts/messages.py [PATH ...]

Lists the texts of exceptions, warnings, log records, `fail`, `print`, `typer.echo`, options and
arguments (`help=`), and functions that return a sentence. Fields of f-strings are shown by name:
`{path}: not a safetensors file`. Reads the source only; nothing is imported.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PRINTING = ("print", "echo", "fail", "error", "BadParameter", "print_labeled")
"""Functions and methods whose arguments are printed."""

LOGGING = ("debug", "info", "warning", "warn", "exception", "critical")
HELP_KEYWORDS = ("help", "description", "epilog")

SENTENCE_WORDS = 3
"""A string that is returned, or assigned to a name, is text for a user from this many words on."""


@dataclass(frozen=True, order=True)
class Message:
    """A message in the source.

    Attributes:
        line: line number.
        kind: what the text belongs to, e.g. `ValueError`, `print` or `help`.
        text: what a user reads, with fields as `{name}`.
    """

    line: int
    kind: str
    text: str


def read_text(node: ast.expr, variables: dict[str, str]) -> str:
    """Return the text that an expression evaluates to, with everything unknown as `{expression}`.

    Args:
        node: an expression.
        variables: name of a local or global string -> its text.
    """
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(read_text(part, variables) for part in parts)
        case ast.FormattedValue(value=value):
            return read_text(value, variables)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return read_text(left, variables) + read_text(right, variables)
        case ast.IfExp(body=body, orelse=orelse):
            return f"<{read_text(body, variables)}|{read_text(orelse, variables)}>"
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            return "\n".join(read_text(part, variables) for part in parts)
        case ast.Name(id=name) if name in variables:
            return variables[name]
    return field(node)


def field(node: ast.expr) -> str:
    """Return an expression in braces."""
    return f"{{{ast.unparse(node)}}}"


def count_words(text: str) -> int:
    """Return the number of words of a text, without those in fields."""
    while (without_fields := re.sub(r"\{[^{}]*\}", "", text)) != text:
        text = without_fields
    return len(re.findall(r"[A-Za-z]{2,}", text))


def string_variables(scope: ast.AST) -> dict[str, str]:
    """Return the sentences that a function or module assigns to names; the last one of a name."""
    variables: dict[str, str] = {}
    for node in ast.walk(scope):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            text = read_text(node.value, variables)
            if count_words(text) >= SENTENCE_WORDS:
                variables[node.targets[0].id] = text
    return variables


def called_name(call: ast.Call) -> str:
    """Return the last part of the name of the called function."""
    return ast.unparse(call.func).rpartition(".")[2]


def is_message_call(call: ast.Call) -> bool:
    """Return whether the arguments of a call are read by a user."""
    name = called_name(call)
    if name in LOGGING:
        return isinstance(call.func, ast.Attribute)
    return name in PRINTING or name.endswith(("Error", "Warning", "Exit"))


def find_messages(tree: ast.Module) -> list[Message]:
    """Return the messages of a module, in the order of lines."""
    assignments: list[ast.stmt] = [node for node in tree.body if isinstance(node, ast.Assign)]
    constants = string_variables(ast.Module(assignments, []))
    messages = set(messages_of_scope(tree, constants))
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            messages.update(messages_of_scope(function, constants | string_variables(function)))
    return sorted(messages)


def messages_of_scope(scope: ast.AST, variables: dict[str, str]) -> Iterator[Message]:
    """Yield the messages of a module or function, without those of the functions in it."""
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, ast.Call):
            yield from messages_of_call(node, variables)
        elif isinstance(node, ast.Return) and node.value is not None:
            text = read_text(node.value, variables)
            if count_words(text) >= SENTENCE_WORDS:
                yield Message(node.lineno, "return", text)
        if not isinstance(node, ast.FunctionDef):
            yield from messages_of_scope(node, variables)


def messages_of_call(call: ast.Call, variables: dict[str, str]) -> Iterator[Message]:
    """Yield the messages that a call prints or raises, and its help texts."""
    texts = [read_text(argument, variables) for argument in call.args]
    text = " ".join(text for text in texts if count_words(text))
    if text and is_message_call(call):
        yield Message(call.lineno, called_name(call), text)
    for keyword in call.keywords:
        if keyword.arg in HELP_KEYWORDS:
            text = read_text(keyword.value, variables)
            if count_words(text):
                yield Message(keyword.value.lineno, keyword.arg, text)


def find_files(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield the Python files of files and folders."""
    for path in paths:
        if path.is_dir():
            yield from sorted(path.rglob("*.py"))
        else:
            yield path


def main(arguments: list[str] | None = None) -> int:
    """Print the messages of files; return the exit code."""
    parser = argparse.ArgumentParser(description="Print the messages of Python files by line.")
    parser.add_argument(
        "paths", nargs="*", type=Path, help="Files and folders. [default: siglip_port]"
    )
    paths = parser.parse_args(arguments).paths or [ROOT / "siglip_port"]
    for path in find_files(paths):
        messages = find_messages(ast.parse(path.read_text(encoding="utf-8")))
        if messages:
            print("\n" + str(path).removeprefix(f"{ROOT}/"))
        for message in messages:
            text = message.text.strip().replace("\n", "\n        ")
            print(f"{message.line:>6}  {message.kind}: {text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
