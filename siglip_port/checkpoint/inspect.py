"""What a checkpoint holds, as its headers tell.

And whether its numbers are any, where they are on this machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from siglip_port.checkpoint import layouts as key_map
from siglip_port.checkpoint.formats import Stored
from siglip_port.checkpoint.model_io import build_on_meta
from siglip_port.checkpoint.reader import Checkpoint, CheckpointError, Source
from siglip_port.config import SigLipVisionConfig
from siglip_port.model import SigLipVisionModel
from siglip_port.text import format_ranges

_Counts = Mapping[
    str, tuple[int, int]
]  # of NaN and of infinite elements, by the tensor's name in the file


@dataclass(frozen=True)
class Entry:
    """A stored tensor of the tower, or several that differ only in the number of their block.

    Attributes:
        ours: which of our tensors it holds; more than one where they are fused. Blocks are folded:
            `{0...11}`.
        stored: its name in the file, folded likewise.
        form: how it is stored, where not as it is here; else empty.
        shape: in the file; None where the file does not hold it.
        dtype: its name in a safetensors header; None where the file does not hold it.
        nan: how many of its elements are NaN; None where the weights were not read.
        inf: how many are infinite; likewise.
    """

    ours: tuple[str, ...]
    stored: str
    form: str
    shape: tuple[int, ...] | None
    dtype: str | None
    nan: int | None
    inf: int | None


@dataclass(frozen=True)
class Size:
    """How much is stored: number of tensors, of parameters, and of bytes."""

    tensors: int
    parameters: int
    bytes: int

    @classmethod
    def of(cls, stored: Iterable[Stored]) -> Size:
        """Sums up."""
        tensors = list(stored)
        return cls(
            len(tensors), sum(math.prod(t.shape) for t in tensors), sum(t.nbytes for t in tensors)
        )


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint holds.

    Attributes:
        source: the Hub id or path that was asked for.
        commit: the Hub commit, or None for a local path.
        files: the weights files.
        unread: those of them whose header cannot be had.
        towers: layout and prefix of every tower found.
        layout: the name of the layout that was taken.
        prefix: what stands before the names of the tower.
        title: both, for people.
        config: the architecture.
        tower: how much of the tower is stored.
        whole: how much is stored in all files that could be read.
        entries: the tensors of the tower.
        dropped: number of stored tensors that are not the tower's, by reason.
        problem: why the tower cannot be loaded; None where it can.
    """

    source: str
    commit: str | None
    files: tuple[str, ...]
    unread: tuple[str, ...]
    towers: tuple[tuple[str, str], ...]
    layout: str
    prefix: str
    title: str
    config: SigLipVisionConfig
    tower: Size
    whole: Size
    entries: tuple[Entry, ...]
    dropped: Mapping[str, int]
    problem: str | None

    def to_json(self) -> dict[str, Any]:
        """Returns all of it as JSON takes it."""
        towers = [{"layout": layout, "prefix": prefix} for layout, prefix in self.towers]
        return {**asdict(self), "towers": towers}


def inspect(source: Source, *, layout: str | None = None, prefix: str | None = None) -> Inspection:
    """Looks at the configuration and the headers of a checkpoint.

    Where it can be loaded, and its files are on this machine, the tower's tensors are read, one
    after the other, to count what is NaN or infinite. Nothing else is read, and of the Hub, nothing
    is fetched but headers.

    Args:
        source: where its files come from.
        layout: the name of one of `siglip_port.checkpoint.layouts.LAYOUTS`; None to recognise it.
        prefix: what stands before the names of the tower; None to find it.

    Raises:
        CheckpointError: there is no such checkpoint, or so little of a tower that nothing can be
            told of it.
        SeveralTowersError: there are several, and neither layout nor prefix tells which is meant.
        ValueError: there is no layout of this name.
    """
    checkpoint = Checkpoint(source, layout=layout, prefix=prefix)
    _, shapes = build_on_meta(checkpoint.config, source.title, SigLipVisionModel)
    problem, counts = None, None
    try:
        counts = checkpoint.count_not_finite(checkpoint.check(shapes))
    except CheckpointError as error:
        problem = str(error)
    headers = checkpoint.headers()
    stored = {
        name: tensor
        for header in headers.values()
        if header
        for name, tensor in header.tensors.items()
    }
    return Inspection(
        source=source.name,
        commit=source.commit,
        files=tuple(headers),
        unread=tuple(filename for filename, header in headers.items() if header is None),
        towers=tuple((found.name, place) for found, place in checkpoint.towers),
        layout=checkpoint.layout.name,
        prefix=checkpoint.prefix,
        title=checkpoint.title,
        config=checkpoint.config,
        tower=Size.of(stored[name] for name in checkpoint.claims if name in stored),
        whole=Size.of(stored.values()),
        entries=tuple(_entries(checkpoint, stored, counts)),
        dropped=checkpoint.dropped,
        problem=problem,
    )


def _entries(
    checkpoint: Checkpoint, stored: Mapping[str, Stored], counts: _Counts | None
) -> Iterator[Entry]:
    """Goes through the key map row by row.

    Only a row knows which number in a name is that of the block.
    """
    for row in checkpoint.layout.rows(checkpoint.config.pooling_head):
        for kind in ("weight", "bias") if "*" in row.stored else ("",):
            ours = tuple(name.replace("*", kind) for name in row.ours)
            yield from _folded(
                checkpoint,
                stored,
                counts,
                replace(row, ours=ours, stored=row.stored.replace("*", kind)),
            )


def _folded(
    checkpoint: Checkpoint, stored: Mapping[str, Stored], counts: _Counts | None, row: key_map.Row
) -> Iterator[Entry]:
    """One entry for all blocks, or several where they are not stored alike, or not all finite."""
    number_of_blocks = checkpoint.config.num_encoder_blocks
    names = list(checkpoint.layout.claims(number_of_blocks, [row], checkpoint.prefix))
    blocks: dict[tuple[Stored | None, bool], list[int]] = {}
    for number, name in enumerate(names):
        blocks.setdefault((stored.get(name), counts is not None and any(counts[name])), []).append(
            number
        )
    claim = checkpoint.claims[names[0]]
    form = ("blocks stacked", claim.form.name) if claim.stacked else (claim.form.name,)
    for (tensor, _), numbers in blocks.items():
        ranges = format_ranges(range(number_of_blocks) if claim.stacked else numbers)
        yield Entry(
            ours=tuple(name.replace("{}", ranges) for name in row.ours),
            stored=checkpoint.prefix + row.stored.replace("{}", ranges),
            form=", ".join(word for word in form if word),
            shape=None if tensor is None else tensor.shape,
            dtype=None if tensor is None else tensor.dtype,
            nan=None if counts is None else sum(counts[names[number]][0] for number in numbers),
            inf=None if counts is None else sum(counts[names[number]][1] for number in numbers),
        )
