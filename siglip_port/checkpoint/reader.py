"""Reads a checkpoint, strictly: headers first, then the tensors, mapped from the file.

Everything that is wrong with a checkpoint is collected from `config.json` and the safetensors
headers, before a single weight is read, and raised at once. What is then read is mapped from the
file (a private mapping: to change a weight never changes the file), so the weights are never in
memory twice.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from siglip_port.checkpoint import preprocessor_config
from siglip_port.checkpoint.architecture import read_architecture
from siglip_port.checkpoint.errors import (
    CheckpointError,
    HubUnreachableError,
    Problem,
    describe_problems,
)
from siglip_port.checkpoint.formats import DTYPES, TensorInfo
from siglip_port.checkpoint.json_files import read_config, read_preprocessor_config
from siglip_port.checkpoint.provenance import FINGERPRINT, ORIGIN, Provenance, fingerprint
from siglip_port.checkpoint.recognize import recognize
from siglip_port.checkpoint.source import CONFIG, OPEN_CLIP_CONFIG, Source
from siglip_port.checkpoint.weight_files import WeightFiles
from siglip_port.config import SigLipVisionConfig

FETCH_BOTH_AGAIN = (
    f"fetch the weights and {CONFIG} again, both from the same place and the same commit"
)

MAX_BLOCKS = 1000  # the largest encoders that are published have 40

Shapes = Mapping[str, torch.Size]
"""Our names of all the model's tensors, with the shape of each."""


@dataclass(frozen=True)
class OtherKeys:
    """The stored tensors that are not the encoder's.

    Attributes:
        ignored: their number, by the reason for which they are left unread.
        unknown: the names of those for which there is no reason.
    """

    ignored: Mapping[str, int]
    unknown: list[str]


