"""Meaning and bound of each gate. Gates run regardless of earlier results."""

from __future__ import annotations

from dataclasses import dataclass

from siglip_port.parity.bounds import (
    FLOAT64_BOUND,
    FLOAT64_ORIGIN,
    GRADIENT_BOUND,
    GRADIENT_UPCAST_BOUND,
    ROUNDING_ORIGIN,
)


@dataclass(frozen=True)
class Meaning:
    """Description of a gate.

    Attributes:
        question: Question that the gate answers.
        text: Statement that holds if the gate passes.
        bound: Largest difference that passes.
    """

    question: str
    text: str
    bound: str


MEANING = {
    "pixels": Meaning(
        question="Does preprocessing give the same pixel values?",
        text=(
            "images of all sizes and modes give the same pixel_values as the reference's "
            "processors, with Pillow and, if installed, torchvision; all other gates feed the same "
            "pixels to both models"
        ),
        bound="bitwise equality",
    ),
    "environment": Meaning(
        question="Are both models in eval mode, in one dtype, without autocast or TF32?",
        text=(
            "both models are in eval mode and in one dtype, without autocast or TF32; no two "
            "modules of the reference are one in the port; a run of the port leaves torch's "
            "switches as they are"
        ),
        bound="equality",
    ),
    "config": Meaning(
        question="Is the architecture the same, field by field?",
        text="the architecture is the same: activation, eps, heads, sizes and pooling head",
        bound="equality",
    ),
    "weights": Meaning(
        question="Is every tensor loaded correctly?",
        text="both models have the same tensors, and none share memory in the port only",
        bound="bitwise equality",
    ),
    "sensitivity": Meaning(
        question=(
            "Does every image, pixel and parameter affect the outputs, and no image another one?"
        ),
        text=(
            "every image, pixel and parameter that affects the reference's outputs affects the "
            "port's; outputs are finite, not constant, the same in two runs up to the order of "
            "summation, and the same in a batch as for a single image"
        ),
        bound="equality; batches: relative error 1e-10 in float64",
    ),
    "numerics": Meaning(
        question="Do both models compute the same function, at every tap, in float64?",
        text=(
            "both models compute the same function: their outputs agree in float64, where rounding "
            "is negligible; taps locate a difference, free-running and teacher-forced"
        ),
        bound=f"relative error {FLOAT64_BOUND:g} (cosine 1 - 5e-21); {FLOAT64_ORIGIN}",
    ),
    "gradients": Meaning(
        question="Are the gradients of inputs and parameters the reference's?",
        text=(
            "the gradients of inputs and parameters are the reference's, in eval and in training "
            "mode, with gradient checkpointing, too; outputs are the same with gradients enabled"
        ),
        bound=(
            f"relative error {GRADIENT_BOUND:g} of each gradient in float64 "
            f"({GRADIENT_UPCAST_BOUND:g} for a port with float32 steps)"
        ),
    ),
    "calls": Meaning(
        question="Does a call only compute its outputs, in every situation?",
        text=(
            "batches of 1, 2, 3, 5 and 9, any memory format and gradient mode give the reference's "
            "outputs, in any dtype with its dtype, shape and device; calls write to no input or "
            "weight, change no setting of torch, and do not depend on earlier calls, outputs or "
            "weights"
        ),
        bound="relative error 1e-10 in float64; other dtypes: 4x the reference's rounding error",
    ),
    "interface": Meaning(
        question="Do all public methods, functions and options agree with the reference?",
        text=(
            "on small models, every other public entrance agrees with transformers': embeddings of "
            "images and packed patches, hidden states, attention, loading, saving, dtypes, copies, "
            "optimized models; on the checkpoint, embed() and hidden_states() agree with "
            "forward()"
        ),
        bound=(
            "weights, pixels and settings: equality; values: 1e-10 in float64; optimized models: "
            "5x the reference's own rounding error; checkpoints: half the digits of the dtype"
        ),
    ),
    "rounding": Meaning(
        question="Is the port's rounding error in this dtype no larger than the reference's?",
        text=(
            "the port's rounding error at every tap is comparable to the reference's, in float32, "
            "bfloat16 and float16; in the latter two, no step has an error that is not rounding"
        ),
        bound=ROUNDING_ORIGIN,
    ),
}
