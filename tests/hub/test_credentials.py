"""Tokens: which host receives them, and the errors of refused requests."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from siglip_port import CheckpointError, HubUnreachableError, SigLipVisionModel
from siglip_port.hub import HubOptions
from tests.helpers.errors import full_text
from tests.helpers.hub_cache import NAME, assert_same, read_files
from tests.helpers.hub_server import Fault, Hub, Repository

load = SigLipVisionModel.from_hf


@pytest.mark.usefixtures("small_chunks")
def test_token_is_sent_to_hub_only(
    hub: Hub, folder: Path, cache: Path, token: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    hub.repositories[NAME] = Repository(folder, gated=True, readers=(token,))
    hub.cdn_uses = 3  # so that new signed URLs are needed
    assert_same(load(NAME, cache_dir=cache, token=token), folder)
    assert {value for _, value in hub.authorizations} == {f"Bearer {token}"}
    assert {address for address, _ in hub.authorizations} == {hub.url}
    assert "Signature" in caplog.text  # the client's HTTP library logs every request
    assert token not in caplog.text
    assert not [path for path, content in read_files(cache).items() if token.encode() in content]


@pytest.mark.parametrize("invalid", ["hf_one\nhf_two", "", "hf_ü", "hf a", "Bearer hf_x"])
def test_invalid_token(invalid: str, hub: Hub, folder: Path, cache: Path) -> None:
    with pytest.raises(ValueError, match="token must be a Hub token: printable ASCII w") as error:
        load(NAME, cache_dir=cache, token=invalid)
    assert not invalid or invalid not in str(error.value)
    assert not hub.requests


@pytest.mark.parametrize("invalid", ["hf_ü", "hf a"])
def test_invalid_stored_token(
    invalid: str, hub: Hub, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", invalid)
    message = "the stored Hub token has invalid characters; set HF_TOKEN again"
    with pytest.raises(HubUnreachableError, match=message):
        load(NAME, cache_dir=cache)
    # huggingface_hub sends this request once per process
    assert set(hub.requests) <= {"GET api/agent-harnesses"}


def test_options_do_not_show_token(token: str) -> None:
    assert token not in repr(HubOptions(token=token))


def test_expired_token(hub: Hub, folder: Path, cache: Path, token: str) -> None:
    """The Hub refuses even a public repository to an unknown token."""
    text = "Invalid credentials in Authorization header"
    headers = {"X-Error-Message": text}
    hub.faults = [Fault("status", "HEAD *", times=None, status=401, headers=headers)]
    message = (
        rf"{NAME}@v1: the Hub rejected the token, .* \(HTTP 401: {text}\); log in .* token=False"
    )
    with pytest.raises(CheckpointError, match=message) as error:
        load(NAME, cache_dir=cache, token=token, revision="v1")
    assert token not in full_text(error.value)


GATED = (
    r"google/siglip-small: the repository is gated \(HTTP 40[13]: .*\); request access at http.*/"
    "google/siglip-small, then log in"
)
NO_REPOSITORY = (
    r"google/siglip-small: no such repository on the Hub \(HTTP 40[14]: .*\); check the spelling, "
    "or, if the repository is private, log in"
)


@pytest.mark.parametrize("has_token", [False, True])
@pytest.mark.parametrize(("kind", "message"), [("gated", GATED), ("private", NO_REPOSITORY)])
def test_closed_repository(
    kind: str, message: str, has_token: bool, hub: Hub, folder: Path, cache: Path, token: str
) -> None:
    setattr(hub.repositories[NAME], kind, True)
    with pytest.raises(CheckpointError, match=message) as error:
        load(NAME, cache_dir=cache, token=token if has_token else None)
    assert token not in str(error.value)


def test_disabled_repository(hub: Hub, folder: Path, cache: Path) -> None:
    hub.repositories[NAME] = Repository(folder, disabled=True)
    with pytest.raises(CheckpointError, match=rf"{NAME}: the Hub refused config.json \(HTTP 403"):
        load(NAME, cache_dir=cache)


def test_unknown_repository(hub: Hub, folder: Path, cache: Path) -> None:
    message = r"google/sigllp: no such repository on the Hub .*pass token="
    with pytest.raises(CheckpointError, match=message):
        load("google/sigllp", cache_dir=cache)


def test_refusal_without_reason(hub: Hub, folder: Path, cache: Path) -> None:
    hub.faults = [Fault("status", status=501, times=None)]
    message = r"google/siglip-small: the Hub refused config.json \(HTTP 501.*\); try again"
    with pytest.raises(CheckpointError, match=message):
        load(NAME, cache_dir=cache)
