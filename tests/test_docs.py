"""The documents: examples run; links, paths, commands and options exist."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from siglip_port import SigLipVisionConfig, SigLipVisionModel
from siglip_port.cli.main import main
from siglip_port.parity.siglip.verify_options import SAMPLE_IMAGE
from tests.helpers.hub_server import Hub, Repository
from tests.helpers.vision_language_models import TEXT

ROOT = Path(__file__).parent.parent
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *PAGES]

GENERATED = "docs/api.md"
COMMANDS = ("inspect", "extract", "export", "embed", "search", "plot", "list", "verify")
OTHER_TOOLS = {"--torch-backend", "--no-index", "--find-links", "--frozen", "--no-dev", "--extra"}
"""Options of uv and pip that documents name without the command."""

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->\s*\Z", re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PROJECT_PATH = re.compile(r"(?<![\w./<*-])(?:scripts|docs|tests|siglip_port)/[\w./-]*\w")
COMMAND = re.compile(r"(?:siglip-port|compare_origin\.py)((?: +[^\s`|&;#]+)*)")
OPTION = re.compile(r"(?<![\w-])--?[a-zA-Z][\w-]*")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: "" if none is given.
        text: its lines.
        reason: why it is not run; None if it is.
    """

    language: str
    text: str
    reason: str | None


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str) -> list[Block]:
    text = read(document)
    result = []
    for match in FENCE.finditer(text):
        comment = NOT_RUN.search(text[: match.start()])
        result.append(Block(match[1], match[2], comment[1] if comment else None))
    return result


def python_blocks(document: str) -> list[Block]:
    return [block for block in blocks(document) if block.language == "python"]


def code(document: str) -> str:
    """Return fenced blocks and code spans, one a line; continued lines are joined."""
    text = read(document)
    fenced = [block.text for block in blocks(document)]
    spans = re.findall(r"`([^`]+)`", FENCE.sub("", text))
    lines = [*fenced, *(span.replace("\n", " ") for span in spans)]
    return "\n".join(lines).replace("\\\n", " ")


# --- examples -------------------------------------------------------------------------------------

SHALLOW_BASE = SigLipVisionConfig(num_encoder_blocks=3, mlp_hidden_dim=768, pooling_head=True)
"""The published base model, with fewer blocks."""

MODELS = {
    "google/siglip-base-patch16-224": SHALLOW_BASE,
    "google/siglip2-base-patch16-naflex": replace(SHALLOW_BASE, image_size=256, naflex=True),
}

PALIGEMMA_VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "vision_use_head": False,
}


def save_paligemma(folder: Path) -> None:
    config = transformers.PaliGemmaConfig(
        vision_config=PALIGEMMA_VISION,
        text_config={**TEXT, "model_type": "gemma"},
        projection_dim=16,
        hidden_size=16,
    )
    transformers.PaliGemmaForConditionalGeneration(config).save_pretrained(folder)


