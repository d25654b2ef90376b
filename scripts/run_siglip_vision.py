"""Runs the encoder on one random image: `uv run scripts/run_siglip_vision.py`.

Fresh random weights, no checkpoint.
"""

import torch

from siglip_port import SigLipVisionConfig, SigLipVisionModel


def main() -> None:
    """Prints the shape of what siglip-base-patch16-224 makes of one image.

    196 tokens of width 768.
    """
    model = SigLipVisionModel(SigLipVisionConfig()).eval()
    with torch.inference_mode():
        print("Output shape:", model(torch.randn(1, 3, 224, 224)).shape)


if __name__ == "__main__":
    main()
