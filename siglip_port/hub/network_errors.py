"""Why the Hub could not be reached, in words: what the client's HTTP library met, without secrets.

Addresses that the Hub signs and tokens open what they name to whoever reads them, so they are taken
out of every text.
"""

from __future__ import annotations

import re
import socket
import ssl
import urllib.request
from collections.abc import Iterator
from urllib.parse import urlsplit

_LONGEST = 400  # characters of the client's own text that a message repeats

_ADDRESS = re.compile(
    r"(?P<scheme>https?|socks\w*)://(?:[^\s/@'\"<>]*@)?(?P<host>[^\s/?#'\"<>]*)(?P<rest>[^\s'\"<>]*)"
)
_TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}|(?i:(?<=bearer )\S+)")


def harmless(text: str) -> str:
    """Takes secrets out of a text, and makes one line of it.

    No token, no password, no query of an address.
    """

    def without_secrets(address: re.Match[str]) -> str:
        return f"{address['scheme']}://{address['host']}{address['rest'].partition('?')[0]}"

    line = _TOKEN.sub("...", _ADDRESS.sub(without_secrets, " ".join(text.split())))
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."


def quoted(error: BaseException) -> str:
    """What an error says of itself: its kind and its text."""
    text = harmless(str(error))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def proxy_of(url: str) -> str | None:
    """Returns the proxy through which an address is asked, without its password.

    None where there is none.
    """
    parts = urlsplit(url)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or not parts.hostname or urllib.request.proxy_bypass(parts.hostname):
        return None
    return harmless(proxy if "://" in proxy else f"http://{proxy}")


def no_connection(error: Exception, url: str) -> tuple[str, bool]:
    """Says why there is no answer from an address.

    Args:
        error: of the client's HTTP library.
        url: that was asked.

    Returns:
        A text for a sentence, and whether another attempt would meet the same.
    """
    host, proxy, chain = urlsplit(url).hostname, proxy_of(url), list(_chain(error))
    text = " ".join(str(link) for link in chain)
    if (
        any(isinstance(link, ssl.SSLCertVerificationError) for link in chain)
        or "CERTIFICATE_VERIFY_FAILED" in text
    ):
        advice = "where a firewall or proxy inspects TLS, name the file of its certificate in SSL_CERT_FILE"
        return f"the certificate that {host} shows is not trusted ({quoted(error)}): {advice}", True
    if "socksio" in text:
        return (
            f"the proxy {proxy} is a SOCKS proxy, for which the package socksio is missing: "
            "install it",
            True,
        )
    if type(error).__name__ == "TooManyRedirects":
        return (
            f"{host} redirects in a circle ({quoted(error)}): check HF_ENDPOINT, and proxies",
            True,
        )
    if type(error).__name__ in (
        "LocalProtocolError",
        "UnicodeEncodeError",
        "InvalidURL",
        "UnsupportedProtocol",
    ):
        return (
            f"{host} cannot be asked ({quoted(error)}): check HF_ENDPOINT, the proxy and the token",
            True,
        )
    if proxy is not None:
        refused = type(error).__name__ == "ProxyError" or "407" in text
        return f"no connection to {host} through the proxy {proxy} ({quoted(error)})", refused
    unknown = (
        ": its address is not known"
        if any(isinstance(link, socket.gaierror) for link in chain)
        else ""
    )
    return f"no connection to {host}{unknown} ({quoted(error)})", False


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and those that it came of."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__
