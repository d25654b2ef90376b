"""Contents of a checkpoint from its headers, with counts of NaN and Inf in local files."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from siglip_port.checkpoint.errors import CheckpointError
from siglip_port.checkpoint.formats import TensorInfo
from siglip_port.checkpoint.key_rules import KeyMapping, KeyRule
from siglip_port.checkpoint.pretrained import build_on_meta
from siglip_port.checkpoint.provenance import Evidence
from siglip_port.checkpoint.reader import Checkpoint
from siglip_port.checkpoint.recognize import Match, find_matches, recognizable_layouts
from siglip_port.checkpoint.source import Source
from siglip_port.checkpoint.weight_files import WeightFiles
from siglip_port.config import SigLipVisionConfig
from siglip_port.model import SigLipVisionModel
from siglip_port.text import fold_blocks, format_ranges

CHUNK_ELEMENTS = 1 << 24  # checked for NaN and Inf at once


class NonFinite(NamedTuple):
    """Number of NaN and Inf elements of a tensor."""

    nan: int
    inf: int


Tensors = Mapping[str, TensorInfo]
NonFiniteCounts = Mapping[str, NonFinite]
"""Counts by the tensor's name in the file."""


@dataclass(frozen=True)
class Entry:
    """A stored tensor of the encoder, or the same tensor of several blocks.

    Attribute names are keys of `siglip-port inspect --json`.

    Attributes:
        parameters: Parameters that the tensor contains, several if fused. Block indices are folded:
            `{0...11}`.
        stored: Name in the file, with folded block indices.
        transform: Stored dimensions, if they differ from the parameter's; else empty.
        shape: Stored shape; None if the tensor is missing.
        dtype: Name in a safetensors header; None if the tensor is missing.
        nan: Number of NaN elements; None if the weights were not read.
        inf: Number of Inf elements; None if the weights were not read.
    """

    parameters: tuple[str, ...]
    stored: str
    transform: str
    shape: tuple[int, ...] | None
    dtype: str | None
    nan: int | None
    inf: int | None


@dataclass(frozen=True)
class Size:
    """Number of tensors, of their elements (`parameters`), and of bytes."""

    tensors: int
    parameters: int
    bytes: int

    @classmethod
    def of(cls, tensors: Collection[TensorInfo]) -> Size:
        """Return the total size of tensors."""
        parameters = sum(math.prod(info.shape) for info in tensors)
        return cls(len(tensors), parameters, sum(info.nbytes for info in tensors))


@dataclass(frozen=True)
class Inspection:
    """Contents of a checkpoint.

    Attributes:
        source: Path, Hub id or `hf://` address.
        commit: Hub commit; None for a local path.
        files: Weights files.
        unread: Weights files whose header cannot be read.
        encoders: Layout and prefix of every vision encoder in the files.
        layout: Name of the selected encoder's layout.
        prefix: Prefix of its names.
        title: Layout and prefix, for messages.
        config: Architecture.
        evidence: Source of the architecture, the pooling and the preprocessing.
        encoder: Stored size of the encoder.
        total: Stored size of all readable files.
        entries: Tensors of the encoder.
        ignored: Number of ignored stored tensors by reason.
        problem: Why the encoder cannot be loaded; None if it can.
    """

    source: str
    commit: str | None
    files: tuple[str, ...]
    unread: tuple[str, ...]
    encoders: tuple[tuple[str, str], ...]
    layout: str
    prefix: str
    title: str
    config: SigLipVisionConfig
    evidence: Evidence
    encoder: Size
    total: Size
    entries: tuple[Entry, ...]
    ignored: Mapping[str, int]
    problem: str | None

    def to_json(self) -> dict[str, Any]:
        """Return the contents as a JSON object."""
        encoders = [{"layout": layout, "prefix": prefix} for layout, prefix in self.encoders]
        return {**asdict(self), "encoders": encoders}


def inspect_checkpoint(
    source: Source,
    *,
    layout: str | None = None,
    prefix: str | None = None,
    config: SigLipVisionConfig | None = None,
) -> Inspection:
    """Inspect a checkpoint by its configuration and headers.

    If the encoder can be loaded and its files are local, its tensors are read one by one to count
    NaN and Inf. From the Hub, only the configuration and headers are downloaded.

    Args:
        source: Source of the files.
        layout: Name of one of `siglip_port.checkpoint.layouts.LAYOUTS`; None to recognize it.
        prefix: Prefix of the encoder's names; None to find it.
        config: Architecture, instead of the checkpoint's.

    Raises:
        CheckpointError: The checkpoint does not exist, or contains no vision encoder whose
            architecture is known.
        MultipleEncodersError: It contains several; `layout` and `prefix` select one.
        ValueError: The layout does not exist.
    """
    checkpoint = Checkpoint(source, layout=layout, prefix=prefix, config=config)
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
        source=source.address,
        commit=source.commit,
        files=tuple(headers),
        unread=tuple(filename for filename, header in headers.items() if header is None),
        encoders=tuple((match.layout.name, match.prefix) for match in matches),
        layout=checkpoint.match.layout.name,
        prefix=checkpoint.match.prefix,
        title=checkpoint.title,
        config=checkpoint.config,
        evidence=checkpoint.evidence,
        encoder=Size.of([tensors[name] for name in checkpoint.mappings if name in tensors]),
        total=Size.of(tensors.values()),
        entries=tuple(list_entries(checkpoint, tensors, counts)),
        ignored=checkpoint.ignored,
        problem=problem,
    )


