"""Generate docs/api.md, the API reference, from signatures and docstrings.

uv run scripts/api_reference.py [--check]
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import inspect
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "api.md"

MODULES: dict[str, tuple[str, ...]] = {
    "siglip_port": (),
    "siglip_port.features": (
        "attention_maps",
        "embed_images",
        "hidden_states",
        "pooling_attention",
    ),
    "siglip_port.image_processing": (),
    "siglip_port.checkpoint": (),
    "siglip_port.optimize": (),
    "siglip_port.embed": (),
    "siglip_port.visualize": ("draw",),
    "siglip_port.parity": (),
    "siglip_port.extras": ("EXTRAS", "MissingExtraError", "require"),
}
"""Modules in the order of the page, and their public names; () for `__all__`."""

LAYERS = {
    "MLP",
    "EncoderBlock",
    "MultiheadAttention",
    "PoolingHead",
    "SigLipEncoder",
    "SigLipVisionTransformer",
    "VisionEmbeddings",
}
"""Parts of the model, whose methods are left out."""

SECTIONS = ("Args", "Attributes", "Raises", "Returns", "Yields")
MAX_WIDTH = 88

HEADER = """# API reference

Generated from docstrings by `scripts/api_reference.py`.
"""


def render_page() -> str:
    """Return the page as Markdown."""
    anchors = page_anchors()
    lines = [HEADER]
    for module_name in MODULES:
        links = [f"[`{name}`](#{anchors[module_name, name]})" for name in names_of(module_name)]
        lines.append(f"- `{module_name}`: {', '.join(links)}")
    documented: dict[object, tuple[str, str]] = {}
    for module_name in MODULES:
        lines.append(f"\n## `{module_name}`\n\n{first_line(module_name)}")
        for name in names_of(module_name):
            lines.append(f"\n### `{module_name}.{name}`\n")
            value = resolve(module_name, name)
            first = (module_name, name)
            if inspect.isclass(value) or inspect.isroutine(value):
                first = documented.setdefault(value, first)
            if first == (module_name, name):
                lines += render_value(module_name, name, value)
            else:
                lines.append(f"See [`{'.'.join(first)}`](#{anchors[first]}).")
    return "\n".join(lines) + "\n"


def page_anchors() -> dict[tuple[str, str], str]:
    """Return GitHub's anchor for the heading of each name: (module, name) -> anchor.

    Headings that differ in case or dots only are numbered in the order of the page.
    """
    anchors: dict[tuple[str, str], str] = {}
    counts: dict[str, int] = {}
    for module_name in MODULES:
        for name in ("", *names_of(module_name)):
            slug = re.sub(r"[^\w-]", "", f"{module_name}{name}".lower())
            count = counts.get(slug, 0)
            counts[slug] = count + 1
            anchors[module_name, name] = f"{slug}-{count}" if count else slug
    return anchors


def resolve(module_name: str, name: str) -> object:
    """Return the object with this name; the function of a callable package."""
    value = getattr(importlib.import_module(module_name), name)
    return getattr(value, name) if isinstance(value, types.ModuleType) else value


def names_of(module_name: str) -> list[str]:
    """Return the public names of a module, in alphabetical order."""
    module = importlib.import_module(module_name)
    return sorted(MODULES[module_name] or module.__all__, key=str.lower)


def first_line(module_name: str) -> str:
    """Return the first line of a module's docstring."""
    return (inspect.getdoc(importlib.import_module(module_name)) or "").partition("\n")[0]


def render_value(module_name: str, name: str, value: object) -> Iterator[str]:
    """Yield the lines of one public name."""
    if inspect.isclass(value):
        yield from render_class(name, value)
    elif inspect.isroutine(value):
        yield code_block(f"def {name}{signature(value)}")
        yield render_docstring(inspect.getdoc(value))
    else:
        yield constant_docstring(module_name, name)


def render_class(name: str, value: type) -> Iterator[str]:
    """Yield signature, docstring, properties and methods of a class."""
    has_parameters = not issubclass(value, (Exception, dict))
    yield code_block(f"class {name}{constructor(value) if has_parameters else ''}")
    yield render_docstring(inspect.getdoc(value))
    if name in LAYERS or not has_parameters:
        return
    for attribute, member in vars(value).items():
        if attribute.startswith("_"):
            continue
        if isinstance(member, property):
            yield f"\n**`{attribute}`** (property): {inspect.getdoc(member) or ''}"
        elif isinstance(member, (types.FunctionType, classmethod, staticmethod)):
            yield f"\n**`{attribute}`**\n"
            yield code_block(f"def {attribute}{signature(getattr(value, attribute))}")
            yield render_docstring(inspect.getdoc(getattr(value, attribute)))


