"""Whatever goes wrong between the Hub and here: the same bits as ever, or one sentence.

And afterwards all is well.

Each test is one fault, met once or for ever, by the real client at a Hub of our own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from siglip_port import CheckpointError, SigLipVisionModel
from siglip_port.hub import chunked_download
from tests.helpers.hub_cache import NAME, assert_same
from tests.helpers.hub_server import Fault, Hub, Repository

load = SigLipVisionModel.from_hf

TOKEN = "hf_" + "Secret" * 5

STATUS = [400, 401, 403, 404, 408, 410, 416, 418, 429, 451, 500, 502, 503, 504]
FAULTS: list[dict[str, Any]] = [
    *({"kind": "status", "status": status} for status in STATUS),
    *({"kind": kind, "after": after} for kind in ("reset", "close") for after in (None, 0, 300)),
    *({"kind": "stall", "after": after} for after in (None, 0, 300)),
    {"kind": "slow", "after": 0, "seconds": 0.001},
    *({"kind": "short", "after": after} for after in (None, 0, 300)),
    *({"kind": "long", "after": after} for after in (None, 1000)),
    *(
        {"kind": kind, "after": after}
        for kind in ("other range", "other size")
        for after in (None, -1, 1000)
    ),
    *(
        {"kind": kind}
        for kind in ("html", "gzip", "no length", "other etag", "no etag", "no commit")
    ),
]

# Which refusals are final, even if they are met only once. The CDN's mostly mean that the signed
# address has expired.
FINAL = (400, 401, 403, 404, 410, 416, 418, 451)
# Refusals that nothing but their number tells from one of the others: for ever, one of a kind is
# enough.
ALIKE = (400, 410, 418, 451, 408, 502, 504)
REQUESTS: dict[
    str, tuple[dict[str, Any], Iterable[int]]
] = {  # how it is loaded, and which refusals are final
    "HEAD config.json": ({}, FINAL),
    "GET config.json": ({}, FINAL),
    "HEAD preprocessor_config.json": ({}, FINAL),
    "HEAD model.safetensors": ({}, FINAL),
    "CDN RANGE model.safetensors": ({}, (418, 451)),  # 416: the file is fetched whole
    "CDN GET model.safetensors": (
        {"vision_only": False},
        (416, 418, 451),
    ),  # by a CDN that has no ranges
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pieces; and nobody waits long, the client's own retries neither."""
    from huggingface_hub import constants

    monkeypatch.setattr(chunked_download, "CHUNK_BYTES", 16384)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))


def describe(fault: dict[str, Any]) -> str:
    return " ".join(str(value) for value in fault.values())


@pytest.mark.parametrize("times", [1, None], ids=["once", "always"])
@pytest.mark.parametrize("request_", REQUESTS)
def test_faults(
    request_: str,
    times: int | None,
    hub: Hub,
    folder: Path,
    tmp_path: Path,
) -> None:
    """The same bits or one sentence, and afterwards the same bits.

    Once only, all but refusals are survived.
    """
    hub.repositories[NAME].readers = (TOKEN,)
    hub.repositories[NAME].private = True
    how, final = REQUESTS[request_]
    hub.ranges = request_ != "CDN GET model.safetensors"
    expected = load(folder).state_dict()
    failed: dict[str, str] = {}
    tried = [fault for fault in FAULTS if times == 1 or fault.get("status") not in ALIKE]
    for number, fault in enumerate(tried):
        what = describe(fault)
        arguments = {"cache_dir": tmp_path / f"{number}", "token": TOKEN, **how}
        hub.faults = [Fault(request=request_, times=times, **fault)]
        try:
            models = [load(NAME, **arguments)]
        except CheckpointError as error:
            failed[what] = str(error)
            assert NAME in failed[what], what
            assert TOKEN not in failed[what], what
            assert "Signature" not in failed[what], what
            hub.faults = []
            models = [load(NAME, **arguments)]
        except BaseException as error:
            error.add_note(f"{request_}, {what}")
            raise
        models.append(load(NAME, **arguments, local_files_only=True))
        for model in models:
            assert all(
                torch.equal(tensor, model.state_dict()[name]) for name, tensor in expected.items()
            ), what
            assert TOKEN not in f"{model.provenance!r}"
    assert not [address for address, _ in hub.authorizations if address == hub.cdn_url]
    print(
        f"{request_}, {'always' if times is None else 'once'}: {len(tried) - len(failed)} of "
        f"{len(tried)} survived"
    )
    if times == 1:
        assert failed.keys() == {f"status {status}" for status in final}, failed


WRONG = [("GET config.json", times) for times in (1, 2, None)]
WRONG += [("CDN GET model.safetensors", times) for times in (1, 2, None)]
WRONG += [("CDN RANGE model.safetensors", 1)]  # the header; for ever, tensors would be changed too


@pytest.mark.parametrize(("request_", "times"), WRONG)
def test_wrong_bytes(
    request_: str,
    times: int | None,
    hub: Hub,
    folder: Path,
    tmp_path: Path,
) -> None:
    """Of what the Hub tells the hash, and of headers. (Of the tensors alone it tells none.

    See docs/reliability.md.)
    """
    for at in (0, 3, 8, 50, 200, 3000):
        if request_ == "GET config.json" and at >= (folder / "config.json").stat().st_size:
            continue
        hub.ranges = request_ != "CDN GET model.safetensors"
        hub.faults = [Fault("wrong bytes", request_, times=times, after=at)]
        how = {"cache_dir": tmp_path / f"{at}", **REQUESTS[request_][0]}
        refusal = None
        try:
            assert_same(load(NAME, **how), folder)
        except CheckpointError as error:
            refusal = str(error)
        assert (
            refusal is None
            or "hash should be" in refusal
            or "not a whole" in refusal
            or "not hold" in refusal
        )
        assert (
            times != 1 or refusal is None or "RANGE" in request_
        )  # a whole file is fetched once more
        hub.faults = []
        assert_same(load(NAME, **how), folder)


