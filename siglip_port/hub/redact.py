"""Remove secrets from messages: tokens, passwords, and the signatures of signed URLs."""

from __future__ import annotations

import re
import urllib.request
from urllib.parse import urlsplit

MAX_QUOTED_CHARACTERS = 400
"""Maximum length of quoted library text in a message."""

_URL = re.compile(
    r"(?P<scheme>https?|socks\w*)://(?:[^\s/@'\"<>]*@)?"
    r"(?P<host>[^\s/?#'\"<>]*)(?P<rest>[^\s'\"<>]*)"
)
_TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}|(?i:(?<=bearer )\S+)")


def redact(text: str) -> str:
    """Return a text as one line, without tokens, passwords and URL queries."""
    line = " ".join(text.split())
    line = _TOKEN.sub("...", _URL.sub(_redact_url, line))
    if len(line) > MAX_QUOTED_CHARACTERS:
        return f"{line[:MAX_QUOTED_CHARACTERS]}..."
    return line


def _redact_url(url: re.Match[str]) -> str:
    path = url["rest"].partition("?")[0]
    return f"{url['scheme']}://{url['host']}{path}"


def describe_error(error: BaseException) -> str:
    """Return the type of an error and its redacted text."""
    text = redact(str(error))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def proxy_for(url: str) -> str | None:
    """Return the proxy for a URL, without its password; None if there is none."""
    parts = urlsplit(url)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or not parts.hostname or urllib.request.proxy_bypass(parts.hostname):
        return None
    return redact(proxy if "://" in proxy else f"http://{proxy}")
