"""The catalogue: bugs that ports of this and of like models have had, and variants that are none.

A mutant is one line of what happened, one of where (in public: owner/repository#issue), and a small
function that breaks the port. `locations` says in the words of `scripts.selftest.mutant.LOCATIONS`
what the gates may name for it.
"""

from __future__ import annotations

from scripts.selftest.catalogue.activation import ACTIVATION
from scripts.selftest.catalogue.attention import ATTENTION
from scripts.selftest.catalogue.biases import BIASES
from scripts.selftest.catalogue.equivalent import EQUIVALENT
from scripts.selftest.catalogue.harness import HARNESS
from scripts.selftest.catalogue.images import IMAGES
from scripts.selftest.catalogue.loading import LOADING
from scripts.selftest.catalogue.naflex import NAFLEX
from scripts.selftest.catalogue.normalization import NORMALIZATION
from scripts.selftest.catalogue.patches import PATCHES
from scripts.selftest.catalogue.pixels import PIXELS
from scripts.selftest.catalogue.pooling import POOLING
from scripts.selftest.catalogue.projections import PROJECTIONS
from scripts.selftest.catalogue.resized import RESIZED
from scripts.selftest.catalogue.rounding import ROUNDING
from scripts.selftest.catalogue.stack import STACK
from scripts.selftest.catalogue.weights import WEIGHTS
from scripts.selftest.mutant import Mutant

__all__ = ["EQUIVALENT", "HARNESS", "MUTANTS", "ROUNDING"]

MUTANTS: list[Mutant] = [
    *ACTIVATION,
    *NORMALIZATION,
    *ATTENTION,
    *PROJECTIONS,
    *BIASES,
    *WEIGHTS,
    *PATCHES,
    *STACK,
    *POOLING,
    *ROUNDING,
    *PIXELS,
    *LOADING,
    *NAFLEX,
    *RESIZED,
    *IMAGES,
]
"""All bugs of the port; those of the harness are in `harness`."""
