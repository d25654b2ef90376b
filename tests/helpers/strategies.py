"""Hypothesis strategies."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy


def json_values(texts: SearchStrategy[str]) -> SearchStrategy[Any]:
    """Draw any JSON value with up to 6 leaves and strings of this strategy."""
    return st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | texts,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
        ),
        max_leaves=6,
    )


JSON = json_values(st.text(max_size=8))
