"""Strict reading of a checkpoint: headers first, then memory-mapped tensors.

All problems are collected from `config.json` and the headers before any weight is read, and raised
as one error. Tensors are then mapped from the file with a private mapping, so weights are not
copied, and changing them does not change the file.
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
from siglip_port.checkpoint.hf_config import unknown_settings
from siglip_port.checkpoint.json_files import read_config, read_preprocessor_config
from siglip_port.checkpoint.layouts import PREFIX
from siglip_port.checkpoint.provenance import (
    FINGERPRINT,
    ORIGIN,
    Evidence,
    Provenance,
    fingerprint,
)
from siglip_port.checkpoint.recognize import recognize
from siglip_port.checkpoint.source import CONFIG, OPEN_CLIP_CONFIG, Source
from siglip_port.checkpoint.weight_files import WeightFiles
from siglip_port.config import SigLipVisionConfig

DOWNLOAD_BOTH_AGAIN = f"download the weights and {CONFIG} again, both from the same commit"

MAX_BLOCKS = 1000  # the largest published encoders have 40

Shapes = Mapping[str, torch.Size]
"""Shapes of all parameters of the model by name."""


@dataclass(frozen=True)
class OtherKeys:
    """Stored tensors that are not the encoder's.

    Attributes:
        ignored: Number of ignored tensors by reason.
        unexpected: Names of tensors that no rule ignores.
    """

    ignored: Mapping[str, int]
    unexpected: list[str]


class Checkpoint:
    """A checkpoint with its configuration and headers read, but no weights.

    Args:
        source: Source of the files.
        pooling_head: None to load the pooling head if the checkpoint has one, True to require it,
            False to ignore it.
        layout: Name of one of `siglip_port.checkpoint.layouts.LAYOUTS`; None to recognize it.
        prefix: Prefix of the encoder's names; None to find it.
        config: Architecture, instead of the checkpoint's.

    Attributes:
        files: Weights files.
        match: Layout and prefix of the encoder.
        config: Architecture, with a pooling head if the checkpoint has one and it is not ignored.
        preprocessor_config: Contents of the encoder's `preprocessor_config.json`.
        mappings: Name of every stored tensor of the encoder -> the parameters that it contains.

    Raises:
        CheckpointError: The checkpoint does not exist, or has no SigLIP vision encoder.
        MultipleEncodersError: It has several; `layout` and `prefix` select one.
        ValueError: The layout does not exist.
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
        self._architecture_source = describe_override(content)
        if config is None:
            config, self._architecture_source = read_architecture(self.files, self.match, content)
            self._config_of_files = config
            if self.match.layout.has_hf_config:
                self._described_by = CONFIG
        self._check_naflex(config)
        self._head_keys = self._find_head(required=bool(pooling_head))
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
    def evidence(self) -> Evidence:
        """Where the architecture, the pooling and the preprocessing come from."""
        pooling = "none"
        if self.config.pooling_head:
            pooling = "attention pooling head"
        elif self.config.mean_pooling:
            pooling = "mean of the tokens"
            if self._head_keys:
                pooling += ", of a classifier; pooling_head=True loads its unused pooling head"
        return Evidence(
            architecture=self._architecture_source,
            pooling=pooling,
            preprocessing=preprocessor_config.PREPROCESSOR,
        )

    @property
    def ignored(self) -> Mapping[str, int]:
        """Number of ignored stored tensors by reason."""
        return self._other_keys().ignored

    def check(self, shapes: Shapes) -> dict[str, TensorInfo]:
        """Check the headers against the model.

        Args:
            shapes: Shapes of all parameters of the model by name.

        Returns:
            Every stored tensor of the encoder by its name in the file.

        Raises:
            CheckpointError: Tensors are missing, unexpected, of the wrong shape, or of an
                unsupported dtype; the message names all of them.
        """
        unexpected = self._other_keys().unexpected
        stored, problems = self._read_headers()
        problems += self._check_tensors(stored, shapes)
        if unexpected:
            problems.append(("unexpected tensors, not in the key map", unexpected))
        if problems:
            title = f"{self._source.title} (layout: {self.match.title})"
            report = describe_problems(title, problems)
            raise CheckpointError(f"{report}\nNothing was loaded; {DOWNLOAD_BOTH_AGAIN}.")
        self._check_fingerprint()  # last, because other errors are more specific
        return stored

    def read(
        self,
        shapes: Shapes,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> tuple[dict[str, torch.Tensor], Provenance]:
        """Check the headers against the model, then read the encoder's tensors only.

        Args:
            shapes: Shapes of all parameters of the model by name.
            dtype: Dtype of the parameters. None for the file's; if its tensors differ, the smallest
                dtype that represents all of them exactly.
            device: Device of the parameters; None for the CPU, where tensors in the file's dtype
                are mapped, not copied.

        Returns:
            The parameters by name, and their provenance.

        Raises:
            CheckpointError: See `check`.
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
            evidence=self.evidence,
            tensors_read=len(stored),
            bytes_read=sum(info.nbytes for info in stored.values()),
            bytes_total=max(self.files.index_bytes, size),
            ignored=self.ignored,
            stored_dtypes=stored_dtypes,
            dtype=dtype,
            origin=self._origin(groups),
        )

    # --- steps of the constructor -----------------------------------------------------------------

    def _check_naflex(self, config: SigLipVisionConfig) -> None:
        """Raise CheckpointError unless configuration and weights agree on NaFlex."""
        if config.naflex == self.match.layout.naflex:
            return
        kinds = {
            True: "a NaFlex encoder (siglip2)",
            False: "a fixed-size encoder (siglip)",
        }
        raise CheckpointError(
            f"{self._source.title}: {self._described_by} describes {kinds[config.naflex]}, but the "
            f"shape of the patch embedding is that of {kinds[self.match.layout.naflex]}; "
            f"{DOWNLOAD_BOTH_AGAIN}"
        )

    def _find_head(self, required: bool) -> set[str]:
        """Return the stored names of the pooling head; raise if it is required but missing."""
        layout, prefix = self.match
        keys = layout.mappings(0, layout.head, prefix).keys() & self.files.file_of.keys()
        if required and not keys:
            raise CheckpointError(
                f"{self._source.title} has no pooling head, which pooling_head=True requires; "
                "omit pooling_head= to load the encoder without one"
            )
        return keys

    def _with_pooling(
        self, config: SigLipVisionConfig, pooling_head: bool | None
    ) -> SigLipVisionConfig:
        """Return the architecture with the pooling of the file, or as requested."""
        if pooling_head is not None:
            return replace(config, pooling_head=pooling_head, mean_pooling=False)
        if config.mean_pooling or self._is_classifier():
            return replace(config, pooling_head=False, mean_pooling=True)
        return replace(config, pooling_head=bool(self._head_keys))

    def _is_classifier(self) -> bool:
        """Return whether the file has transformers' classifier, which pools by the mean."""
        layout, prefix = self.match
        name = f"{prefix.removesuffix(PREFIX)}classifier.weight"
        return layout.has_hf_config and name in self.files.file_of

    def _check_block_count(self) -> None:
        """Raise CheckpointError if the number of blocks is impossible.

        A damaged file may give any number, and expanding the rules would take all memory.
        """
        count = self.config.num_encoder_blocks
        subject = f"{self._source.title}: {self._described_by} has {count} blocks"
        num_tensors = len(self.files.file_of)
        if not self.match.layout.is_stacked and count > num_tensors:
            raise CheckpointError(
                f"{subject}, but the weights have only {num_tensors} tensors; {DOWNLOAD_BOTH_AGAIN}"
            )
        if count > MAX_BLOCKS:
            raise CheckpointError(f"{subject}, limit is {MAX_BLOCKS}; {DOWNLOAD_BOTH_AGAIN}")

    # --- steps of `check` and `read` --------------------------------------------------------------

    def _other_keys(self) -> OtherKeys:
        """Classify the stored tensors that are not the encoder's."""
        layout, prefix = self.match
        ignored: Counter[str] = Counter()
        unexpected = []
        for name in self.files.file_of.keys() - self.mappings.keys():
            reason = layout.reason_to_ignore(name, prefix)
            if name in self._head_keys:
                reason = "pooling head"
            if reason is None:
                unexpected.append(name)
            else:
                ignored[reason] += 1
        return OtherKeys(dict(sorted(ignored.items())), unexpected)

    def _read_headers(self) -> tuple[dict[str, TensorInfo], list[Problem]]:
        """Read the headers of the encoder's files; other files need not exist."""
        stored: dict[str, TensorInfo] = {}
        problems: list[Problem] = []
        file_of = self.files.file_of
        missing = [name for name in self.mappings if name not in file_of]
        groups = self.files.group_by_file(name for name in self.mappings if name in file_of)
        for filename, names in groups.items():
            try:
                tensors = self.files.header(filename).tensors
            except CheckpointError as error:
                problems.append((f"{error}; unreadable tensors", names))
                continue
            for name in names:
                if name in tensors:
                    stored[name] = tensors[name]
                else:
                    missing.append(name)
            misplaced = [name for name in tensors if file_of.get(name) != filename]
            if misplaced:
                problems.append((f"tensors in {filename} contrary to the index", misplaced))
        if missing:
            problems.insert(0, ("missing tensors", missing))
        return stored, problems

    def _check_tensors(self, stored: Mapping[str, TensorInfo], shapes: Shapes) -> list[Problem]:
        """Find stored tensors of the wrong shape or of an unsupported dtype."""
        problems: dict[str, list[str]] = {}
        for name, info in stored.items():
            mapping = self.mappings[name]
            port_shapes = [shapes[port_name] for port_name in mapping.port]
            expected = mapping.stored_shape(port_shapes, self.config.num_attention_heads)
            if info.shape != expected:
                shape = f"shape: expected {list(expected)} from {self._described_by}"
                problems.setdefault(f"{shape}, got {list(info.shape)}", []).append(name)
            if info.dtype not in DTYPES:
                dtype = f"dtype: expected one of {', '.join(DTYPES)}, got {info.dtype}"
                problems.setdefault(dtype, []).append(name)
        return list(problems.items())

    def _check_fingerprint(self) -> None:
        """Raise CheckpointError if the weights were saved with another configuration."""
        if self._config_of_files is None:
            return
        expected = self.files.metadata(FINGERPRINT)
        if expected - {fingerprint(self._config_of_files)}:
            raise CheckpointError(
                f"{self._source.title}: the configuration is not the one that the weights were "
                "saved with (interrupted save, or a later change); save or download both again, "
                "or pass config=SigLipVisionConfig(...)"
            )

    def _split(
        self, name: str, tensor: torch.Tensor, shapes: Shapes
    ) -> list[tuple[str, torch.Tensor]]:
        """Split a stored tensor into parameters with their names."""
        mapping = self.mappings[name]
        port_shapes = [shapes[port_name] for port_name in mapping.port]
        parts = [part.contiguous() for part in mapping.from_stored(tensor, port_shapes)]
        return list(zip(mapping.port, parts, strict=True))

    def _origin(self, filenames: Iterable[str]) -> str | None:
        """Return the Hub id and commit of the weights, also if saved to a local file since."""
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
    """Read the configuration file; return None if it is unreadable and `config` replaces it."""
    try:
        return read_config(source)
    except CheckpointError:
        if config is None:
            raise
        return None


def describe_override(content: Mapping[str, Any] | None) -> str:
    """Describe an architecture passed as `config=`, and what it overrides in the file."""
    source = "config="
    unknown = unknown_settings(content or {})
    if unknown:
        source += f"; not applied: {', '.join(unknown)} in {CONFIG}"
    return source


def read_open_clip_config(source: Source) -> dict[str, Any]:
    """Read open_clip's configuration; empty if it is missing or not cached."""
    with contextlib.suppress(HubUnreachableError):
        return read_config(source, (OPEN_CLIP_CONFIG,)) or {}
    return {}
