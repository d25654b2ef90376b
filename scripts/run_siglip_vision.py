"""Run a randomly initialized model on one random image: `uv run scripts/run_siglip_vision.py`."""

import torch

from siglip_port import SigLipVisionConfig, SigLipVisionModel


def main() -> None:
    """Print the shape of siglip-base-patch16-224's tokens: [1, 196, 768]."""
    model = SigLipVisionModel(SigLipVisionConfig()).eval()
    with torch.inference_mode():
        print("Output shape:", model(torch.randn(1, 3, 224, 224)).shape)


if __name__ == "__main__":
    main()
