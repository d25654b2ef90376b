"""The key map: how published checkpoints name the tensors of the tower, and how we do. Pure data, and its reader.

One `Row` a module. The same rows load (`Layout.claims`), save (`Layout.to_stored`) and pair our modules with the
reference's. What no row claims and no `Dropped` row names is not ours to guess: it is an error.

Source of the stored names: transformers `models/siglip/modeling_siglip.py`, releases 4.37 to 5.23.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Row:
    """One module, in our names and in those of the file.

    `{}` stands for the number of the block, `*` for both `weight` and `bias`. Where `ours` names several
    modules, the file stores them fused: their tensors stacked along dimension 0, in this order.
    """

    ours: tuple[str, ...]
    stored: str


@dataclass(frozen=True)
class Dropped:
    """Tensors that a file may hold and the tower has no use for: full names match `pattern`, with a reason."""

    pattern: str
    reason: str


def _rows(*rows: tuple[str | tuple[str, ...], str]) -> tuple[Row, ...]:
    return tuple(Row((ours,) if isinstance(ours, str) else ours, stored) for ours, stored in rows)


# fmt: off
_BLOCK, _HF_BLOCK = "transformer.encoder.encoder_blocks.{}", "encoder.layers.{}"

TOWER = _rows(
    # ours                                                  in the file
    ("transformer.embeddings.patch_embedding.*",            "embeddings.patch_embedding.*"),
    ("transformer.embeddings.position_embedding.weight",    "embeddings.position_embedding.weight"),
    (f"{_BLOCK}.layer_norm1.*",                             f"{_HF_BLOCK}.layer_norm1.*"),
    (f"{_BLOCK}.self_attn.k_proj.*",                        f"{_HF_BLOCK}.self_attn.k_proj.*"),
    (f"{_BLOCK}.self_attn.v_proj.*",                        f"{_HF_BLOCK}.self_attn.v_proj.*"),
    (f"{_BLOCK}.self_attn.q_proj.*",                        f"{_HF_BLOCK}.self_attn.q_proj.*"),
    (f"{_BLOCK}.self_attn.out_proj.*",                      f"{_HF_BLOCK}.self_attn.out_proj.*"),
    (f"{_BLOCK}.layer_norm2.*",                             f"{_HF_BLOCK}.layer_norm2.*"),
    (f"{_BLOCK}.mlp.fc1.*",                                 f"{_HF_BLOCK}.mlp.fc1.*"),
    (f"{_BLOCK}.mlp.fc2.*",                                 f"{_HF_BLOCK}.mlp.fc2.*"),
    ("transformer.post_layernorm.*",                        "post_layernorm.*"),
)

HEAD = _rows(
    # The reference's head is an nn.MultiheadAttention, which stores q, k and v in one tensor, in this order.
    (("pooling_head.attention.q_proj.*",
      "pooling_head.attention.k_proj.*",
      "pooling_head.attention.v_proj.*"),                   "head.attention.in_proj_*"),
    ("pooling_head.probe",                                  "head.probe"),
    ("pooling_head.attention.out_proj.*",                   "head.attention.out_proj.*"),
    ("pooling_head.layernorm.*",                            "head.layernorm.*"),
    ("pooling_head.mlp.fc1.*",                              "head.mlp.fc1.*"),
    ("pooling_head.mlp.fc2.*",                              "head.mlp.fc2.*"),
)
# fmt: on


@dataclass(frozen=True)
class Layout:
    """One way in which checkpoints store the tower.

    Attributes:
        name: what it is called in messages.
        prefix: what stands before every stored name of the tower.
        dropped: what else such a file may hold.
    """

    name: str
    prefix: str
    dropped: tuple[Dropped, ...]

    def claims(self, num_blocks: int, rows: Iterable[Row]) -> dict[str, tuple[str, ...]]:
        """Spells the rows out: stored name -> the names of our tensors that it holds.

        Raises:
            ValueError: two rows claim one tensor, of the file or of ours: a fault in the table.
        """
        claimed = [(self.prefix + stored, ours) for row in rows for stored, ours in _spell_out(row, num_blocks)]
        names = Counter(stored for stored, _ in claimed) + Counter(name for _, ours in claimed for name in ours)
        if twice := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"the key map claims these more than once: {', '.join(twice)}")
        return dict(claimed)

    def reason_to_drop(self, stored: str) -> str | None:
        """Says why a stored tensor is dropped, or None where no row says so."""
        return next((d.reason for d in self.dropped if re.fullmatch(d.pattern, stored)), None)

    def recognises(self, stored_names: Collection[str]) -> bool:
        """Whether any of these names is the tower's in this layout."""
        return any(name in stored_names for name in self.claims(1, TOWER))

    def to_stored(
        self, state_dict: Mapping[str, torch.Tensor], num_blocks: int, rows: Iterable[Row]
    ) -> dict[str, torch.Tensor]:
        """Renames and fuses our tensors into those of the file: the reverse of `claims` and `split`."""
        claims = self.claims(num_blocks, rows)
        return {stored: fuse([state_dict[name] for name in ours]) for stored, ours in claims.items()}


