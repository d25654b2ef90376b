"""The catalog: bugs from ports of this and similar models, and equivalent variants.

A mutant has a one-line description, a public source (owner/repository#issue) and a small function
that breaks the port. Its `locations` are keys of `scripts.selftest.mutant.LOCATIONS`.
"""

from __future__ import annotations

from scripts.selftest.catalog.activation import ACTIVATION
from scripts.selftest.catalog.attention import ATTENTION
from scripts.selftest.catalog.biases import BIASES
from scripts.selftest.catalog.calls import CALLS
from scripts.selftest.catalog.corners import CORNERS
from scripts.selftest.catalog.entrances import ENTRANCES
from scripts.selftest.catalog.equivalent import EQUIVALENT
from scripts.selftest.catalog.gradients import GRADIENTS
from scripts.selftest.catalog.harness import HARNESS
from scripts.selftest.catalog.images import IMAGES
from scripts.selftest.catalog.loading import LOADING
from scripts.selftest.catalog.naflex import NAFLEX
from scripts.selftest.catalog.normalization import NORMALIZATION
from scripts.selftest.catalog.patches import PATCHES
from scripts.selftest.catalog.pixels import PIXELS
from scripts.selftest.catalog.pooling import POOLING
from scripts.selftest.catalog.projections import PROJECTIONS
from scripts.selftest.catalog.regimes import REGIMES
from scripts.selftest.catalog.resized import RESIZED
from scripts.selftest.catalog.rounding import ROUNDING
from scripts.selftest.catalog.stack import STACK
from scripts.selftest.catalog.traces import TRACES
from scripts.selftest.catalog.weights import WEIGHTS
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
    *CALLS,
    *GRADIENTS,
    *ROUNDING,
    *PIXELS,
    *LOADING,
    *NAFLEX,
    *RESIZED,
    *REGIMES,
    *IMAGES,
    *ENTRANCES,
    *TRACES,
    *CORNERS,
]
"""All mutants of the port; those of the harness are in `harness`."""
