"""Judge the harness: broken on purpose, it must misjudge mutants, or refuse to work."""

from __future__ import annotations

import contextlib

from scripts.selftest import catalog
from scripts.selftest.examination import examine
from scripts.selftest.mutant import HarnessMutant
from siglip_port import SigLipVisionConfig
from siglip_port.parity.siglip import cases

RECIPES = {"rounding": "L7"}
"""gate -> the weights on which it is tried; N1 for all others."""

KNOWN = {mutant.name: mutant for mutant in (*catalog.MUTANTS, *catalog.EQUIVALENT)}
"""What the broken harness is to judge, by name."""


def examine_harness(mutant: HarnessMutant, config: SigLipVisionConfig) -> str:
    """Have the broken harness judge the mutants that show it.

    Returns:
        What shows that it is broken; empty if nothing does.
    """
    judged = [KNOWN[name] for name in mutant.shown_by]
    recipes = {RECIPES.get(one.gate, "N1") for one in judged}
    try:
        with mutant.applied(), contextlib.ExitStack() as stack:
            checkpoints = []
            for recipe in sorted(recipes, reverse=True):
                gates = cases.ALL_GATES[:-1] if recipe == "N1" else ("rounding",)
                case = cases.random_case(config, recipe, gates=gates)
                checkpoints.append(stack.enter_context(case))
            wrong = [one.name for one in judged if not examine(one, checkpoints).passed]
    except (ValueError, RuntimeError) as error:
        return str(error)
    return f"misjudged: {', '.join(wrong)}" if wrong else ""
