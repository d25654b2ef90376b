"""A repository on the Hub: every file is requested once, all from one commit."""

from __future__ import annotations

import logging

from siglip_port.checkpoint.source import CONFIG
from siglip_port.hub.cache import COMMIT, RepositoryCache
from siglip_port.hub.errors import NotCachedError
from siglip_port.hub.http_range import RemoteFile
from siglip_port.hub.messages import RequestedFile, describe_cause, format_repository
from siglip_port.hub.options import HubOptions
from siglip_port.hub.retry import RetryBudget, call_with_timeout

log = logging.getLogger(__name__)

LISTING_SECONDS = 20.0
"""Timeout of the file list, in seconds; the list only adds detail to an error message."""


class RepositoryClient:
    """Client that requests the files of a repository from the Hub.

    The first file resolves the revision to a commit; all other files are requested from that
    commit, so a push between two requests cannot mix two versions. If the Hub cannot be reached,
    the cached commit is used.

    Args:
        name: Hub id.
        options: Options of the load.

    Attributes:
        commit: Commit that is read; None before it is resolved.
        cache: Cache of the repository.
    """

    def __init__(self, name: str, options: HubOptions) -> None:
        self.name = name
        self.options = options
        self.commit: str | None = None
        self.cache = RepositoryCache(options.cache_root, name)
        self._budget = RetryBudget()
        self._failure: Exception | None = None  # after a failed request, no more are sent
        self._files: dict[str, RemoteFile] = {}
        self._absent: set[str] = set()

    @property
    def title(self) -> str:
        """The repository in messages."""
        return format_repository(self.name, self.options.revision)

    @property
    def branch(self) -> str:
        """The revision: branch, tag or commit."""
        return self.options.revision or "main"

    @property
    def known_commit(self) -> str | None:
        """The commit, if it is known without a request: resolved, or in the options.

        Offline, the cached commit of the revision.
        """
        revision = self.options.revision
        if self.commit is None and revision is not None and COMMIT.fullmatch(revision):
            return revision
        if self.commit is None and self.options.is_offline:
            return self.cache.commit_of(self.branch)
        return self.commit

    @property
    def older_commit(self) -> str | None:
        """The cached commit of the revision, if it differs from the one that is read."""
        cached = self.cache.commit_of(self.branch)
        return None if cached == self.commit else cached

    @property
    def remote_files(self) -> dict[str, RemoteFile]:
        """The files that were requested and exist, by name."""
        return self._files

    def resolve_commit(self, filename: str) -> None:
        """Resolve the commit with a request for a file; use the cached one if that fails."""
        from huggingface_hub.errors import RemoteEntryNotFoundError, RevisionNotFoundError

        self.commit = self.known_commit
        if self.commit is not None or self.options.is_offline:
            return
        cached = self.cache.commit_of(self.branch)
        has_weights = cached is not None and self.cache.has_weights(cached)
        try:
            self.request(filename, max_attempts=1 if has_weights else None)
        except RemoteEntryNotFoundError:
            return
        except RevisionNotFoundError:
            raise
        except Exception as error:
            if cached is None:
                raise
            # fall back to the cached commit if it can answer
            if not self.cache.can_answer(cached, filename):
                raise NotCachedError(self._failure or error) from error
            self.commit = cached
            log.warning(
                "%s: the Hub cannot be reached (%s); using the cached commit %s, which may be "
                "outdated",
                self.title,
                describe_cause(error, self.describe_file(filename)),
                cached,
            )

    def request(self, filename: str, max_attempts: int | None = None) -> RemoteFile:
        """Request the metadata of a file once; after a failed request, send no more.

        Raises:
            huggingface_hub.errors.RemoteEntryNotFoundError: The repository has no such file.
            Exception: The Hub cannot be reached, or refused the request.
        """
        from huggingface_hub.errors import RemoteEntryNotFoundError

        if self._failure is not None:
            raise NotCachedError(self._failure)
        if filename in self._files:
            return self._files[filename]
        try:
            file = self._open(filename, self.commit or self.options.revision, max_attempts)
        except RemoteEntryNotFoundError as error:
            self._absent.add(filename)
            commit = error.response.headers.get("X-Repo-Commit", "")
            if COMMIT.fullmatch(commit):
                self._pin(commit)
                self.cache.set_absent(commit, filename)
            raise
        except Exception as error:
            self._failure = error
            raise
        self._files[filename] = file
        self._pin(file.commit)
        return file

    def request_again(self, file: RemoteFile) -> RemoteFile:
        """Request the metadata of a file again, since it may have been corrupted in transit."""
        return self._open(file.filename, file.commit)

    def is_absent(self, filename: str) -> bool:
        """Return whether the repository is known not to have the file."""
        if filename in self._absent:
            return True
        return self.commit is not None and self.cache.is_absent(self.commit, filename)

    def save_commit(self) -> None:
        """Save the commit of the revision in the cache, for offline use."""
        if self.commit is not None and not self.options.is_offline:
            self.cache.set_commit(self.branch, self.commit)

    def listing(self) -> list[str]:
        """Return the names of the files in the repository; those in the cache if offline.

        Empty if the request fails.
        """
        from huggingface_hub import HfApi

        if self.options.is_offline or self._failure is not None:
            return self.cache.files(self.known_commit or "")
        api = HfApi(token=self.options.token)
        revision = self.commit or self.options.revision
        try:
            return sorted(
                call_with_timeout(
                    LISTING_SECONDS, lambda: api.list_repo_files(self.name, revision=revision)
                )
            )
        except Exception:  # The list only adds detail to an error message.
            return []

    def describe_file(self, filename: str) -> RequestedFile:
        """Return the description of a file for messages."""
        return RequestedFile(filename, self.name, self.options)

    def _open(
        self, filename: str, revision: str | None, max_attempts: int | None = None
    ) -> RemoteFile:
        return RemoteFile(
            self.name, filename, revision, self.options.token, self._budget, max_attempts
        )

    def _pin(self, commit: str) -> None:
        """Pin the load to a commit. The cached commit is replaced only after the download."""
        if self.commit is None:
            self.commit = commit
            if self.cache.commit_of(self.branch) is None:
                self.cache.set_commit(self.branch, commit)


def unreachable_reason(name: str, seconds: float = 10.0) -> str | None:
    """Return why the Hub does not respond to a request for a repository; None if it does.

    A refusal is a response, except HTTP 500 and above.

    Args:
        name: Hub id.
        seconds: Timeout for name lookup, connection and response together.
    """
    from huggingface_hub.errors import HfHubHTTPError

    def request() -> RemoteFile:
        return RemoteFile(name, CONFIG, None, None, RetryBudget(), max_attempts=1)

    try:
        call_with_timeout(seconds, request)
    except HfHubHTTPError as error:
        status = error.response.status_code
        return f"HTTP {status}" if status >= 500 else None
    except Exception as error:  # Any other error means that the Hub did not respond.
        return describe_cause(error, RequestedFile(CONFIG, name, HubOptions()))
    return None