PREFIXED = Layout(
    "HuggingFace, prefix vision_model",
    "vision_model.",
    (
        Dropped(r"text_model\..+", "text tower"),
        Dropped(r"logit_(scale|bias)", "scale and bias of the image-text logits"),
        Dropped(r"classifier\.(weight|bias)", "image classifier"),
        Dropped(r"vision_model\.embeddings\.position_ids", "position ids: counted, not learned"),
    ),
)
FLAT = Layout(
    "HuggingFace, no prefix",
    "",
    (Dropped(r"embeddings\.position_ids", "position ids: counted, not learned"),),
)

LAYOUTS = (PREFIXED, FLAT)
"""Every layout that is read. `PREFIXED`: SiglipModel, SiglipForImageClassification, and SiglipVisionModel of
transformers before 5.6 or re-saved later; it is also what we write. `FLAT`: SiglipVisionModel since 5.6."""


def split(tensor: torch.Tensor, parts: int) -> tuple[torch.Tensor, ...]:
    """Takes a stored tensor apart into `parts` of ours: views of equal height along dimension 0."""
    return tensor.chunk(parts) if parts > 1 else (tensor,)


def fuse(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Stacks several of our tensors into the one that is stored: the reverse of `split`."""
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]


def fused_shape(shapes: list[torch.Size]) -> tuple[int, ...]:
    """The shape of `fuse` of tensors of these shapes."""
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def fold_blocks(names: Iterable[str]) -> list[str]:
    """Folds names that differ only in the number of the block: `layers.{0...11}.mlp.fc1.bias`.

    Only a number between two dots is a block's number: `fc1` and `layer_norm1` stay what they are.
    """
    folded: dict[tuple[str, ...], list[int]] = {}
    for name in names:
        around = re.split(r"(?<=\.)(\d{1,9})(?=\.)", name, maxsplit=1)
        folded.setdefault(tuple(around[::2]), []).extend(int(number) for number in around[1:2])
    return [_ranges(blocks).join(around) for around, blocks in folded.items()]


def _spell_out(row: Row, num_blocks: int) -> Iterable[tuple[str, tuple[str, ...]]]:
    for number in range(num_blocks) if "{}" in row.stored else (0,):
        for kind in ("weight", "bias") if "*" in row.stored else ("",):
            stored, *ours = (name.replace("{}", str(number)).replace("*", kind) for name in (row.stored, *row.ours))
            yield stored, tuple(ours)


def _ranges(numbers: list[int]) -> str:
    """Writes `[0, 1, 2, 5]` as `{0...2,5}`, and one number as itself."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}...{r[-1]}" for r in runs)
    return f"{{{text}}}" if len(set(numbers)) > 1 else text
