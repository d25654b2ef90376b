"""Part of the gate `sensitivity`: inputs of integers and bools, such as token ids and masks.

They have no gradients; values are replaced with other values of the same tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from siglip_port.parity.metrics import tensors_equal
from siglip_port.parity.nested import Inputs, map_tensors, tensors_in
from siglip_port.parity.results import Finding
from siglip_port.parity.sides import ReferenceHost, Side, cast, cast_inputs

NUM_TILES = 4
"""Number of groups of positions, which are replaced together: every fourth one."""

Effects = dict[tuple[int, int], bool]
"""(Integer tensor, tile) -> whether replacing values there changes an output."""


def check_integer_inputs(
    port: Side, reference: ReferenceHost, inputs: Inputs, dtype: torch.dtype
) -> tuple[int, list[Finding]]:
    """Check that the same integers affect both sides.

    Args:
        port: Port in `eval()` mode.
        reference: Reference in `eval()` mode.
        inputs: Inputs of both sides.
        dtype: Dtype in which both sides run.

    Returns:
        Number of checks, and findings.
    """
    if not integer_tensors(inputs):
        return 0, []
    inputs = cast_inputs(inputs, dtype)
    expected = reference.compute(effects_of_integers, inputs, dtype, None)
    effects = effects_of_integers(port, inputs, dtype, list(expected))
    findings = []
    for (index, tile), affects in expected.items():
        if effects[index, tile] != affects:
            side = "reference" if affects else "port"
            message = (
                f"other values of integer input {index}, at every {NUM_TILES}th position from "
                f"{tile}, affect only the {side}"
            )
            findings.append(Finding(message, "inputs", "inputs"))
    return len(expected), findings


def integer_tensors(inputs: Inputs) -> list[Tensor]:
    """Return the tensors of integers and bools in `inputs`."""
    return [tensor for tensor in tensors_in(inputs) if not tensor.is_floating_point()]


def effects_of_integers(
    side: Side, inputs: Inputs, dtype: torch.dtype, tiles: list[tuple[int, int]] | None
) -> Effects:
    """Find the tiles of integers that affect the outputs of a side.

    Args:
        side: Side to run.
        inputs: Inputs in `dtype`.
        dtype: Dtype to which the side is cast.
        tiles: Tiles to try; None for all of those that are valid inputs. Other shapes of the grid
            of an image, for example, are not.
    """
    with cast(side.module, dtype):
        outputs = side.run(inputs)
        effects = {}
        is_reference = tiles is None
        for tile in all_tiles(inputs) if tiles is None else tiles:
            try:
                changed = side.run(replace_tile(inputs, *tile))
            except (IndexError, RuntimeError, ValueError):
                if is_reference:
                    continue
                raise
            effects[tile] = has_changed(changed, outputs)
    return effects


def all_tiles(inputs: Inputs) -> list[tuple[int, int]]:
    """List the tiles of every integer tensor that has several values."""
    tiles = []
    for index, tensor in enumerate(integer_tensors(inputs)):
        if tensor.ndim and len(tensor.unique()) > 1:
            tiles += [(index, tile) for tile in range(min(NUM_TILES, tensor.shape[-1]))]
    return tiles


def replace_tile(inputs: Inputs, index: int, tile: int) -> Inputs:
    """Replace values at the positions of a tile with the next larger value of the tensor."""
    count = -1

    def replace(tensor: Tensor) -> Tensor:
        nonlocal count
        if tensor.is_floating_point():
            return tensor
        count += 1
        if count != index:
            return tensor
        values = tensor.unique()
        positions = torch.searchsorted(
            values.long(), tensor[..., tile::NUM_TILES].long().contiguous()
        )
        changed = tensor.clone()
        changed[..., tile::NUM_TILES] = values[(positions + 1) % len(values)]
        return changed

    return map_tensors(inputs, replace, only_floating_point=False)


def has_changed(outputs: dict[str, Tensor], original: dict[str, Tensor]) -> bool:
    """Return whether any output has another shape or other bits."""
    for name, output in original.items():
        if outputs[name].shape != output.shape or not tensors_equal(outputs[name], output):
            return True
    return False
