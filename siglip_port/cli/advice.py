"""Advice of error messages in the words of a command.

The package names Python arguments: `pass layout='timm'`. A command that has the option prints
`pass --layout timm`; another one prints what to do instead.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shlex
from collections.abc import Callable, Collection, Iterator

import siglip_port

OPTIONS = {
    "address": "--address",
    "backend": "--backend",
    "checkpoint": "--checkpoint",
    "config": "--config",
    "device": "--device",
    "dtype": "--dtype",
    "engine": "--engine",
    "executor": "--executor",
    "format": "--format",
    "layout": "--layout",
    "local_files_only": "--offline",
    "normalize": "--normalize",
    "num_workers": "--num-workers",
    "output_dtype": "--output-dtype",
    "prefix": "--prefix",
    "preprocessing": "--preprocessing",
    "revision": "--revision",
    "source": "--model",
    "subfolder": "--subfolder",
    "threads": "--threads",
    "tokens": "--tokens",
}
"""Argument in Python -> option, which a command may have or not."""

FLAGS = ("--normalize", "--offline", "--tokens")
"""Options without a value."""

INSTEAD = {
    ("pass", "token=False"): "set HF_HUB_DISABLE_IMPLICIT_TOKEN=1",
    ("pass", "token="): "set HF_TOKEN",
    ("pass", "cache_dir="): "set HF_HUB_CACHE",
    ("pass", "config="): "correct its config.json",
}
"""(verb, argument) -> what to do with a command that has no such option."""

PYTHON_ONLY = (
    "as_maps",
    "cache_dir",
    "column",
    "interpolation",
    "on_progress",
    "output_hidden_states",
    "pooling_head",
    "token",
    "vision_only",
)
"""Arguments that no command has as an option."""

_VALUE = r"'[^']*'|\"[^\"]*\"|[A-Za-z_][\w.]*(?:\(\.\.\.\))?|-?\d[\d.e-]*"
_MENTION = re.compile(
    r"(?:\b(?P<verb>pass|use|set) )?(?<![^\s(])"
    rf"(?P<name>{'|'.join([*OPTIONS, *PYTHON_ONLY])})=(?P<value>{_VALUE})?(?P<comma>, (?=\w+=))?"
)


def in_options(message: str, options: Collection[str]) -> str:
    """Return a message with Python arguments replaced by the options of a command.

    Args:
        message: Message of an error or a warning.
        options: Options of the command.
    """

    def replace(mention: re.Match[str]) -> str:
        return describe(mention, options)

    return _MENTION.sub(replace, message)


@contextlib.contextmanager
def translate_warnings(translate: Callable[[str], str]) -> Iterator[None]:
    """Print the package's warnings to stderr as `translate` returns them."""
    logger = logging.getLogger(siglip_port.__name__)
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(TranslatingFormatter(translate))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class TranslatingFormatter(logging.Formatter):
    """Formatter of messages without level and time."""

    def __init__(self, translate: Callable[[str], str]) -> None:
        super().__init__()
        self.translate = translate

    def format(self, record: logging.LogRecord) -> str:
        """Return the translated message of a record."""
        return self.translate(super().format(record))


def describe(mention: re.Match[str], options: Collection[str]) -> str:
    """Return the option of a mentioned argument, or what to do instead."""
    name = mention["name"]
    value = mention["value"] or ""
    verb = mention["verb"] or ""
    if OPTIONS.get(name) in options:
        words = [verb, OPTIONS[name], *option_values(OPTIONS[name], value)]
        separator = " " if mention["comma"] else ""
        return " ".join(filter(None, words)) + separator
    for argument in (f"{name}={value}", f"{name}="):
        if (verb, argument) in INSTEAD:
            return INSTEAD[verb, argument] + (mention["comma"] or "")
    return f"{verb} {name}={value} (in Python)".strip() + (mention["comma"] or "")


def option_values(option: str, value: str) -> list[str]:
    """Return the value of an option as it is typed; none for a flag."""
    if option in FLAGS:
        return []
    if option == "--config":
        return ["FILE"]
    if not value:
        return []
    return [shlex.quote(value.strip("'\"").removeprefix("torch."))]
