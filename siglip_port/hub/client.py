"""One repository at the Hub: each file is asked for once, and all of them of one commit."""

from __future__ import annotations

import logging

from siglip_port.checkpoint.source import CONFIG
from siglip_port.hub.cache import COMMIT, RepositoryCache
from siglip_port.hub.errors import NotCachedError
from siglip_port.hub.http_range import RemoteFile
from siglip_port.hub.messages import RequestedFile, describe_cause, quote_repository
from siglip_port.hub.options import HubOptions
from siglip_port.hub.retry import RetryBudget, call_with_timeout

log = logging.getLogger(__name__)

LISTING_SECONDS = 20.0
"""That a list of files is waited for: it only adds to a message about another fault."""


class RepositoryClient:
    """Asks the Hub for the files of a repository.

    Once the Hub has named the commit, with the first file, all others are taken from that commit,
    so that a push between two requests cannot mix two versions. Where the Hub cannot be asked, it
    is the commit that the cache knows.

    Args:
        name: the Hub id.
        options: of the load.

    Attributes:
        commit: that is read; None before it is known.
        cache: the repository's place in the Hub's cache.
    """

    def __init__(self, name: str, options: HubOptions) -> None:
        self.name = name
        self.options = options
        self.commit: str | None = None
        self.cache = RepositoryCache(options.cache_root, name)
        self._budget = RetryBudget()
        self._failure: Exception | None = None  # of the last request: nothing more is asked
        self._files: dict[str, RemoteFile] = {}
        self._absent: set[str] = set()

    @property
    def title(self) -> str:
        """What messages call the repository."""
        return quote_repository(self.name, self.options.revision)

    @property
    def branch(self) -> str:
        """The revision, which may be a tag or a commit, too."""
        return self.options.revision or "main"

    @property
    def known_commit(self) -> str | None:
        """The commit, where the Hub need not be asked: named with a file, or by the options.

        Offline, what was last.
        """
        revision = self.options.revision
        if self.commit is None and revision is not None and COMMIT.fullmatch(revision):
            return revision
        if self.commit is None and self.options.is_offline:
            return self.cache.commit_of(self.branch)
        return self.commit

    @property
    def older_commit(self) -> str | None:
        """The commit that the cache has of the branch, if another than is read."""
        cached = self.cache.commit_of(self.branch)
        return None if cached == self.commit else cached

    @property
    def remote_files(self) -> dict[str, RemoteFile]:
        """The files that have been asked for, and are there, by name."""
        return self._files

    def resolve_commit(self, filename: str) -> None:
        """Settle which commit is read: as the Hub says with this file.

        Where it cannot be asked, as the cache does.
        """
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
            # perhaps the cache knows another that will do
            if not self.cache.can_answer(cached, filename):
                raise NotCachedError(self._failure or error) from error
            self.commit = cached
            log.warning(
                "the Hub cannot be asked for %s (%s): the cache's commit %s is taken, which may "
                "not be the newest",
                self.title,
                describe_cause(error, self.describe_file(filename)),
                cached,
            )

    def request(self, filename: str, max_attempts: int | None = None) -> RemoteFile:
        """Ask the Hub for a file's etag, size and commit, once.

        And nothing more once it could not be asked.

        Raises:
            huggingface_hub.errors.RemoteEntryNotFoundError: the repository has no such file, which
                is noted.
            Exception: the Hub cannot be asked, or refuses.
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
        """Ask for a file's etag and size anew: what was said may have been spoiled on its way."""
        return self._open(file.filename, file.commit)

    def is_absent(self, filename: str) -> bool:
        """Whether the repository is known not to have the file."""
        if filename in self._absent:
            return True
        return self.commit is not None and self.cache.is_absent(self.commit, filename)

    def save_commit(self) -> None:
        """Note in the cache that the commit is here: what the branch is, when offline."""
        if self.commit is not None and not self.options.is_offline:
            self.cache.set_commit(self.branch, self.commit)

    def listing(self) -> list[str]:
        """Return the names of the files in the repository; none where the Hub does not say."""
        from huggingface_hub import HfApi

        if self.options.is_offline or self._failure is not None:
            return []
        api = HfApi(token=self.options.token)
        revision = self.commit or self.options.revision
        try:
            return sorted(
                call_with_timeout(
                    LISTING_SECONDS, lambda: api.list_repo_files(self.name, revision=revision)
                )
            )
        except Exception:  # It only adds to a message about another fault.
            return []

    def describe_file(self, filename: str) -> RequestedFile:
        """Return what messages say of a file."""
        return RequestedFile(filename, self.name, self.options)

    def _open(
        self, filename: str, revision: str | None, max_attempts: int | None = None
    ) -> RemoteFile:
        return RemoteFile(
            self.name, filename, revision, self.options.token, self._budget, max_attempts
        )

    def _pin(self, commit: str) -> None:
        """Take the commit that the Hub has named.

        The one that the cache knew stays its own until this one is here.
        """
        if self.commit is None:
            self.commit = commit
            if self.cache.commit_of(self.branch) is None:
                self.cache.set_commit(self.branch, commit)


def unreachable_reason(name: str, seconds: float = 10.0) -> str | None:
    """Return why the Hub does not answer when asked for a repository; None if it does.

    Any answer will do, a refusal too, but for a server's own errors (HTTP 500 and above).

    Args:
        name: the Hub id.
        seconds: how long to wait, whatever hangs: for name lookup, connection and reply together.
    """
    from huggingface_hub.errors import HfHubHTTPError

    def ask() -> RemoteFile:
        return RemoteFile(name, CONFIG, None, None, RetryBudget(), max_attempts=1)

    try:
        call_with_timeout(seconds, ask)
    except HfHubHTTPError as error:
        status = error.response.status_code
        return f"HTTP {status}" if status >= 500 else None
    except Exception as error:  # Whatever goes wrong means the same.
        return describe_cause(error, RequestedFile(CONFIG, name, HubOptions()))
    return None
