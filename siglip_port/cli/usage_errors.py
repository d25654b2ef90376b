"""Uniform messages for rejected option values in every release of typer.

Some releases check values with click, others with pydantic, whose messages differ; those of
pydantic leave out the rejected value.
"""

from __future__ import annotations

import re

import typer

REWORDINGS = {
    r"(?P<value>.+) is not one of (?P<choices>.+)": "must be one of {choices}, got {value}",
    r"(?P<value>.+) is not in the range x>=(?P<minimum>.+)": "must be at least {minimum}, "
    "got {value}",
    r"Input should be greater than or equal to (?P<minimum>.+)": "must be at least {minimum}, "
    "got {value}",
    r"(?P<value>.+) is not a valid int.*": "must be an integer, got {value}",
    r"Input should be a valid integer.*": "must be an integer, got {value}",
    r"(?:dir|[Dd]irectory) (?P<value>.+) is a file": "{value} is a file; pass a folder",
}
"""Message of click or pydantic, a pattern -> message of this program."""


def reword(error: typer.BadParameter) -> None:
    """Put the message of an error into the form `must be ..., got ...`."""
    message = error.message.removeprefix("Value error, ").removesuffix(".")
    for pattern, template in REWORDINGS.items():
        match = re.fullmatch(pattern, message)
        if match is not None:
            fields = {"value": rejected_value(error), **match.groupdict()}
            fields["choices"] = fields.get("choices", "").replace("'", "")
            error.message = template.format(**fields)
            return


def rejected_value(error: typer.BadParameter) -> str:
    """Return the value that pydantic rejected, in quotes unless it is a number.

    Empty for errors of click, whose messages contain the value.
    """
    details = getattr(error.__cause__, "errors", None)
    if details is None:
        return ""
    value = str(details()[0]["input"])
    return value if re.fullmatch(r"-?\d+", value) else repr(value)
