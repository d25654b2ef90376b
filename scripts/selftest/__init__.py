"""The self-test: the gates must detect every mutant and accept every equivalent variant."""

from scripts.selftest.calibration import calibrate
from scripts.selftest.runner import run

__all__ = ["calibrate", "run"]
