"""What `optimize` chose for a model, and the numbers that it was chosen by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Choice:
    """The engine that `optimize` chose, and why.

    The attributes are also the keys of the JSON file that keeps the choice for later processes.

    Attributes:
        engine: a name of `siglip_port.optimize.ENGINES`.
        conditions: dtype, batch size, threads and machine that the times were measured with.
        milliseconds: time per image of each engine that was timed.
        difference: of the results from those of the model itself in the same dtype, in the terms of
            `siglip_port.optimize.comparison.TOLERANCES`; 0.0 for the model itself.
        bound: the largest `difference` that would have been accepted.
        left_out: engines that could not be used or were refused, each with the reason.
    """

    engine: str
    conditions: str
    milliseconds: Mapping[str, float] = field(default_factory=dict)
    difference: float = 0.0
    bound: float = 0.0
    left_out: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Describe the choice in a few sentences."""
        text = self.conditions
        if self.milliseconds:
            fastest_first = sorted(self.milliseconds.items(), key=lambda item: item[1])
            times = ", ".join(f"{engine} {time:.1f}" for engine, time in fastest_first)
            text += f"; milliseconds an image: {times}"
        lines = [
            f"{self.engine} ({text}); results differ from the encoder's own by "
            f"{self.difference:.1e}, bound {self.bound:.0e}"
        ]
        for engine, reason in self.left_out.items():
            lines.append(f"{engine} is left out: {reason}")
        return "\n".join(lines)
