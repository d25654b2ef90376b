"""What could not be fetched, why, and what to do: errors as a user reads them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from siglip_port.checkpoint.errors import CheckpointError, HubUnreachableError
from siglip_port.checkpoint.formats import UnreadableFileError
from siglip_port.hub.errors import NotCachedError, RangesNotSupportedError, RetriesExhaustedError
from siglip_port.hub.options import HubOptions
from siglip_port.hub.redact import describe_error, redact

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

ELSEWHERE = "or pass a folder that holds the checkpoint"
CHECK_SPELLING = f"{ELSEWHERE} (there is none of this name here: check the spelling)"
LOGIN = "log in with `hf auth login`, or pass token="


@dataclass(frozen=True)
class RequestedFile:
    """What was asked for.

    Attributes:
        filename: in the repository; of several, their names.
        name: the Hub id.
        options: of the load.
    """

    filename: str
    name: str
    options: HubOptions

    @property
    def repository(self) -> str:
        """What messages call the repository."""
        return quote_repository(self.name, self.options.revision)

    @property
    def title(self) -> str:
        """What messages call the file."""
        return f"{self.filename} of {self.repository}"


def quote_repository(name: str, revision: str | None) -> str:
    """Return what messages call a repository."""
    return f"{name!r} at revision {revision!r}" if revision else f"{name!r}"


def explain_failure(
    error: Exception, request: RequestedFile, older_commit: str | None
) -> CheckpointError:
    """Return the sentence for an error of a load.

    Args:
        error: whatever was raised.
        request: what was asked for.
        older_commit: that the cache has, if another than was being read.
    """
    from huggingface_hub import errors

    if isinstance(error, NotCachedError):
        return HubUnreachableError(explain_not_cached(error, request))
    cause = describe_cause(error, request)
    if isinstance(error, (RetriesExhaustedError, RangesNotSupportedError)):
        return HubUnreachableError(
            f"{request.title} could not be fetched: {cause}; try again later, {CHECK_SPELLING}"
        )
    if isinstance(error, (errors.HfHubHTTPError, UnreadableFileError, errors.HFValidationError)):
        return CheckpointError(cause)
    if isinstance(error, OSError):
        older = ""
        if older_commit is not None:
            older = (
                f"; what was cached before, commit {older_commit}, loads with local_files_only=True"
            )
        return CheckpointError(f"{request.title} could not be fetched: {cause}{older}")
    return HubUnreachableError(
        f"{request.title} could not be fetched ({cause}); try again later, {ELSEWHERE}"
    )


def explain_not_cached(error: NotCachedError, request: RequestedFile) -> str:
    """Return the sentence for a file that is not here, where the Hub cannot be asked."""
    if error.cause is not None:
        cause = describe_cause(error.cause, request)
        return (
            f"{request.title} is not in the local cache, and the Hub could not be asked: "
            f"{cause}; try again later, {CHECK_SPELLING}"
        )
    reason = "HF_HUB_OFFLINE is set"
    if request.options.local_files_only:
        reason = "only local files were allowed"
    return (
        f"{request.title} is not in the local cache, and {reason}; connect once to "
        f"fetch it, {CHECK_SPELLING}"
    )


def describe_cause(error: Exception, request: RequestedFile) -> str:
    """Say what went wrong, for a sentence."""
    from huggingface_hub import errors

    if isinstance(error, UnreadableFileError):
        return f"{request.title} is not a whole safetensors file ({error}); {error.advice}"
    if isinstance(error, errors.HFValidationError):
        return f"{request.name!r} is neither a path nor a Hub id: {error}"
    if isinstance(error, errors.HfHubHTTPError):
        return f"{describe_refusal(error, request)} ({describe_error(error)})"
    if isinstance(error, (RetriesExhaustedError, RangesNotSupportedError, OSError)):
        return redact(str(error))
    return describe_error(error)


def describe_refusal(error: HfHubHTTPError, request: RequestedFile) -> str:
    """Say why the Hub refuses, and what to do."""
    from huggingface_hub import constants, errors

    if is_token_refused(error):
        return (
            f"the Hub does not accept the token with which {request.title} was asked for: it has "
            f"expired or was revoked; {LOGIN}; or, for what is public, pass token=False or "
            "unset HF_TOKEN"
        )
    if isinstance(error, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{request.name}"
        return f"{request.repository} is gated: ask for access at {page}, then {LOGIN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"the Hub has no repository {request.repository}; check the spelling, or, if it is "
            f"private, {LOGIN}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the Hub repository {request.name!r} has no revision {request.options.revision!r}"
    status = error.response.status_code
    return f"the Hub refused {request.title} (HTTP {status}); try again later, {ELSEWHERE}"


def is_token_refused(error: HfHubHTTPError) -> bool:
    """Whether the Hub knows no such token, where it would show the repository to anybody."""
    response = error.response
    if response.status_code != 401 or not response.request.headers.get("Authorization"):
        return False
    is_about_repository = response.headers.get("X-Error-Code") in ("RepoNotFound", "GatedRepo")
    return not is_about_repository or "invalid credentials" in str(error).lower()


def damaged_file(path: Path) -> CheckpointError:
    """Return the error for a file of the cache that cannot be mended offline."""
    return CheckpointError(
        f"{path} is damaged; it is fetched again when the Hub may be asked (now: local files only)"
    )
