"""What a checkpoint holds, as its headers tell.

And whether its numbers are any, where they are on this machine.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from siglip_port.checkpoint.errors import CheckpointError
from siglip_port.checkpoint.formats import TensorInfo
from siglip_port.checkpoint.key_rules import KeyMapping
from siglip_port.checkpoint.layouts import LAYOUTS
from siglip_port.checkpoint.pretrained import build_on_meta
from siglip_port.checkpoint.reader import Checkpoint
from siglip_port.checkpoint.recognize import Match, find_matches
from siglip_port.checkpoint.source import Source
from siglip_port.checkpoint.weight_files import WeightFiles
from siglip_port.config import SigLipVisionConfig
from siglip_port.model import SigLipVisionModel
from siglip_port.text import format_ranges

CHUNK_ELEMENTS = 1 << 24  # that are looked at for NaN and infinity at once


class NonFinite(NamedTuple):
    """How many elements of a tensor are NaN, and how many are infinite."""

    nan: int
    inf: int


Tensors = Mapping[str, TensorInfo]
NonFiniteCounts = Mapping[str, NonFinite]
"""By the tensor's name in the file."""


@dataclass(frozen=True)
class Entry:
    """A stored tensor of the encoder, or several that differ only in the number of their block.

    The names of the attributes are those of `siglip-port inspect --json`.

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
    def of(cls, tensors: Collection[TensorInfo]) -> Size:
        """Sum up."""
        parameters = sum(math.prod(info.shape) for info in tensors)
        return cls(len(tensors), parameters, sum(info.nbytes for info in tensors))


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint holds.

    Attributes:
        source: the Hub id or path that was asked for.
        commit: the Hub commit, or None for a local path.
        files: the weights files.
        unread: those of them whose header cannot be had.
        encoders: layout and prefix of every vision encoder in the files.
        layout: the name of the layout that was taken.
        prefix: what stands before the names of the encoder.
        title: both, for people.
        config: the architecture.
        encoder: how much of the encoder is stored.
        whole: how much is stored in all files that could be read.
        entries: the tensors of the encoder.
        dropped: number of stored tensors that are not the encoder's, by reason.
        problem: why the encoder cannot be loaded; None where it can.
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
        """Return all of it as JSON takes it."""
        towers = [{"layout": layout, "prefix": prefix} for layout, prefix in self.towers]
        return {**asdict(self), "towers": towers}


def inspect_checkpoint(
    source: Source, *, layout: str | None = None, prefix: str | None = None
) -> Inspection:
    """Look at the configuration and the headers of a checkpoint.

    Where it can be loaded, and its files are on this machine, the encoder's tensors are read, one
    after the other, to count what is NaN or infinite. Nothing else is read, and of the Hub, nothing
    is fetched but headers.

    Args:
        source: where its files come from.
        layout: the name of one of `siglip_port.checkpoint.layouts.LAYOUTS`; None to recognize it.
        prefix: what stands before the names of the encoder; None to find it.

    Raises:
        CheckpointError: there is no such checkpoint, or so little of an encoder that nothing can be
            told of it.
        MultipleEncodersError: there are several; `layout` and `prefix` choose one.
        ValueError: there is no layout of this name.
    """
    checkpoint = Checkpoint(source, layout=layout, prefix=prefix)
    _, shapes = build_on_meta(checkpoint.config, source.title, SigLipVisionModel)
    problem = None
    counts = None
    try:
        stored = checkpoint.check(shapes)
        counts = count_nonfinite(checkpoint.files, stored)
    except CheckpointError as error:
        problem = str(error)
    headers = checkpoint.files.headers()
    tensors: dict[str, TensorInfo] = {}
    for header in headers.values():
        if header is not None:
            tensors |= header.tensors
    matches = find_all_matches(checkpoint)
    return Inspection(
        source=source.name,
        commit=source.commit,
        files=tuple(headers),
        unread=tuple(filename for filename, header in headers.items() if header is None),
        towers=tuple((match.layout.name, match.prefix) for match in matches),
        layout=checkpoint.match.layout.name,
        prefix=checkpoint.match.prefix,
        title=checkpoint.match.title,
        config=checkpoint.config,
        tower=Size.of([tensors[name] for name in checkpoint.mappings if name in tensors]),
        whole=Size.of(tensors.values()),
        entries=tuple(list_entries(checkpoint, tensors, counts)),
        dropped=checkpoint.dropped,
        problem=problem,
    )


def find_all_matches(checkpoint: Checkpoint) -> list[Match]:
    """Find every vision encoder in the files; only the one taken, where they are too many."""
    try:
        matches, _ = find_matches(checkpoint.files, LAYOUTS)
    except CheckpointError:
        matches = []
    return matches or [checkpoint.match]


def count_nonfinite(files: WeightFiles, stored: Iterable[str]) -> dict[str, NonFinite] | None:
    """Read tensors, one after the other, and count what is NaN or infinite in each.

    Args:
        files: that hold them.
        stored: their names in the file.

    Returns:
        By name, the number of NaN and of infinite elements; None where the files are not on this
        machine.

    Raises:
        CheckpointError: a tensor is damaged.
    """
    groups = files.group_by_file(stored)
    paths = {}
    for filename in groups:
        path = files.source.local(filename)
        if path is None:
            return None
        paths[filename] = path
    return {name: count_in_tensor(tensor) for name, tensor in files.read(groups, paths)}


def count_in_tensor(tensor: torch.Tensor) -> NonFinite:
    """Count NaN and infinite elements, so that a mapped tensor is never in memory as a whole."""
    nan = 0
    inf = 0
    for chunk in torch.split(tensor.reshape(-1), CHUNK_ELEMENTS):
        nan += int(chunk.isnan().sum())
        inf += int(chunk.isinf().sum())
    return NonFinite(nan, inf)


def list_entries(
    checkpoint: Checkpoint, tensors: Tensors, counts: NonFiniteCounts | None
) -> Iterator[Entry]:
    """Go through the key map rule by rule.

    Only a rule knows which number in a name is that of the block.
    """
    layout, prefix = checkpoint.match
    num_blocks = checkpoint.config.num_encoder_blocks
    for rule in layout.rules(checkpoint.config.pooling_head):
        for single in rule.split_kinds():
            names = list(layout.mappings(num_blocks, [single], prefix))
            mapping = checkpoint.mappings[names[0]]
            for blocks in group_alike(names, tensors, counts):
                ranges = format_ranges(range(num_blocks) if mapping.stacked else blocks)
                alike = [names[block] for block in blocks]
                info = tensors.get(alike[0])
                yield Entry(
                    ours=tuple(name.replace("{}", ranges) for name in single.port),
                    stored=prefix + single.stored.replace("{}", ranges),
                    form=describe_transform(mapping),
                    shape=None if info is None else info.shape,
                    dtype=None if info is None else info.dtype,
                    nan=None if counts is None else sum(counts[name].nan for name in alike),
                    inf=None if counts is None else sum(counts[name].inf for name in alike),
                )


def group_alike(
    names: list[str], tensors: Tensors, counts: NonFiniteCounts | None
) -> list[list[int]]:
    """Group blocks that are stored alike, and are finite or not alike.

    Args:
        names: of the same tensor of each block.
        tensors: of the files.
        counts: of their elements that are not finite; None where they were not read.
    """
    groups: dict[tuple[TensorInfo | None, bool], list[int]] = {}
    for block, name in enumerate(names):
        is_finite = counts is None or counts[name] == (0, 0)
        groups.setdefault((tensors.get(name), is_finite), []).append(block)
    return list(groups.values())


def describe_transform(mapping: KeyMapping) -> str:
    """Say how a tensor is stored, where not as it is here."""
    words = ["blocks stacked"] if mapping.stacked else []
    if mapping.transform.name:
        words.append(mapping.transform.name)
    return ", ".join(words)
