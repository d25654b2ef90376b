"""Text without secrets.

Addresses that the Hub signs, and tokens, open what they name to whoever reads them, so they are
taken out of every message.
"""

from __future__ import annotations

import re
import urllib.request
from urllib.parse import urlsplit

MAX_QUOTED_CHARACTERS = 400
"""Of the client's own text, in a message."""

_URL = re.compile(
    r"(?P<scheme>https?|socks\w*)://(?:[^\s/@'\"<>]*@)?"
    r"(?P<host>[^\s/?#'\"<>]*)(?P<rest>[^\s'\"<>]*)"
)
_TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}|(?i:(?<=bearer )\S+)")


def redact(text: str) -> str:
    """Take tokens, passwords and the queries of addresses out of a text; make one line of it."""
    line = " ".join(text.split())
    line = _TOKEN.sub("...", _URL.sub(_redact_url, line))
    if len(line) > MAX_QUOTED_CHARACTERS:
        return f"{line[:MAX_QUOTED_CHARACTERS]}..."
    return line


def _redact_url(url: re.Match[str]) -> str:
    path = url["rest"].partition("?")[0]
    return f"{url['scheme']}://{url['host']}{path}"


def describe_error(error: BaseException) -> str:
    """Return an error's type and redacted text."""
    text = redact(str(error))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def proxy_for(url: str) -> str | None:
    """Return the proxy for an address, without its password; None where there is none."""
    parts = urlsplit(url)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or not parts.hostname or urllib.request.proxy_bypass(parts.hostname):
        return None
    return redact(proxy if "://" in proxy else f"http://{proxy}")