# --- the rest of what a Hub can say ---------------------------------------------------------------


def test_credentials_are_the_hubs_alone(
    hub: Hub,
    folder: Path,
    cache: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    hub.repositories[NAME].gated, hub.repositories[NAME].readers = True, (TOKEN,)
    hub.cdn_uses = 3  # so that it is asked again and again for new addresses
    assert_same(load(NAME, cache_dir=cache, token=TOKEN), folder)
    assert {value for _, value in hub.authorizations} == {f"Bearer {TOKEN}"}
    assert {address for address, _ in hub.authorizations} == {hub.url}
    assert "Signature" in caplog.text  # the client's HTTP library tells all that it does
    assert TOKEN not in caplog.text
    assert not [
        path for path in cache.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()
    ]


@pytest.mark.parametrize("token", ["hf_one\nhf_two", "", "hf_ü", "hf a", "Bearer hf_x"])
def test_what_cannot_be_a_token_is_refused_unshown(
    token: str, hub: Hub, folder: Path, cache: Path
) -> None:
    with pytest.raises(ValueError, match="token must be the Hub token itself") as refused:
        load(NAME, cache_dir=cache, token=token)
    assert not token or token not in str(refused.value)
    assert not hub.requests


@pytest.mark.parametrize("uses", [1, 2, 5])
def test_addresses_that_expire(uses: int, hub: Hub, folder: Path, cache: Path) -> None:
    hub.cdn_uses = uses
    assert_same(load(NAME, cache_dir=cache), folder)


def test_an_address_that_has_always_expired(hub: Hub, folder: Path, cache: Path) -> None:
    hub.cdn_seconds = -1
    with pytest.raises(
        CheckpointError,
        match=r"the address that the Hub gave for the file is refused \(HTTP 403 of localhost\)",
    ):
        load(NAME, cache_dir=cache)


@pytest.mark.parametrize(
    ("wait", "message"),
    [("0", None), ("3600", "answers HTTP 429, and asks to wait 3600 seconds"), ("soon", None)],
)
def test_a_hub_that_asks_to_wait(
    wait: str, message: str | None, hub: Hub, folder: Path, cache: Path
) -> None:
    hub.faults = [Fault("status", "CDN RANGE *", status=429, headers={"Retry-After": wait})]
    if message is None:
        assert_same(load(NAME, cache_dir=cache), folder)
    else:
        with pytest.raises(CheckpointError, match=message):
            load(NAME, cache_dir=cache)


@pytest.mark.parametrize(
    ("how", "token", "message"),
    [
        (
            {"gated": True},
            None,
            r"is gated: ask for access at http.*/google/siglip-small, then log in",
        ),
        ({"gated": True}, TOKEN, r"is gated: ask for access at http"),
        (
            {"private": True},
            None,
            r"the Hub has no repository 'google/siglip-small'; check the spelling, or, if it is p",
        ),
        ({"private": True}, TOKEN, r"the Hub has no repository"),
        ({"disabled": True}, None, r"config.json of 'google/siglip-small'"),
    ],
)
def test_doors_that_stay_shut(
    how: dict[str, bool],
    token: str | None,
    message: str,
    hub: Hub,
    folder: Path,
    cache: Path,
) -> None:
    hub.repositories[NAME] = Repository(folder, **how)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=message) as refused:
        load(NAME, cache_dir=cache, token=token)
    assert TOKEN not in str(refused.value)


def test_a_shard_that_the_index_names_but_the_repository_lacks(
    hub: Hub, folder: Path, cache: Path
) -> None:
    from tests.helpers.checkpoints import shard

    shard(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        CheckpointError,
        match=r"has no file model-00002-of-00003.safetensors, so these cannot be read",
    ):
        load(NAME, cache_dir=cache)


def test_a_configuration_too_large_to_be_one_is_not_fetched(
    hub: Hub, folder: Path, cache: Path
) -> None:
    with (folder / "config.json").open("a") as file:
        file.truncate(10**11)
    with pytest.raises(
        CheckpointError,
        match=r"has 100000000000 bytes, more than the 25000000 that such a file may",
    ):
        load(NAME, cache_dir=cache)
    assert not hub.requests["GET config.json"]


def test_a_file_cut_short_on_the_hub_is_noticed_by_its_header(
    hub: Hub, folder: Path, cache: Path
) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        CheckpointError,
        match=r"is not a whole safetensors file \(its tensors take \d+ bytes, the file",
    ):
        load(NAME, cache_dir=cache)


def test_no_network_is_told_soon(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    from tests.helpers.network import silent_port

    url = f"http://127.0.0.1:{silent_port()}"
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    begun = time.monotonic()
    with pytest.raises(
        CheckpointError, match=r"config.json of .* could not be fetched: no connection to 127.0.0.1"
    ):
        load(NAME, cache_dir=cache)
    assert time.monotonic() - begun < 5


def test_weights_of_a_model_are_its_own(hub: Hub, folder: Path, cache: Path) -> None:
    """Changing a model's weights changes nothing in the cache."""
    model = load(NAME, cache_dir=cache)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same(load(NAME, cache_dir=cache, local_files_only=True), folder)
