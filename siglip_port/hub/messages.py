"""Error messages of downloads: what failed, why, and what to do."""

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

LOGIN = "log in with `hf auth login`, or pass token="


@dataclass(frozen=True)
class RequestedFile:
    """Requested file, for messages.

    Attributes:
        filename: Name in the repository; several names are joined by "and".
        name: Hub id.
        options: Options of the load.
    """

    filename: str
    name: str
    options: HubOptions

    @property
    def repository(self) -> str:
        """The repository in messages."""
        return format_repository(self.name, self.options.revision)

    @property
    def local_alternative(self) -> str:
        """What to do offline; a misspelled local path is taken for a Hub id."""
        return f"pass a local path ({self.name!r} is not one)"

    @property
    def alternatives(self) -> str:
        """What to do if the Hub cannot be reached."""
        return f"try again later, or {self.local_alternative}"


def format_repository(name: str, revision: str | None) -> str:
    """Return a Hub id with its revision: `name` or `name@revision`."""
    return f"{name}@{revision}" if revision else name


def explain_failure(
    error: Exception, request: RequestedFile, older_commit: str | None
) -> CheckpointError:
    """Return the error that a user sees for an error of a load.

    Args:
        error: Error that was raised.
        request: File that was requested.
        older_commit: Cached commit, if it differs from the requested one.
    """
    from huggingface_hub import errors

    if isinstance(error, NotCachedError):
        return HubUnreachableError(explain_not_cached(error, request))
    cause = describe_cause(error, request)
    if isinstance(error, (errors.HfHubHTTPError, UnreadableFileError, errors.HFValidationError)):
        return CheckpointError(f"{request.repository}: {cause}")
    failure = f"{request.repository}: cannot download {request.filename}: {cause}"
    if not isinstance(error, OSError):
        return HubUnreachableError(f"{failure}; {request.alternatives}")
    if older_commit is not None:
        failure += f"; the cached commit {older_commit} still loads with local_files_only=True"
    return CheckpointError(failure)


def explain_not_cached(error: NotCachedError, request: RequestedFile) -> str:
    """Return the message for a file that is not cached and cannot be downloaded."""
    subject = f"{request.repository}: {request.filename} is not in the local cache, and"
    if error.cause is not None:
        cause = describe_cause(error.cause, request).removesuffix(f"; {request.alternatives}")
        return f"{subject} the Hub cannot be reached: {cause}; {request.alternatives}"
    offline = describe_offline(request.options)
    return f"{subject} {offline}; load it once online, or {request.local_alternative}"


def describe_offline(options: HubOptions) -> str:
    """Return which setting disables downloads."""
    if options.local_files_only:
        return "downloads are disabled by local_files_only=True"
    return "downloads are disabled by HF_HUB_OFFLINE"


def describe_cause(error: Exception, request: RequestedFile) -> str:
    """Return the cause of a failure, without the repository."""
    from huggingface_hub import errors

    if isinstance(error, UnreadableFileError):
        return f"{request.filename} is not a valid safetensors file ({error}); {error.advice}"
    if isinstance(error, errors.HFValidationError):
        return f"neither a local path nor a Hub id ({redact(str(error))})"
    if isinstance(error, errors.HfHubHTTPError):
        return describe_refusal(error, request)
    if isinstance(error, (RetriesExhaustedError, RangesNotSupportedError, OSError, ValueError)):
        return redact(str(error))
    return describe_error(error)


def describe_refusal(error: HfHubHTTPError, request: RequestedFile) -> str:
    """Return why the Hub refused a request, and what to do."""
    from huggingface_hub import constants, errors

    response = describe_response(error)
    if is_token_refused(error):
        return (
            f"the Hub rejected the token, which is expired or revoked ({response}); {LOGIN}; for a "
            "public repository, pass token=False or unset HF_TOKEN"
        )
    if isinstance(error, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{request.name}"
        return f"the repository is gated ({response}); request access at {page}, then {LOGIN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"no such repository on the Hub ({response}); check the spelling, or, if the "
            f"repository is private, {LOGIN}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"no such revision on the Hub ({response}); pass an existing branch, tag or commit"
    return f"the Hub refused {request.filename} ({response}); {request.alternatives}"


def describe_response(error: HfHubHTTPError) -> str:
    """Return the HTTP status of a refusal, and the message and request id of the Hub, if any."""
    response = f"HTTP {error.response.status_code}"
    if error.server_message:
        response += f": {redact(error.server_message)}"
    if error.request_id:
        response += f", request id {redact(error.request_id)}"
    return response


def is_token_refused(error: HfHubHTTPError) -> bool:
    """Return whether the Hub rejected the token itself, not its access to the repository."""
    response = error.response
    if response.status_code != 401 or not response.request.headers.get("Authorization"):
        return False
    is_about_repository = response.headers.get("X-Error-Code") in ("RepoNotFound", "GatedRepo")
    return not is_about_repository or "invalid credentials" in str(error).lower()


def damaged_file(path: Path, options: HubOptions) -> CheckpointError:
    """Return the error for a damaged cached file that cannot be downloaded again."""
    return CheckpointError(
        f"{path}: damaged, and {describe_offline(options)}; load it once online to repair it"
    )
