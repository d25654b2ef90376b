"""The engine that `optimize` chose, with the measurements behind the choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Choice:
    """Result of `optimize`.

    The attributes are also the keys of the JSON file that caches the choice.

    Attributes:
        engine: Name in `siglip_port.optimize.ENGINES`.
        conditions: Dtype, batch size, threads and machine of the measurements.
        milliseconds: Time per image of each engine that was timed.
        difference: Relative difference of the outputs from those of `eager` in the same dtype, as
            in `siglip_port.optimize.comparison.relative_difference`; 0.0 for `eager`.
        bound: Largest accepted `difference`.
        skipped: Engines that were skipped, with the reason.
    """

    engine: str
    conditions: str
    milliseconds: Mapping[str, float] = field(default_factory=dict)
    difference: float = 0.0
    bound: float = 0.0
    skipped: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Format the choice, one line for each fact."""
        lines = [
            f"{self.engine} ({self.conditions}): relative difference from eager "
            f"{self.difference:.1e}, bound {self.bound:.0e}"
        ]
        if self.milliseconds:
            fastest_first = sorted(self.milliseconds.items(), key=lambda item: item[1])
            times = ", ".join(f"{engine} {time:.1f}" for engine, time in fastest_first)
            lines.append(f"ms per image: {times}")
        for engine, reason in self.skipped.items():
            lines.append(f"{engine} skipped: {reason}")
        return "\n".join(lines)
