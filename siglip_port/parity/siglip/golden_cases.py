"""Cases of a golden folder: small models with stress weights, and the checkpoint itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from siglip_port.config import SigLipVisionConfig
from siglip_port.parity.golden.folder import Expected, GoldenCase, named_inputs
from siglip_port.parity.sides import dtype_name
from siglip_port.parity.siglip import reference
from siglip_port.parity.siglip.cases import LOW_DTYPES, ODD, Case, compute_as, random_case
from siglip_port.parity.siglip.reference_process import References

SMALL_CASES = (
    ("small-n1", "N1", LOW_DTYPES),
    ("small-s1", "S1", LOW_DTYPES),
    ("small-l7", "L7", (torch.float32,)),
)
"""Name, recipe and dtypes."""


def golden_cases(
    checkpoint: Case, config: SigLipVisionConfig, scratch: Path, references: References
) -> Iterator[GoldenCase]:
    """Yield the cases of a checkpoint, each while its files exist.

    Args:
        checkpoint: The checkpoint, of which only outputs are recorded.
        config: Its configuration, whose activation, eps and head the small models have.
        scratch: Folder for temporary files.
        references: Place of the references.
    """
    odd = compute_as(ODD, config)
    for name, recipe, dtypes in SMALL_CASES:
        with random_case(
            odd,
            recipe,
            dtypes=dtypes,
            attentions=checkpoint.attentions,
            references=references,
        ) as case:
            yield record_case(name, case, Path(case.source))
    folder = scratch / "golden-checkpoint"
    checkpoint.reference.compute(reference.save_checkpoint, folder, checkpoint.dtypes[0])
    recorded = record_case("checkpoint", checkpoint, folder)
    outputs = {
        dtype: expected.only(expected.outputs) for dtype, expected in recorded.expected.items()
    }
    yield GoldenCase(recorded.name, recorded.weights, recorded.checkpoint, recorded.inputs, outputs)


def record_case(name: str, case: Case, checkpoint: Path) -> GoldenCase:
    """Record the results of the reference for a case, in all its dtypes."""
    expected = {}
    for dtype in case.dtypes:
        expected[dtype_name(dtype)] = Expected.of(case.reference_run(dtype))
    return GoldenCase(name, case.weights, checkpoint, named_inputs(case.inputs), expected)
