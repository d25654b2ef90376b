"""Runs harness mutants: a broken harness must misjudge a mutant or raise an error."""

from __future__ import annotations

import contextlib

from scripts.selftest import catalog
from scripts.selftest.examination import examine
from scripts.selftest.mutant import HarnessMutant
from siglip_port import SigLipVisionConfig
from siglip_port.parity.siglip import cases

RECIPES = {"rounding": "L7"}
"""Gate -> recipe of its weights; N1 for all others."""

MUTANTS = {mutant.name: mutant for mutant in (*catalog.MUTANTS, *catalog.EQUIVALENT)}
"""Mutants and equivalent variants by name."""


def examine_harness(mutant: HarnessMutant, config: SigLipVisionConfig) -> str:
    """Judge a harness mutant's probes with the broken harness.

    Returns:
        Misjudged probes, or the error; empty if the harness mutant is missed.
    """
    probes = [MUTANTS[name] for name in mutant.probes]
    recipes = {RECIPES.get(probe.gate, "N1") for probe in probes}
    try:
        with mutant.applied(), contextlib.ExitStack() as stack:
            models = []
            for recipe in sorted(recipes, reverse=True):
                gates = cases.ALL_GATES[:-1] if recipe == "N1" else ("rounding",)
                case = cases.random_case(config, recipe, gates=gates)
                models.append([stack.enter_context(case)])
            misjudged = [probe.name for probe in probes if not examine(probe, models).passed]
    except (ValueError, RuntimeError) as error:
        return str(error)
    return f"misjudged: {', '.join(misjudged)}" if misjudged else ""
