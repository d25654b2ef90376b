"""Draws the figure of the README: `uv run --group figures scripts/figures.py`. Takes two minutes on 2 cores.

Each mistake of tests/parity/faults.py is made in the port, on the full-size siglip-base-patch16-224 tower with random
weights, and measured as `compare_origin.py` measures.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from compare_origin import PHOTOGRAPH, with_noise  # noqa: E402
from siglip_port import SigLipVisionConfig, SigLipVisionModel  # noqa: E402
from siglip_port.parity import references  # noqa: E402
from siglip_port.parity.comparison import FLOAT64_BOUND, compare  # noqa: E402
from tests.parity.faults import FAULTS, Fault  # noqa: E402

FIGURE = ROOT / "docs" / "images" / "faults.svg"
USUAL_CHECK = 0.9999


def nothing(model: SigLipVisionModel) -> None:
    """The port as it is."""


def measure(checkpoint: Path, fault: Fault) -> tuple[float, float]:
    """Returns the larger float64 error, and the smallest cosine, of tokens and pooled vectors."""
    pixels = references.preprocess(Image.open(PHOTOGRAPH), 224)
    port = SigLipVisionModel.from_hf(checkpoint)
    reference = references.load(checkpoint, pooling_head=True, dtype=torch.float32, attention="sdpa")
    with torch.no_grad():
        fault(port)
    found = compare(port, reference, with_noise(pixels)).measurements
    return max(m.error for m in found if m.dtype == "float64"), min(m.cosine_min for m in found)


def draw(rows: list[tuple[str, float, float]]) -> None:
    """Draws the errors on a logarithmic axis, with the bound, and in colour what the usual check makes of them."""
    plt.rcParams.update({"font.size": 9, "svg.hashsalt": "siglip_port"})
    figure, axes = plt.subplots(figsize=(8, 5.4), layout="constrained")
    axes.axvspan(1e-17, FLOAT64_BOUND, color="#e6f2e8", zorder=0)
    axes.axvline(FLOAT64_BOUND, color="#2e7d32", lw=1.2)
    axes.text(FLOAT64_BOUND / 1.6, -2.2, "equal", color="#2e7d32", ha="right", weight="bold")
    axes.text(FLOAT64_BOUND * 1.6, -2.2, "different", color="#b3261e", ha="left", weight="bold")
    for y, (_, error, cosine) in enumerate(rows):
        passes = cosine >= USUAL_CHECK
        colour = "#2e7d32" if error <= FLOAT64_BOUND else "#e08a00" if passes else "#b3261e"
        axes.plot([1e-17, error], [y, y], color=colour, lw=1, alpha=0.35)
        axes.plot(error, y, "o", color=colour, ms=6)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.set(xscale="log", xlim=(1e-17, 30), ylim=(len(rows) - 0.4, -3))
    axes.set_xlabel("relative error against the reference in float64; base tower, random weights")
    for colour, text in (("#e08a00", f"passes the usual check, cosine ≥ {USUAL_CHECK}"), ("#b3261e", "fails it")):
        axes.plot([], [], "o", color=colour, label=text)
    axes.legend(loc="upper right", frameon=False, bbox_to_anchor=(1, 0.95))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, metadata={"Date": None})


def main() -> None:
    """Measures, prints and draws."""
    with tempfile.TemporaryDirectory() as folder:
        references.write_random_checkpoint(Path(folder), SigLipVisionConfig(pooling_head=True))
        rows = [("the port as it is", *measure(Path(folder), nothing))]
        for fault in FAULTS:
            assert fault.__doc__ is not None
            rows.append((fault.__doc__.rstrip("."), *measure(Path(folder), fault)))
    rows.sort(key=lambda row: row[1])
    for name, error, cosine in rows:
        print(f"{name:40} error {error:.1e}  cosine {cosine:.7f}{'  passes' if cosine >= USUAL_CHECK else ''}")
    draw(rows)


if __name__ == "__main__":
    main()
