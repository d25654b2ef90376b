"""Golden folders: inputs and results of a reference as files, for ports in any language.

`folder` writes and reads them, `judge` compares a port's results with them. docs/golden.md
describes the format.
"""

from siglip_port.parity.golden.folder import (
    PORT_FILE,
    Expected,
    GoldenCase,
    GoldenError,
    GoldenFolder,
    read_folder,
    write_folder,
)
from siglip_port.parity.golden.judge import judge_folder

__all__ = [
    "PORT_FILE",
    "Expected",
    "GoldenCase",
    "GoldenError",
    "GoldenFolder",
    "judge_folder",
    "read_folder",
    "write_folder",
]
