"""The command `siglip-port verify`, for a clone: `uv run compare_origin.py`.

Compares the port with transformers, before and after the pooling head.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    try:
        from siglip_port.cli import verify
    except ImportError as error:
        hint = "run: uv run compare_origin.py"
        print(f"could not compare: {type(error).__name__}: {error}; {hint}", file=sys.stderr)
        return 2
    return verify.main(argv, prog="compare_origin.py")


if __name__ == "__main__":
    sys.exit(main())
