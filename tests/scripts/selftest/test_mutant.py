from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from scripts.selftest.mutant import (
    Mutant,
    Patch,
    combine,
    is_expected_location,
    replace,
    replace_item,
    wrap,
)


@pytest.fixture
def owner() -> Iterator[SimpleNamespace]:
    owner = SimpleNamespace(bound=1, double=lambda x: 2 * x, table={"a": 1, "b": 2})
    before = dict(vars(owner))
    items = dict(owner.table)
    yield owner
    assert vars(owner) == before
    assert list(owner.table.items()) == list(items.items())


@contextlib.contextmanager
def applied(patch: Patch) -> Iterator[None]:
    with Mutant("name", "description", patch=patch).applied():
        yield


def test_replace(owner: SimpleNamespace) -> None:
    with applied(replace(owner, "bound", 7)):
        assert owner.bound == 7


def test_replace_inherited_method() -> None:
    class Base:
        def name(self) -> str:
            return "base"

    class Derived(Base):
        pass

    with applied(replace(Derived, "name", lambda self: "replaced")):
        assert Derived().name() == "replaced"
        assert Base().name() == "base"
    assert "name" not in vars(Derived)


def test_wrap(owner: SimpleNamespace) -> None:
    with applied(wrap(owner, "double", lambda double, x: double(x) + 1)):
        assert owner.double(3) == 7


def test_replace_item(owner: SimpleNamespace) -> None:
    with applied(replace_item(owner.table, "a", 7)):
        assert owner.table == {"a": 7, "b": 2}


def test_combine(owner: SimpleNamespace) -> None:
    twice = wrap(owner, "double", lambda double, x: double(double(x)))
    with applied(combine(replace(owner, "bound", 7), twice, twice)):
        assert (owner.bound, owner.double(1)) == (7, 16)


def test_patch_is_undone_after_error(owner: SimpleNamespace) -> None:
    with pytest.raises(ZeroDivisionError), applied(replace(owner, "bound", 0)):
        print(1 // owner.bound)
    broken = combine(replace(owner, "bound", 0), replace(owner, "missing", 0))
    with pytest.raises(AttributeError), applied(broken):
        pass


def test_patch_of_missing_name_raises(owner: SimpleNamespace) -> None:
    """An outdated mutant raises an error instead of changing nothing."""
    for patch in (
        replace(owner, "missing", 0),
        wrap(owner, "missing", lambda original: original),
    ):
        with pytest.raises(AttributeError, match="missing"), applied(patch):
            pass
    patch = replace_item(owner.table, "missing", 0)
    with (
        pytest.raises(KeyError, match="the table has no entry 'missing'; update the catalog"),
        applied(patch),
    ):
        pass


def test_expected_locations() -> None:
    assert is_expected_location("encoder.layers.7.layer_norm1", "ln1 q")
    assert is_expected_location("encoder.layers.5.mlp.fc1.bias", "5.fc1")
    assert not is_expected_location("encoder.layers.4.mlp.fc1.bias", "5.fc1")
    assert not is_expected_location("encoder.layers.5.layer_norm1:input", "ln1")
    assert is_expected_location("encoder.layers.10", "out")
    assert not is_expected_location("encoder.layers.10.mlp", "out")
    assert is_expected_location("head.attention.in_proj_weight", "head-k")
    assert is_expected_location("layer_norm_eps", "layer_norm_eps")
    assert not is_expected_location("tokens", "pooled")