@pytest.fixture
def example_folder(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with images, and a Hub that serves models of the names in the examples."""
    for name, config in MODELS.items():
        SigLipVisionModel(config).save_hf(tmp_path / name)
        hub.repositories[name] = Repository(tmp_path / name)
    folder = tmp_path / "work"
    (folder / "photos").mkdir(parents=True)
    (folder / "photos" / "cat.png").write_bytes(SAMPLE_IMAGE.read_bytes())
    (folder / "photos" / "broken.jpg").write_bytes(b"no")
    sample = folder / SAMPLE_IMAGE.relative_to(ROOT)
    sample.parent.mkdir(parents=True)
    sample.write_bytes(SAMPLE_IMAGE.read_bytes())
    monkeypatch.chdir(folder)
    return folder


def stated_outputs(text: str) -> list[str]:
    """Return what the comments after `print` state, without explanations after a colon."""
    comments = re.findall(
        r"^ *print\(.*\) +# (torch\.Size.*|True|False|None.*)$", text, re.MULTILINE
    )
    return [comment.partition(":")[0] for comment in comments]


def test_stated_outputs() -> None:
    """Also in indented blocks."""
    text = "print(a)  # True\nwith b:\n    print(c())  # torch.Size([2])\nd = 1  # False\n"
    assert stated_outputs(text) == ["True", "torch.Size([2])"]
    assert stated_outputs("print(e)  # None: no head\n") == ["None"]


def run_examples(document: str, edit: Callable[[str], str] = str) -> Iterator[str]:
    """Run the Python blocks of a document in one namespace; yield each one after it has run."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in python_blocks(document):
        if block.reason is None:
            exec(compile(edit(block.text), document, "exec"), namespace)
            yield block.text


@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # peft reads this attribute
@pytest.mark.parametrize(
    "document", [name for name in DOCUMENTS if python_blocks(name) and name != GENERATED]
)
def test_examples(
    document: str, hub: Hub, example_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The examples run and print what the comment after each `print` states."""
    if document == "docs/vlm.md":
        # transformers opens a local folder; it needs more of the Hub than the test Hub serves.
        save_paligemma(example_folder / "google" / "paligemma-3b-pt-224")
    torch.manual_seed(0)
    for text in run_examples(document):
        printed = capsys.readouterr().out
        for value in stated_outputs(text):
            assert value in printed.splitlines()
        if document == "docs/other_ports.md":
            assert printed.strip() in read(document)


def test_other_ports_example_detects_bug(capsys: pytest.CaptureFixture[str]) -> None:
    """With timm's own eps, the example prints the difference that the page shows."""
    document = "docs/other_ports.md"
    list(run_examples(document, lambda text: text.replace("module.eps = 1e-12", "pass")))
    assert capsys.readouterr().out.splitlines()[-1] in read(document)


def test_examples_exist() -> None:
    assert len(python_blocks("README.md")) >= 2
    for document in ("docs/vlm.md", "docs/ci.md"):
        assert python_blocks(document)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_skipped_examples_give_reason(document: str) -> None:
    """Every `not run` comment belongs to a block."""
    marked = [block for block in blocks(document) if block.reason is not None]
    assert len(marked) == read(document).count("<!-- not run:")


def test_ci_example_fails(tmp_path: Path) -> None:
    """The pytest file of docs/ci.md passes; with a bug, it fails and locates the bug."""
    (block,) = [block for block in python_blocks("docs/ci.md") if "def test_" in block.text]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_port.py"]
    buggy = block.text.replace("eps=1e-6", "eps=1e-5")
    assert buggy != block.text
    for text, status in ((block.text, 0), (buggy, 1)):
        (tmp_path / "test_port.py").write_text(text, encoding="utf-8")
        process = subprocess.run(
            command,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert process.returncode == status, process.stdout
    assert "looks like: eps 1e-05 instead of 1e-06" in process.stdout


# --- links ----------------------------------------------------------------------------------------


@functools.cache
def anchors(path: Path) -> frozenset[str]:
    """Return the anchors that GitHub gives the headings of a Markdown file."""
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    result: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?)\s*$", text, re.MULTILINE):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", title).replace(" ", "-")
        count = 0
        unique = slug
        while unique in result:
            count += 1
            unique = f"{slug}-{count}"
        result.add(unique)
    return frozenset(result | set(re.findall(r'<a (?:id|name)="([^"]+)"', text)))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links(document: str) -> None:
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", read(document)))
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / document).parent / name if name else ROOT / document
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), target


