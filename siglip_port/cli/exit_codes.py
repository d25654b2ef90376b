"""Exit codes of `siglip-port`, for every command."""

from __future__ import annotations

SUCCESS = 0
FAILURE = 1
USAGE_ERROR = 2
INCOMPLETE = 3
INTERRUPTED = 130

MEANINGS = {
    SUCCESS: "success",
    FAILURE: "failure",
    USAGE_ERROR: "usage error or missing extra",
    INCOMPLETE: "incomplete: images failed (embed), or the self-test failed (verify)",
    INTERRUPTED: "interrupted; embed resumes when the command is repeated",
}
"""Exit code -> its meaning."""

VERIFY_MEANINGS = "verify: 0 equal, 1 different, 2 could not compare"


def help_text() -> str:
    """Format the exit codes for `siglip-port --help`; no line is longer than 78 columns."""
    lines = [f"  {code:<3}  {meaning}" for code, meaning in MEANINGS.items()]
    # click keeps the line breaks of a paragraph that starts with \b.
    return "\n".join(["\b", "Exit codes:", *lines, f"  {VERIFY_MEANINGS}"])
