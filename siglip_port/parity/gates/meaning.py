"""What each gate means, and its bound. Every gate runs, whatever the ones before it found."""

from __future__ import annotations

from dataclasses import dataclass

from siglip_port.parity.bounds import FLOAT64_BOUND, FLOAT64_ORIGIN, ROUNDING_ORIGIN


@dataclass(frozen=True)
class Meaning:
    """What a gate is for.

    Attributes:
        question: that it answers.
        text: what holds where it passes.
        bound: what is allowed.
    """

    question: str
    text: str
    bound: str


MEANING = {
    "pixels": Meaning(
        question="Do images become the same pixels, bit for bit?",
        text=(
            "images of all sizes and modes become the same pixel_values on both sides, by the "
            "reference's processors for Pillow and, where it is installed, torchvision; all other "
            "gates give both sides the same pixels"
        ),
        bound="equality of every bit",
    ),
    "environment": Meaning(
        question="Does nothing outside the two models bend the result?",
        text=(
            "nothing outside the two modules bends the result: both in eval mode and of one dtype, "
            "no autocast, no TF32"
        ),
        bound="equality",
    ),
    "config": Meaning(
        question="Is it the same architecture, field by field?",
        text="the same architecture, field by field: activation, eps, heads, sizes, head",
        bound="equality",
    ),
    "weights": Meaning(
        question="Is every tensor loaded, bit for bit?",
        text="every tensor of the one is a tensor of the other, none shares memory",
        bound="equality of every bit",
    ),
    "sensitivity": Meaning(
        question="Does every image, patch and parameter matter, and do images not mix?",
        text=(
            "every image, every pixel that counts and every parameter moves an output; two runs "
            "are alike to the bit; a batch is its images one by one; outputs are finite, and not "
            "the same for all"
        ),
        bound="equality; batches in float64: 1e-10",
    ),
    "numerics": Meaning(
        question=(
            "In float64, where rounding is next to nothing: do both compute the same at every tap?"
        ),
        text=(
            "both compute the same function: in float64, at every tap, free-running and given "
            "right inputs"
        ),
        bound=(
            f"relative error {FLOAT64_BOUND:g}, which is a cosine of 1 - 5e-21; {FLOAT64_ORIGIN}"
        ),
    ),
    "interface": Meaning(
        question="Do the port's other entrances agree with the one that is proven?",
        text=(
            "the port's other entrances agree with the one that is proven: embed() is pool() of "
            "the tokens, and of unit length where that is asked for; of NaFlex encoders, packed "
            "patches give the tokens of the images"
        ),
        bound=(
            "equality of every bit; lengths to four roundings of the dtype, packed patches to "
            "1e-10 in float64"
        ),
    ),
    "rounding": Meaning(
        question="In this dtype: does the port round no worse than the reference does?",
        text=(
            "the port rounds no worse than the reference does: in float32, bfloat16 and float16, "
            "at every tap"
        ),
        bound=ROUNDING_ORIGIN,
    ),
}
