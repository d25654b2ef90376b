"""The gate `pixels` on small sizes, of fixed-size and of NaFlex models."""

from __future__ import annotations

from siglip_port.checkpoint import default_preprocessor_config
from siglip_port.config import SigLipVisionConfig
from siglip_port.image_processing import ImageProcessor
from siglip_port.parity.results import GateResult
from siglip_port.parity.siglip.pixels import check_pixels
from siglip_port.parity.siglip.reference_process import (
    IN_THIS_PROCESS,
    References,
    load_processors,
)
from siglip_port.parity.siglip.sample_images import synthetic_image


def check_small_pixels(
    naflex: bool, *, max_hints: int = 6, references: References = IN_THIS_PROCESS
) -> GateResult:
    """Compare image processors with default settings, whatever those of the checkpoint are.

    Args:
        naflex: Whether to compare those of NaFlex models.
        max_hints: Maximum number of images with a hint.
        references: Place of the reference's processors.
    """
    config = SigLipVisionConfig(image_size=64, naflex=naflex)
    processors = load_processors(references, config)
    settings = default_preprocessor_config(config)
    port = {backend: ImageProcessor.from_config(settings, backend) for backend in processors}
    return check_pixels(port, processors, synthetic_image(), max_hints=max_hints)
