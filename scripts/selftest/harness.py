"""Judge the harness: broken on purpose, it must misjudge mutants, or refuse to work."""

from __future__ import annotations

import contextlib

from scripts.selftest import catalogue
from scripts.selftest.examination import examine
from scripts.selftest.mutant import HarnessMutant
from siglip_port import SigLipVisionConfig
from siglip_port.parity.siglip import cases

RECIPES = {"rounding": "L7"}
"""gate -> the weights on which it is tried; N1 for all others."""


def examine_harness(mutant: HarnessMutant, config: SigLipVisionConfig) -> str:
    """Have the broken harness judge the mutants that show it.

    Returns:
        What shows that it is broken; empty if nothing does.
    """
    known = {known.name: known for known in (*catalogue.MUTANTS, *catalogue.EQUIVALENT)}
    judged = [known[name] for name in mutant.shown_by]
    recipes = dict.fromkeys(RECIPES.get(one.gate, "N1") for one in judged)
    try:
        with mutant.applied(), contextlib.ExitStack() as stack:
            made = []
            for recipe in recipes:
                gates = cases.ALL_GATES[:-1] if recipe == "N1" else ("rounding",)
                made.append(stack.enter_context(cases.random_case(config, recipe, gates=gates)))
            wrong = [one.name for one in judged if not examine(one, made).passed]
    except (ValueError, RuntimeError) as error:
        return str(error)
    return f"misjudged: {', '.join(wrong)}" if wrong else ""