def constructor(value: type) -> str:
    """Return the parameters of a class, without `self` and return type."""
    return signature(value).rpartition(" -> ")[0] or signature(value)


def signature(function: object) -> str:
    """Return parameters and return type, on one line or one line each."""
    spec = inspect.signature(function)  # type: ignore[arg-type]
    parameters: list[str] = []
    keyword_only = False
    for parameter in spec.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.VAR_POSITIONAL:
            keyword_only = True
        elif parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            parameters.append("*")
            keyword_only = True
        parameters.append(format_parameter(parameter))
    result = ""
    if spec.return_annotation is not inspect.Signature.empty:
        result = f" -> {format_annotation(spec.return_annotation)}"
    line = f"({', '.join(parameters)}){result}"
    if len(line) <= MAX_WIDTH:
        return line
    return "(\n" + "".join(f"    {parameter},\n" for parameter in parameters) + f"){result}"


def format_parameter(parameter: inspect.Parameter) -> str:
    """Return a parameter as in source code."""
    text = parameter.name
    if parameter.kind is parameter.VAR_POSITIONAL:
        text = f"*{text}"
    elif parameter.kind is parameter.VAR_KEYWORD:
        text = f"**{text}"
    has_annotation = parameter.annotation is not parameter.empty
    if has_annotation:
        text += f": {format_annotation(parameter.annotation)}"
    if parameter.default is parameter.empty:
        return text
    return f"{text} = {format_default(parameter.default)}" if has_annotation else f"{text}=..."


def format_annotation(annotation: object) -> str:
    """Return an annotation without quotes."""
    if isinstance(annotation, str):
        return annotation
    return str(inspect.formatannotation(annotation))


def format_default(value: object) -> str:
    """Return a default value; `...` where its text depends on the machine or the process."""
    if inspect.isroutine(value) or inspect.isclass(value):
        return value.__name__
    if value is None or isinstance(value, (bool, int, float, str, tuple)):
        return repr(value)
    return "..."


def code_block(text: str) -> str:
    """Return text as a fenced code block."""
    return f"```\n{text}\n```\n"


def render_docstring(docstring: str | None) -> str:
    """Turn the Google-style sections of a docstring into lists."""
    if not docstring:
        return ""
    lines: list[str] = []
    section = ""
    for line in docstring.splitlines():
        heading = line.removesuffix(":")
        if line.endswith(":") and heading in SECTIONS:
            section = heading
            lines.append(f"*{section}*\n")
        elif section and line and not line.startswith(" "):
            section = ""
            lines.append(line)
        elif section in ("Returns", "Yields") or not section:
            lines.append(line.removeprefix("    ") if section else line)
        elif re.match(r"    \S", line):
            name, _, text = line.strip().partition(": ")
            lines.append(f"- `{name}`: {text}")
        else:
            lines.append(f"  {line.strip()}" if line else "")
    return "\n".join(lines).rstrip()


def constant_docstring(module_name: str, name: str) -> str:
    """Return the string below the assignment of a constant; "" if there is none."""
    spec = importlib.util.find_spec(module_name)
    assert spec is not None
    assert spec.origin is not None
    body = ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body
    for statement, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(statement, ast.ImportFrom) and statement.module:
            for alias in statement.names:
                if name == (alias.asname or alias.name):
                    return constant_docstring(statement.module, alias.name)
        targets: list[ast.expr] = []
        if isinstance(statement, ast.Assign):
            targets = statement.targets
        elif isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return string_of(following) or f"```\n{ast.unparse(statement)}\n```"
    return ""


def string_of(statement: ast.stmt | None) -> str:
    """Return the value of a string statement; "" for other statements."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return inspect.cleandoc(str(statement.value.value))
    return ""


def main() -> int:
    """Write the page, or check it; return 1 if it is out of date."""
    parser = argparse.ArgumentParser(description="Generate docs/api.md from docstrings.")
    parser.add_argument("--check", action="store_true", help="Change nothing; fail if out of date.")
    check = parser.parse_args().check
    sys.path.insert(0, str(ROOT))
    page = render_page()
    if not check:
        PAGE.write_text(page, encoding="utf-8")
        return 0
    if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page:
        print("docs/api.md: out of date; run: uv run scripts/api_reference.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