def test_anchors(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A `b_c`, d!\n\n## [Link](x.md)\n\n```\n# no\n```\n\n## Link\n")
    assert anchors(page) == {"a-b_c-d", "link", "link-1"}


def test_every_page_is_linked() -> None:
    """Every page is reachable from the README."""
    reached: set[str] = set()
    pending = ["README.md"]
    while pending:
        document = pending.pop()
        if document in reached:
            continue
        reached.add(document)
        for target in LINK.findall(read(document)):
            path = (ROOT / document).parent / target.partition("#")[0]
            if path.suffix == ".md" and path.is_file():
                pending.append(path.resolve().relative_to(ROOT).as_posix())
    assert reached >= set(DOCUMENTS)


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths(document: str) -> None:
    """Files of the project that a document names exist; their suffix may be left out."""
    for name in PROJECT_PATH.findall(code(document)):
        path = ROOT / name
        assert path.exists() or list(path.parent.glob(f"{path.name}.*")), name


@functools.cache
def help_text(command: str) -> str:
    """Return the help of a command of `siglip-port`."""
    process = subprocess.run(
        [sys.executable, "-m", "siglip_port", command, "--help"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert process.returncode == 0, f"siglip-port {command}: {process.stderr}"
    return process.stdout


def options_of(command: str) -> set[str]:
    return {*OPTION.findall(help_text(command)), "--help"}


def command_lines(document: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each command of `siglip-port` with its options."""
    for match in COMMAND.finditer(code(document)):
        words = match[1].split()
        command = "verify" if match[0].startswith("compare_origin") else ""
        if not command and words and not words[0].startswith(("-", ".", "[", "<")):
            command = words[0]
        if command:
            yield command, [word for word in words if OPTION.fullmatch(word.partition("=")[0])]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands(document: str) -> None:
    for command, options in command_lines(document):
        assert command in COMMANDS
        for option in options:
            assert option.partition("=")[0] in options_of(command), f"{command} {option}"


def synopses(document: str) -> dict[str, list[str]]:
    """Return the options of `siglip-port NAME [--option] ...`, alone on a line, by command."""
    lines = re.findall(
        r"^`siglip-port (\w+)([^`\n]*)`", FENCE.sub("", read(document)), re.MULTILINE
    )
    return {name: OPTION.findall(rest) for name, rest in lines}


def test_synopses() -> None:
    """The options in brackets exist."""
    listed = synopses("docs/cli.md")
    assert set(listed) == set(COMMANDS)
    assert "--prefix" in listed["inspect"]
    for command, options in listed.items():
        assert set(options) <= options_of(command), command


@functools.cache
def options_in_scripts() -> frozenset[str]:
    sources = [*(ROOT / "scripts").rglob("*.py"), *(ROOT / "tests/helpers").glob("*.py")]
    return frozenset(
        option
        for path in sources
        for option in re.findall(r'"(--[\w-]+)"', path.read_text(encoding="utf-8"))
    )


@pytest.mark.parametrize("document", DOCUMENTS)
def test_options(document: str) -> None:
    """Options outside of command lines, such as `--top-k 3`."""
    known = OTHER_TOOLS.union(options_in_scripts(), *map(options_of, COMMANDS))
    spans = re.findall(r"(?<!`)`(--[\w-]+)[^`\n]*`", FENCE.sub("", read(document)))
    assert set(spans) <= known


def test_command_list(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["siglip-port", "--help"])
    with pytest.raises(SystemExit):
        main()
    printed = capsys.readouterr().out
    assert set(COMMANDS) == set(re.findall(r"^  ([a-z]+)  ", printed, re.MULTILINE))


def test_extras() -> None:
    """The table of docs/install.md has a row for each extra of pyproject.toml."""
    extras = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
    rows = re.findall(r"^\| `\[(\w+)\]` \|", read("docs/install.md"), re.MULTILINE)
    assert rows == list(extras)


def test_extras_exist() -> None:
    extras = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
    for document in DOCUMENTS:
        for names in re.findall(
            r"(?:siglip-port|siglip_port|whl|\.)\[([a-z, ]+)\]|^\[([a-z]+)\]$",
            code(document),
            re.MULTILINE,
        ):
            assert set(re.split(r", *", "".join(names))) <= set(extras), document


def test_api_reference_is_current() -> None:
    command = [sys.executable, "scripts/api_reference.py", "--check"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
