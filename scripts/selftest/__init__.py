"""The self-test: proof that the gates detect what they must, and nothing else."""

from scripts.selftest.calibration import calibrate
from scripts.selftest.runner import run

__all__ = ["calibrate", "run"]
