"""Bugs of the harness itself."""

from __future__ import annotations

from scripts.selftest.mutant import HarnessMutant

HARNESS: list[HarnessMutant] = []
