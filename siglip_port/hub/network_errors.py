"""Classify and describe network errors: which are transient, and what caused them."""

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
"""HTTP statuses that are worth a retry."""

EXPIRED_STATUS = (400, 401, 403, 404, 410)
"""HTTP statuses of the CDN for an expired signed URL."""

# no requests remaining (r=0), window reset in t seconds
_RATE_LIMIT = re.compile(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d+)")


@contextmanager
def classify_errors(url: str, address: str | None = None) -> Iterator[None]:
    """Turn errors of the client into `TransientError` if a retry may succeed.

    Args:
        url: URL of the file on the Hub.
        address: URL of the request, if it differs.

    Raises:
        TransientError: A retry may succeed.
        RetriesExhaustedError: A retry would fail the same way.
        huggingface_hub.errors.HfHubHTTPError: The Hub refused the request.
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
    # The errors of the client's HTTP library have no common base class. Their text may contain
    # signed URLs.
    except Exception as error:
        # local error, such as a full disk; network errors of the client have no errno
        if isinstance(error, OSError) and error.errno is not None:
            raise
        failure = diagnose_connection(error, address or url)
        if failure.is_final:
            raise RetriesExhaustedError(failure.message) from error
        raise NoConnectionError(failure.message) from error


def classify_refusal(
    error: HfHubHTTPError, url: str
) -> TransientError | RetriesExhaustedError | None:
    """Return the error for an HTTP status; None if the refusal is permanent.

    Args:
        error: Error with the response.
        url: URL of the file on the Hub.
    """
    status = error.response.status_code
    address = str(error.response.url)
    host = urlsplit(address).hostname
    if status == 407:
        proxy = proxy_for(address)
        subject = f"the proxy {proxy}" if proxy else "a proxy"
        return RetriesExhaustedError(f"{subject} requires a user name and password (HTTP 407)")
    if status in EXPIRED_STATUS and not is_hub(address, url):
        message = f"{host} rejected the signed URL of the file (HTTP {status})"
        return AddressExpiredError(message, wait=0)
    if status in TRANSIENT_STATUS:
        return TransientError(f"{host} returned HTTP {status}", retry_after(error.response.headers))
    return None


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the wait that a server asks for, in seconds; None if it does not.

    From an exhausted `RateLimit`, else from `Retry-After` (seconds or a date).
    """
    limit = _RATE_LIMIT.search(headers.get("RateLimit", ""))
    if limit is not None:
        return float(limit[1]) + 1  # t is rounded down
    wait = headers.get("Retry-After", "").strip()
    if wait.isdecimal():
        return float(wait)
    try:
        return max(parsedate_to_datetime(wait).timestamp() - time.time(), 0.0)
    except ValueError:
        return None


@dataclass(frozen=True)
class ConnectionFailure:
    """Why there was no response.

    Attributes:
        message: Cause, without a final period.
        is_final: Whether a retry would fail the same way.
    """

    message: str
    is_final: bool = True


@dataclass(frozen=True)
class FailedConnection:
    """Error of the client's HTTP library, with its host and proxy.

    Attributes:
        error: Error that was raised.
        host: Host of the request.
        proxy: Proxy of the request; None if there is none.
    """

    error: Exception
    host: str | None
    proxy: str | None

    @property
    def kind(self) -> str:
        """Name of the error type; the types differ between releases of the client."""
        return type(self.error).__name__

    @property
    def chain(self) -> list[BaseException]:
        """The error and its causes."""
        chain: list[BaseException] = []
        link: BaseException | None = self.error
        while link is not None:
            chain.append(link)
            link = link.__cause__ or link.__context__
        return chain

    @property
    def text(self) -> str:
        """The texts of the error and its causes."""
        return " ".join(str(link) for link in self.chain)

    @property
    def description(self) -> str:
        """Type and redacted text of the error."""
        return describe_error(self.error)

    def is_caused_by(self, kind: type[BaseException]) -> bool:
        """Return whether the error or one of its causes has this type."""
        return any(isinstance(link, kind) for link in self.chain)


def diagnose_connection(error: Exception, url: str) -> ConnectionFailure:
    """Return why a request got no response.

    Args:
        error: Error of the client's HTTP library.
        url: URL of the request.
    """
    connection = FailedConnection(error, urlsplit(url).hostname, proxy_for(url))
    for check in CHECKS:
        failure = check(connection)
        if failure is not None:
            return failure
    return unexplained_failure(connection)


def untrusted_certificate(connection: FailedConnection) -> ConnectionFailure | None:
    """Check for a certificate that is not trusted."""
    is_untrusted = connection.is_caused_by(ssl.SSLCertVerificationError)
    if not is_untrusted and "CERTIFICATE_VERIFY_FAILED" not in connection.text:
        return None
    return ConnectionFailure(
        f"the TLS certificate of {connection.host} is not trusted ({connection.description}); "
        "if a firewall or proxy inspects TLS, set SSL_CERT_FILE to its CA certificate"
    )


def missing_socks_package(connection: FailedConnection) -> ConnectionFailure | None:
    """Check for a SOCKS proxy without the package that it needs."""
    if "socksio" not in connection.text:
        return None
    return ConnectionFailure(
        f"the SOCKS proxy {connection.proxy} needs the package socksio; run: pip install socksio"
    )


def redirect_loop(connection: FailedConnection) -> ConnectionFailure | None:
    """Check for a redirect loop."""
    if connection.kind != "TooManyRedirects":
        return None
    return ConnectionFailure(
        f"{connection.host} redirects in a loop ({connection.description}); check HF_ENDPOINT and "
        "the proxy"
    )


def invalid_request(connection: FailedConnection) -> ConnectionFailure | None:
    """Check for a request that cannot be sent."""
    kinds = ("LocalProtocolError", "UnicodeEncodeError", "InvalidURL", "UnsupportedProtocol")
    if connection.kind not in kinds:
        return None
    return ConnectionFailure(
        f"the request to {connection.host} is invalid ({connection.description}); check "
        "HF_ENDPOINT, the proxy and the token"
    )


def failing_proxy(connection: FailedConnection) -> ConnectionFailure | None:
    """Check for a proxy: if there is one, it is the likely cause."""
    if connection.proxy is None:
        return None
    return ConnectionFailure(
        f"no connection to {connection.host} through the proxy {connection.proxy} "
        f"({connection.description})",
        is_final=connection.kind == "ProxyError" or "407" in connection.text,
    )


def unexplained_failure(connection: FailedConnection) -> ConnectionFailure:
    """Describe a failure that no check recognized."""
    detail = ": host name not resolved" if connection.is_caused_by(socket.gaierror) else ""
    return ConnectionFailure(
        f"no connection to {connection.host}{detail} ({connection.description})", is_final=False
    )


CHECKS: tuple[Callable[[FailedConnection], ConnectionFailure | None], ...] = (
    untrusted_certificate,
    missing_socks_package,
    redirect_loop,
    invalid_request,
    failing_proxy,
)
"""The first check that recognizes a failure describes it."""
