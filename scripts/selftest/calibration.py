"""Calibration: whether the bounds on rounding tell bugs from equivalent variants on a device."""

from __future__ import annotations

import contextlib
import math

from scripts.selftest import catalog
from scripts.selftest.examination import make_cases, share_of_bound
from scripts.selftest.mutant import Mutant
from scripts.selftest.runner import SEEDS, Options, Progress
from siglip_port.parity import bounds
from siglip_port.parity.siglip.cases import Case
from siglip_port.text import format_table

Share = tuple[float, str]
"""How much of its bound an error takes up, and where."""


def calibrate(options: Options, progress: Progress) -> bool:
    """Measure on this device what the bounds on rounding rest on, and print it.

    Returns:
        Whether the coarsest equivalent variant stays below them, and the finest bug above.
    """
    coarsest: dict[str, Share] = {}
    finest: dict[str, Share] = {}
    mutants = [*catalog.EQUIVALENT, *catalog.ROUNDING]
    for seed in SEEDS if options.full else SEEDS[:2]:
        with make_cases(seed, options.device) as (_, *cases):
            for mutant in progress(iter(mutants), f"seed {seed}"):
                shares = measure_shares(mutant, cases)
                if not mutant.is_equivalent:
                    before = finest.get(mutant.name, (math.inf, ""))
                    finest[mutant.name] = min(before, max(shares.values()))
                    continue
                for gate, share in shares.items():
                    coarsest[gate] = max(coarsest.get(gate, (0.0, "")), share)
    weakest = min(finest.values())
    rows = [["", "share of the bound", "of"]]
    for gate, (size, where) in coarsest.items():
        rows.append([f"coarsest equivalent variant, {gate}", f"{size:.2f}", where])
    rows.append(["finest bug", f"{weakest[0]:.2f}", weakest[1]])
    print("\n".join(format_table(rows)))
    holds = max(coarsest.values())[0] < 1 < weakest[0]
    print(f"{'HOLDS' if holds else 'DOES NOT HOLD'}: {bounds.ROUNDING_ORIGIN}")
    return holds


def measure_shares(mutant: Mutant, cases: list[Case]) -> dict[str, Share]:
    """Return the largest share of its bound that a mutant takes up, in each gate on rounding.

    Args:
        mutant: of the port.
        cases: with no other gates.
    """
    shares: dict[str, Share] = {}
    with mutant.applied():
        for case in cases:
            port = mutant.load(case.source, device=case.inputs.device)
            with contextlib.suppress(RuntimeError):  # an autocast that meets bfloat16 weights
                for gate in case.check(port):
                    largest = max(gate.measurements, key=share_of_bound)
                    where = f"{mutant.name} at {largest.reference}, {case.weights}"
                    shares[gate.name] = (share_of_bound(largest), where)
    return shares
