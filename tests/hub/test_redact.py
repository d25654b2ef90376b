"""Secrets are removed from messages."""

from __future__ import annotations

from siglip_port.hub.redact import redact


def test_redact() -> None:
    token = "hf_" + "aB3" * 10
    text = (
        "GET https://user:word@cdn.hf.co/a/b?X-Amz-Signature=1&Expires=2 failed\n "
        f"for Bearer hf_x, {token} in hf_xet"
    )
    assert redact(text) == "GET https://cdn.hf.co/a/b failed for Bearer ... ... in hf_xet"


def test_redact_long_text() -> None:
    assert len(redact("x " * 1000)) < 500