def find_all_matches(checkpoint: Checkpoint) -> list[Match]:
    """Return every vision encoder in the files; only the selected one if there are too many."""
    try:
        matches, _ = find_matches(checkpoint.files, recognizable_layouts())
    except CheckpointError:
        matches = []
    selected = checkpoint.match
    encoders = []
    for match in matches:
        is_selected = selected.prefix == match.prefix and selected.has_shapes_of(match)
        # Of two layouts with these shapes, the configuration selects one.
        encoders.append(selected if is_selected else match)
    return encoders or [selected]


def count_nonfinite(files: WeightFiles, stored: Iterable[str]) -> dict[str, NonFinite] | None:
    """Count NaN and Inf elements of stored tensors.

    Args:
        files: Weights files.
        stored: Names of the tensors in the files.

    Returns:
        Counts by name; None if the files are not on this machine.

    Raises:
        CheckpointError: A tensor is damaged.
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
    """Count NaN and Inf elements in chunks, to bound memory for mapped tensors."""
    nan = 0
    inf = 0
    for chunk in torch.split(tensor.reshape(-1), CHUNK_ELEMENTS):
        nan += int(chunk.isnan().sum())
        inf += int(chunk.isinf().sum())
    return NonFinite(nan, inf)


def list_entries(
    checkpoint: Checkpoint, tensors: Tensors, counts: NonFiniteCounts | None
) -> Iterator[Entry]:
    """Yield the entries rule by rule, because only a rule knows the block index in a name."""
    layout, prefix = checkpoint.match
    num_blocks = checkpoint.config.num_encoder_blocks
    for rule in layout.rules(checkpoint.config.pooling_head):
        for single in rule.split_kinds():
            names = list(layout.mappings(num_blocks, [single], prefix))
            mapping = checkpoint.mappings[names[0]]
            for blocks in group_blocks(names, tensors, counts):
                ranges = format_ranges(range(num_blocks) if mapping.stacked else blocks)
                group = [names[block] for block in blocks]
                info = tensors.get(group[0])
                yield Entry(
                    parameters=tuple(name.replace("{}", ranges) for name in single.port),
                    stored=stored_names(checkpoint.files, prefix, single, group, ranges),
                    transform=describe_transform(mapping),
                    shape=None if info is None else info.shape,
                    dtype=None if info is None else info.dtype,
                    nan=None if counts is None else sum(counts[name].nan for name in group),
                    inf=None if counts is None else sum(counts[name].inf for name in group),
                )


def stored_names(
    files: WeightFiles, prefix: str, rule: KeyRule, names: list[str], ranges: str
) -> str:
    """Return the names of the same tensor of several blocks in the files, folded.

    Args:
        files: Weights files.
        prefix: Prefix of the encoder.
        rule: Rule of the tensor.
        names: Name of the tensor in each block.
        ranges: Block indices.
    """
    stored = [files.stored_name(name) for name in names]
    if stored == names:
        return prefix + rule.stored.replace("{}", ranges)
    return ", ".join(fold_blocks(stored))


def group_blocks(
    names: list[str], tensors: Tensors, counts: NonFiniteCounts | None
) -> list[list[int]]:
    """Group block indices by stored shape and dtype, and by whether all values are finite.

    Args:
        names: Name of the same tensor in each block.
        tensors: Stored tensors by name.
        counts: Counts of NaN and Inf; None if the weights were not read.
    """
    groups: dict[tuple[TensorInfo | None, bool], list[int]] = {}
    for block, name in enumerate(names):
        is_finite = counts is None or counts[name] == (0, 0)
        groups.setdefault((tensors.get(name), is_finite), []).append(block)
    return list(groups.values())


def describe_transform(mapping: KeyMapping) -> str:
    """Return the stored dimensions if they differ from the parameter's; else empty."""
    words = ["blocks stacked"] if mapping.stacked else []
    if mapping.transform.name:
        words.append(mapping.transform.name)
    return ", ".join(words)
