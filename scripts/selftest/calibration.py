"""Calibration: do the rounding bounds separate bugs from equivalent variants on a device?"""

from __future__ import annotations

import contextlib
import json
import math

from scripts.selftest import catalog
from scripts.selftest.examination import make_models, share_of_bound
from scripts.selftest.mutant import Mutant
from scripts.selftest.report import machine
from scripts.selftest.runner import SEEDS, Options, Progress
from siglip_port.atomic import write_text
from siglip_port.parity import bounds
from siglip_port.parity.siglip.cases import Case
from siglip_port.text import format_table

Share = tuple[float, str]
"""(error in units of its bound, where it occurs)."""


def calibrate(options: Options, progress: Progress) -> bool:
    """Measure equivalent variants and rounding bugs on this device against the rounding bounds.

    Returns:
        Whether every equivalent variant is within the bounds and every bug outside.
    """
    coarsest: dict[str, Share] = {}
    finest: dict[str, Share] = {}
    mutants = [*catalog.EQUIVALENT, *catalog.ROUNDING]
    for seed in SEEDS:
        with make_models(seed, options.device) as models:
            cases = [case for case, *_ in models if case.gates == ("rounding",)]
            for mutant in progress(iter(mutants), f"seed {seed}"):
                shares = measure_shares(mutant, cases)
                if not mutant.is_equivalent:
                    smallest = finest.get(mutant.name, (math.inf, ""))
                    finest[mutant.name] = min(smallest, max(shares.values()))
                    continue
                for gate, share in shares.items():
                    coarsest[gate] = max(coarsest.get(gate, (0.0, "")), share)
    weakest = min(finest.values())
    rows = [["", "error / bound", "mutant"]]
    for gate, (size, location) in coarsest.items():
        rows.append([f"largest of equivalent variants, {gate}", f"{size:.2f}", location])
    rows.append(["smallest of bugs", f"{weakest[0]:.2f}", weakest[1]])
    print("\n".join(format_table(rows)))
    if options.json is not None:
        content = {
            "machine": machine(),
            "equivalent_variants": {gate: size for gate, (size, _) in coarsest.items()},
            "smallest_bug": weakest[0],
            "smallest_bug_name": weakest[1].split(" at ")[0],
        }
        write_text(options.json, json.dumps(content, indent=1) + "\n")
    holds = max(coarsest.values())[0] < 1 < weakest[0]
    print(f"{'BOUNDS HOLD' if holds else 'BOUNDS DO NOT HOLD'}: {bounds.ROUNDING_ORIGIN}")
    return holds


def measure_shares(mutant: Mutant, cases: list[Case]) -> dict[str, Share]:
    """Return the largest error of a mutant in units of its bound, for each rounding gate.

    Args:
        mutant: Mutant of the port.
        cases: Checkpoints, with the gate `rounding` only.
    """
    shares: dict[str, Share] = {}
    with mutant.applied():
        for case in cases:
            port = mutant.load(case.source, **case.load_options)
            with contextlib.suppress(RuntimeError):  # autocast on bfloat16 weights
                for gate in case.check(port):
                    largest = max(gate.measurements, key=share_of_bound)
                    location = f"{mutant.name} at {largest.reference}, {case.weights}"
                    shares[gate.name] = (share_of_bound(largest), location)
    return shares
