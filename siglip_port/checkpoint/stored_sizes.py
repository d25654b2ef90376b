"""The architecture of an encoder by the shapes of its tensors, if they agree with one another."""

from __future__ import annotations

import re
from collections.abc import Mapping

from siglip_port.checkpoint.architecture import StoredSizes, read_sizes
from siglip_port.checkpoint.formats import TensorInfo
from siglip_port.checkpoint.key_rules import Layout
from siglip_port.checkpoint.layouts import BLOCK

MAX_BLOCKS = 1000  # the largest published encoders have 40


def consistent_sizes(
    layout: Layout, prefix: str, tensors: Mapping[str, TensorInfo]
) -> StoredSizes | None:
    """Return the sizes of the stored encoder; None if its tensors contradict one another.

    Args:
        layout: Layout of the tensors.
        prefix: Prefix of their names.
        tensors: Header entries by name.
    """
    shapes = {name: info.shape for name, info in tensors.items()}
    try:
        sizes = read_sizes(layout, shapes, prefix)
    except ValueError:
        return None
    if sizes.num_encoder_blocks > MAX_BLOCKS:
        return None
    mappings = layout.mappings(sizes.num_encoder_blocks, layout.encoder, prefix)
    widths: dict[str, int] = {}
    blocks: set[str] = set()
    for name, mapping in mappings.items():
        if name in shapes:
            widths[mapping.port[0]] = shapes[name][-1] if shapes[name] else 0
            blocks.update(re.findall(r"encoder_blocks\.(\d+)\.", " ".join(mapping.port)))
    # A bias confirms a width, so that one damaged weight does not look like another model.
    expected = {
        "transformer.embeddings.patch_embedding.bias": sizes.embed_dim,
        "transformer.post_layernorm.bias": sizes.embed_dim,
        f"{BLOCK.format(0)}mlp.fc1.bias": sizes.mlp_hidden_dim,
    }
    for name, width in expected.items():
        if widths.get(name, width) != width:
            return None
    return sizes if len(blocks) == sizes.num_encoder_blocks else None
