"""Texts of errors."""

from __future__ import annotations

import traceback


def full_text(error: BaseException) -> str:
    """Return the message, traceback and causes of an error, including suppressed ones."""
    text = "".join(traceback.format_exception(error))
    cause = error.__cause__ or error.__context__
    return text if cause is None else text + full_text(cause)
