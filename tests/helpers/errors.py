"""What tests look for in errors."""

from __future__ import annotations

import traceback


def full_text(error: BaseException) -> str:
    """All that an error says: its message, its traceback, and what it came of, shown or not."""
    text = "".join(traceback.format_exception(error))
    cause = error.__cause__ or error.__context__
    return text if cause is None else text + full_text(cause)
