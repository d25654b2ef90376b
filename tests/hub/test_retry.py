"""Waits between attempts, and the retry budget of a load."""

from __future__ import annotations

from pathlib import Path

import pytest

from siglip_port import HubUnreachableError, SigLipVisionModel
from siglip_port.hub import retry
from siglip_port.hub.network_errors import retry_after
from siglip_port.hub.retry import RetryBudget
from tests.helpers import hub_server
from tests.helpers.hub_cache import NAME, assert_same
from tests.helpers.hub_server import Fault, Hub

load = SigLipVisionModel.from_hf


def test_budget_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("siglip_port.hub.retry.time.monotonic", lambda: now[0])
    budget = RetryBudget()
    assert budget.spend(1000, 200)
    assert budget.spend(1000, 200)  # another thread that waits at the same time
    now[0] += 200
    assert budget.spend(1200, 90)
    assert not budget.spend(1200, 120)
    now[0] += 900
    budget.receive(retry.MIN_PROGRESS_BYTES)  # progress resets the budget
    assert budget.spend(1200, 290)
    assert not budget.spend(2100, 301)


FIXED_WINDOW = '"fixed window";"resolvers";q=3000;w=300'


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"RateLimit": '"resolvers";r=0;t=25', "RateLimit-Policy": FIXED_WINDOW}, 26),
        ({"RateLimit": '"api";r=7;t=25', "Retry-After": "3"}, 3),
        ({"Retry-After": " 120 "}, 120),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"Retry-After": "soon"}, None),
        ({}, None),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers) == seconds


@pytest.mark.usefixtures("short_waits")
def test_rate_limit(hub: Hub, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    spend = RetryBudget.spend

    def record(budget: RetryBudget, start: float, wait: float = 0.0) -> bool:
        waits.append(wait)
        return spend(budget, start, wait)

    monkeypatch.setattr(RetryBudget, "spend", record)
    limit = {"RateLimit": '"resolvers";r=0;t=0'}
    hub.faults = [Fault("status", "HEAD *config.json", status=429, headers=limit, times=2)]
    assert_same(load(NAME, cache_dir=cache), folder)
    assert waits == [1, 1]


def test_rate_limit_beyond_budget(hub: Hub, folder: Path, cache: Path) -> None:
    limit = {"RateLimit": '"resolvers";r=0;t=300'}
    hub.faults = [Fault("status", status=429, headers=limit, times=None)]
    message = r"HTTP 429 and asks to wait 301 seconds \(limit: 300 seconds without progress\)"
    with pytest.raises(HubUnreachableError, match=message):
        load(NAME, cache_dir=cache)


def test_slow_connection(
    hub: Hub, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "PROGRESS_WINDOW_SECONDS", 0.2)
    monkeypatch.setattr(hub_server, "SLOW_CHUNK", 1)
    hub.faults = [Fault("slow", "CDN *", times=None, after=0, seconds=0.05)]
    message = r"only 0\.0 kB arrived in 0 seconds"
    with pytest.raises(HubUnreachableError, match=message):
        load(NAME, cache_dir=cache)
