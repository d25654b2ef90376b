"""What goes wrong between here and the Hub: which errors may pass, and what they are, in words."""

from __future__ import annotations

import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from siglip_port.hub.errors import (
    AddressExpiredError,
    NoConnectionError,
    RangesNotSupportedError,
    RetriesExhaustedError,
    TransientError,
)
from siglip_port.hub.redact import describe_error, proxy_for
from siglip_port.hub.session import is_hub

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504)
"""What a server answers that may answer better a little later."""

EXPIRED_STATUS = (400, 401, 403, 404, 410)
"""What the CDN answers when a signed address has expired."""

# nothing remains, and for how many seconds
_RATE_LIMIT = re.compile(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d+)")


@contextmanager
def classify_errors(url: str, address: str | None = None) -> Iterator[None]:
    """Turn what the client raises into a `TransientError`, where the next attempt may do better.

    Args:
        url: of the file at the Hub.
        address: that is asked, if another.

    Raises:
        TransientError: as above.
        RetriesExhaustedError: another attempt would meet the same.
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except (TransientError, RangesNotSupportedError, RetriesExhaustedError, OfflineModeIsEnabled):
        raise
    except HfHubHTTPError as error:
        refusal = classify_refusal(error, url)
        if refusal is None:
            raise
        raise refusal from error
    # The errors of the client's HTTP library have no base in common. Their text may hold addresses.
    except Exception as error:
        # an error of this machine; the client's own have no number
        if isinstance(error, OSError) and error.errno is not None:
            raise
        failure = diagnose_connection(error, address or url)
        if failure.is_final:
            raise RetriesExhaustedError(failure.message) from error
        raise NoConnectionError(failure.message) from error


def classify_refusal(
    error: HfHubHTTPError, url: str
) -> TransientError | RetriesExhaustedError | None:
    """Return what an HTTP status means for the next attempt; None where the Hub simply refuses.

    Args:
        error: with the response.
        url: of the file at the Hub.
    """
    status = error.response.status_code
    address = str(error.response.url)
    host = urlsplit(address).hostname
    if status == 407:
        proxy = proxy_for(address) or "in between"
        return RetriesExhaustedError(f"the proxy {proxy} asks for a name and password (HTTP 407)")
    if status in EXPIRED_STATUS and not is_hub(address, url):
        message = f"the address that the Hub gave for the file is refused (HTTP {status} of {host})"
        return AddressExpiredError(message, wait=0)
    if status in TRANSIENT_STATUS:
        return TransientError(f"{host} answers HTTP {status}", retry_after(error.response.headers))
    return None


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return how many seconds a server asks to wait.

    By a rate limit that is used up, or in `Retry-After`, also as a date.
    """
    limit = _RATE_LIMIT.search(headers.get("RateLimit", ""))
    if limit is not None:
        return float(limit[1]) + 1  # it is rounded
    wait = headers.get("Retry-After", "").strip()
    if wait.isdecimal():
        return float(wait)
    try:
        return max(parsedate_to_datetime(wait).timestamp() - time.time(), 0.0)
    except ValueError:
        return None


@dataclass(frozen=True)
class ConnectionFailure:
    """Why there is no answer.

    Attributes:
        message: for a sentence.
        is_final: whether another attempt would meet the same.
    """

    message: str
    is_final: bool = True


@dataclass(frozen=True)
class FailedConnection:
    """An error of the client's HTTP library, with what the checks below look at.

    Attributes:
        error: that was raised.
        host: that was asked.
        proxy: through which it was asked; None where there is none.
    """

    error: Exception
    host: str | None
    proxy: str | None

    @property
    def kind(self) -> str:
        """The name of the error's type: the types are of a library that may change."""
        return type(self.error).__name__

    @property
    def chain(self) -> list[BaseException]:
        """The error, and those that it came of."""
        chain: list[BaseException] = []
        link: BaseException | None = self.error
        while link is not None:
            chain.append(link)
            link = link.__cause__ or link.__context__
        return chain

    @property
    def text(self) -> str:
        """The texts of all errors."""
        return " ".join(str(link) for link in self.chain)

    @property
    def description(self) -> str:
        """The error's type and redacted text."""
        return describe_error(self.error)

    def comes_of(self, kind: type[BaseException]) -> bool:
        """Whether an error of this type is among the causes."""
        return any(isinstance(link, kind) for link in self.chain)


def diagnose_connection(error: Exception, url: str) -> ConnectionFailure:
    """Return why there is no answer from an address.

    Args:
        error: of the client's HTTP library.
        url: that was asked.
    """
    connection = FailedConnection(error, urlsplit(url).hostname, proxy_for(url))
    for check in CHECKS:
        failure = check(connection)
        if failure is not None:
            return failure
    return unexplained_failure(connection)


def untrusted_certificate(connection: FailedConnection) -> ConnectionFailure | None:
    """Check for a certificate that is not trusted."""
    is_untrusted = connection.comes_of(ssl.SSLCertVerificationError)
    if not is_untrusted and "CERTIFICATE_VERIFY_FAILED" not in connection.text:
        return None
    return ConnectionFailure(
        f"the certificate that {connection.host} shows is not trusted ({connection.description}): "
        "where a firewall or proxy inspects TLS, name the file of its certificate in SSL_CERT_FILE"
    )


def missing_socks_package(connection: FailedConnection) -> ConnectionFailure | None:
    """Check for a SOCKS proxy without the package that speaks to it."""
    if "socksio" not in connection.text:
        return None
    return ConnectionFailure(
        f"the proxy {connection.proxy} is a SOCKS proxy, for which the package socksio is missing: "
        "install it"
    )


def circular_redirects(connection: FailedConnection) -> ConnectionFailure | None:
    """Check for redirects without an end."""
    if connection.kind != "TooManyRedirects":
        return None
    return ConnectionFailure(
        f"{connection.host} redirects in a circle ({connection.description}): check HF_ENDPOINT, "
        "and proxies"
    )


def invalid_request(connection: FailedConnection) -> ConnectionFailure | None:
    """Check for a request that cannot be sent."""
    kinds = ("LocalProtocolError", "UnicodeEncodeError", "InvalidURL", "UnsupportedProtocol")
    if connection.kind not in kinds:
        return None
    return ConnectionFailure(
        f"{connection.host} cannot be asked ({connection.description}): check HF_ENDPOINT, the "
        "proxy and the token"
    )


def failing_proxy(connection: FailedConnection) -> ConnectionFailure | None:
    """Check for a proxy, which is the likely cause where there is one."""
    if connection.proxy is None:
        return None
    return ConnectionFailure(
        f"no connection to {connection.host} through the proxy {connection.proxy} "
        f"({connection.description})",
        is_final=connection.kind == "ProxyError" or "407" in connection.text,
    )


def unexplained_failure(connection: FailedConnection) -> ConnectionFailure:
    """Describe a failure that no check knows."""
    unknown = ": its address is not known" if connection.comes_of(socket.gaierror) else ""
    return ConnectionFailure(
        f"no connection to {connection.host}{unknown} ({connection.description})", is_final=False
    )


CHECKS: tuple[Callable[[FailedConnection], ConnectionFailure | None], ...] = (
    untrusted_certificate,
    missing_socks_package,
    circular_redirects,
    invalid_request,
    failing_proxy,
)
"""The first that knows a failure describes it."""