class Checkpoint:
    """A checkpoint whose configuration and headers have been looked at.

    Its weights have not been read.

    Args:
        source: where its files come from.
        pooling_head: None to keep the pooling head if there is one, True to demand it, False to
            leave it out.
        layout: the name of one of `siglip_port.checkpoint.layouts.LAYOUTS`; None to recognize it.
        prefix: what stands before the names of the encoder; None to find it.
        config: the architecture, instead of what the checkpoint says of it.

    Attributes:
        files: the weights files.
        match: the layout that was recognized, and what stands before the names of the encoder.
        config: the architecture. It has a pooling head where the file holds one and it is not left
            out.
        preprocessor_config: the contents of the `preprocessor_config.json` that belongs to the
            encoder.
        mappings: every stored tensor of the encoder: its name in the file -> what of ours it holds.

    Raises:
        CheckpointError: there is no such checkpoint, or it does not hold a SigLIP vision encoder.
        MultipleEncodersError: it holds several; `layout` and `prefix` choose one.
        ValueError: there is no layout of this name.
    """

    def __init__(
        self,
        source: Source,
        *,
        pooling_head: bool | None = None,
        layout: str | None = None,
        prefix: str | None = None,
        config: SigLipVisionConfig | None = None,
    ) -> None:
        self._source = source
        content = read_config_unless(config, source)
        self.files = WeightFiles(source)
        self.match = recognize(self.files, layout, prefix)
        if content is not None and not self.match.layout.has_hf_config:
            content = {**read_open_clip_config(source), **content}
        self._config_of_files: SigLipVisionConfig | None = None
        self._described_by = "the architecture"
        if config is None:
            config = read_architecture(self.files, self.match, content)
            self._config_of_files = config
            if self.match.layout.has_hf_config:
                self._described_by = CONFIG
        self._check_naflex(config)
        self._head_keys = self._find_head(demanded=bool(pooling_head))
        self.config = self._with_pooling(config, pooling_head)
        self.preprocessor_config = preprocessor_config.derive(
            self.config, read_preprocessor_config(source), content or {}, source.name
        )
        self._check_block_count()
        rules = self.match.layout.rules(self.config.pooling_head)
        self.mappings = self.match.layout.mappings(
            config.num_encoder_blocks, rules, self.match.prefix
        )

    @property
    def dropped(self) -> Mapping[str, int]:
        """Number of stored tensors that are not the encoder's, by the reason to ignore them."""
        return self._other_keys().ignored

    def check(self, shapes: Shapes) -> dict[str, TensorInfo]:
        """Check the headers against the model.

        Args:
            shapes: our names of all the model's tensors, with the shape of each.

        Returns:
            Every stored tensor of the encoder, by its name in the file.

        Raises:
            CheckpointError: a tensor is missing, unknown, of the wrong shape or of an unusable
                dtype; it names all.
        """
        unknown = self._other_keys().unknown
        stored, problems = self._read_headers()
        problems += self._check_tensors(stored, shapes)
        if unknown:
            problems.append(
                ("unknown tensors, which no row of the key map claims or drops", unknown)
            )
        if problems:
            title = f"{self._source.title} (layout: {self.match.title})"
            report = describe_problems(title, problems)
            raise CheckpointError(f"{report}\nNothing was loaded; {FETCH_BOTH_AGAIN}.")
        self._check_fingerprint()  # last, since all else says more
        return stored

    def read(
        self,
        shapes: Shapes,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> tuple[dict[str, torch.Tensor], Provenance]:
        """Check the headers against the model, then read its tensors, and only these.

        Args:
            shapes: our names of all the model's tensors, with the shape of each.
            dtype: None for the dtype of the file; where its tensors differ, the one that holds them
                all exactly.
            device: None for the CPU, where tensors of the file's own dtype are mapped, not copied.

        Returns:
            Our names with the tensors, and where they come from.

        Raises:
            CheckpointError: as `check` does.
        """
        stored = self.check(shapes)
        stored_dtypes = tuple(dict.fromkeys(DTYPES[info.dtype] for info in stored.values()))
        if dtype is None:
            dtype = functools.reduce(torch.promote_types, stored_dtypes)
        groups = self.files.group_by_file(stored)
        paths = self._source.fetch(groups)
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in self.files.read(groups, paths):
            for port_name, part in self._split(name, tensor, shapes):
                tensors[port_name] = part.to(device, dtype)
        size = sum(self.files.header(filename).size for filename in groups)
        return tensors, Provenance(
            source=self._source.name,
            commit=self._source.commit,
            files=tuple(dict.fromkeys(paths[filename] for filename in groups)),
            layout=self.match.title,
            tensors_read=len(stored),
            bytes_read=sum(info.nbytes for info in stored.values()),
            bytes_whole=max(self.files.index_bytes, size),
            dropped=self.dropped,
            stored_dtypes=stored_dtypes,
            dtype=dtype,
            origin=self._origin(groups),
        )

    # --- what the constructor does ----------------------------------------------------------------

    def _check_naflex(self, config: SigLipVisionConfig) -> None:
        """Raise CheckpointError unless configuration and weights are of the same kind."""
        if config.naflex == self.match.layout.naflex:
            return
        kinds = {
            True: "a NaFlex encoder (siglip2)",
            False: "an encoder for images of one size (siglip)",
        }
        raise CheckpointError(
            f"{self._source.title}: {self._described_by} describes {kinds[config.naflex]}, but the "
            "shape of the patch "
            f"embedding is that of {kinds[self.match.layout.naflex]}; {FETCH_BOTH_AGAIN}"
        )

    def _find_head(self, demanded: bool) -> set[str]:
        """Find the tensors of the pooling head, of which there must be some if it is demanded."""
        layout, prefix = self.match
        keys = layout.mappings(0, layout.head, prefix).keys() & self.files.file_of.keys()
        if demanded and not keys:
            raise CheckpointError(
                f"{self._source.title} holds no pooling head, which pooling_head=True demands; "
                "load it without, for tokens"
            )
        return keys

    def _with_pooling(
        self, config: SigLipVisionConfig, pooling_head: bool | None
    ) -> SigLipVisionConfig:
        """Return the architecture with the pooling that the file has, or that was asked for."""
        if pooling_head is not None:
            return replace(config, pooling_head=pooling_head, mean_pooling=False)
        has_head = bool(self._head_keys)
        return replace(
            config, pooling_head=has_head, mean_pooling=config.mean_pooling and not has_head
        )

    def _check_block_count(self) -> None:
        """Raise CheckpointError if there are more blocks than can be.

        Before all are spelled out, since in a damaged file this number may be of any size.
        """
        count = self.config.num_encoder_blocks
        asks = f"{self._source.title}: {self._described_by} asks for {count} blocks"
        num_tensors = len(self.files.file_of)
        if not self.match.layout.is_stacked and count > num_tensors:
            raise CheckpointError(
                f"{asks}, but the weights have only {num_tensors} tensors; {FETCH_BOTH_AGAIN}"
            )
        if count > MAX_BLOCKS:
            raise CheckpointError(
                f"{asks}, and no encoder has more than {MAX_BLOCKS}; {FETCH_BOTH_AGAIN}"
            )

    # --- what `check` and `read` do ---------------------------------------------------------------

    def _other_keys(self) -> OtherKeys:
        """Sort what is not the encoder's."""
        layout, prefix = self.match
        ignored: Counter[str] = Counter()
        unknown = []
        for name in self.files.file_of.keys() - self.mappings.keys():
            reason = layout.reason_to_ignore(name, prefix)
            if name in self._head_keys:
                reason = "pooling head, left out"
            if reason is None:
                unknown.append(name)
            else:
                ignored[reason] += 1
        return OtherKeys(dict(sorted(ignored.items())), unknown)

    def _read_headers(self) -> tuple[dict[str, TensorInfo], list[Problem]]:
        """Read the headers of the files that hold the encoder.

        Of the others, none is opened, or even needed.
        """
        stored: dict[str, TensorInfo] = {}
        problems: list[Problem] = []
        file_of = self.files.file_of
        missing = [name for name in self.mappings if name not in file_of]
        groups = self.files.group_by_file(name for name in self.mappings if name in file_of)
        for filename, names in groups.items():
            try:
                tensors = self.files.header(filename).tensors
            except CheckpointError as error:
                problems.append((f"{error}, so these cannot be read", names))
                continue
            for name in names:
                if name in tensors:
                    stored[name] = tensors[name]
                else:
                    missing.append(name)
            astray = [name for name in tensors if file_of.get(name) != filename]
            if astray:
                problems.append(
                    (f"tensors in {filename} that the index does not place there", astray)
                )
        if missing:
            problems.insert(0, ("missing tensors", missing))
        return stored, problems

    def _check_tensors(self, stored: Mapping[str, TensorInfo], shapes: Shapes) -> list[Problem]:
        """Find the stored tensors of another shape than the model's, or of an unusable dtype."""
        problems: dict[str, list[str]] = {}
        for name, info in stored.items():
            mapping = self.mappings[name]
            port_shapes = [shapes[port_name] for port_name in mapping.port]
            expected = mapping.stored_shape(port_shapes, self.config.num_attention_heads)
            if info.shape != expected:
                shape = f"shape: expected {list(expected)} by {self._described_by}"
                problems.setdefault(f"{shape}, found {list(info.shape)}", []).append(name)
            if info.dtype not in DTYPES:
                dtype = f"dtype: expected one of {', '.join(DTYPES)}, found {info.dtype}"
                problems.setdefault(dtype, []).append(name)
        return list(problems.items())

    def _check_fingerprint(self) -> None:
        """Raise CheckpointError if weights written here belong to another configuration."""
        if self._config_of_files is None:
            return
        expected = self.files.metadata(FINGERPRINT)
        if expected - {fingerprint(self._config_of_files)}:
            raise CheckpointError(
                f"{self._source.title}: the configuration is not the one that these weights were "
                "saved with: saving "
                "was interrupted between the files, or one of them was changed since; save or "
                "fetch both again, or, if "
                "it is right, pass it: config=SigLipVisionConfig(...)"
            )

    def _split(
        self, name: str, tensor: torch.Tensor, shapes: Shapes
    ) -> list[tuple[str, torch.Tensor]]:
        """Take a stored tensor apart into ours, each with its name."""
        mapping = self.mappings[name]
        port_shapes = [shapes[port_name] for port_name in mapping.port]
        parts = [part.contiguous() for part in mapping.from_stored(tensor, port_shapes)]
        return list(zip(mapping.port, parts, strict=True))

    def _origin(self, filenames: Iterable[str]) -> str | None:
        """Return the Hub id and commit of the weights, or those that the files were made from."""
        if self._source.commit is not None:
            return f"{self._source.name}@{self._source.commit}"
        headers = [self.files.header(filename) for filename in filenames]
        origins = {header.metadata.get(ORIGIN, "") for header in headers}
        if len(origins) != 1:
            return None
        origin = origins.pop()
        is_origin = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+@[0-9a-f]{40}", origin, re.ASCII)
        return origin if is_origin else None


def read_config_unless(config: SigLipVisionConfig | None, source: Source) -> dict[str, Any] | None:
    """Read the configuration file, which need not be readable where `config` takes its place."""
    try:
        return read_config(source)
    except CheckpointError:
        if config is None:
            raise
        return None


def read_open_clip_config(source: Source) -> dict[str, Any]:
    """Read open_clip's configuration, which may lie beside one that says nothing."""
    with contextlib.suppress(HubUnreachableError):
        return read_config(source, (OPEN_CLIP_CONFIG,)) or {}
    return {}
