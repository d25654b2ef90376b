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

from siglip_port.checkpoint.adapters import refuse_adapter
from siglip_port.checkpoint.architecture import read_architecture
from siglip_port.checkpoint.diagnosis import Symptoms, diagnose, tensors_stored_twice
from siglip_port.checkpoint.errors import (
    CheckpointError,
    HubUnreachableError,
    Problem,
    describe_problems,
)
from siglip_port.checkpoint.formats import DTYPES, TensorInfo
from siglip_port.checkpoint.hf_config import unknown_settings
from siglip_port.checkpoint.json_files import read_config, read_preprocessor_config
from siglip_port.checkpoint.layouts import CLASSIFIER, LAYOUTS, PREFIX
from siglip_port.checkpoint.pooling import (
    PROJECTION,
    Pooling,
    find_projection,
    modules_behind_pooling,
)
from siglip_port.checkpoint.preprocessing import Preprocessing
from siglip_port.checkpoint.preprocessor_config import Clues, StoredProcessor, derive, from_word
from siglip_port.checkpoint.provenance import (
    FINGERPRINT,
    ORIGIN,
    Evidence,
    Provenance,
    fingerprint,
)
from siglip_port.checkpoint.recognize import Match, model_types, recognize, select_by_config
from siglip_port.checkpoint.source import CONFIG, OPEN_CLIP_CONFIG, Source
from siglip_port.checkpoint.stored_sizes import MAX_BLOCKS, consistent_sizes
from siglip_port.checkpoint.weight_files import WeightFiles
from siglip_port.config import SigLipVisionConfig

DOWNLOAD_BOTH_AGAIN = f"download the weights and {CONFIG} again, both from the same commit"
CHECK_BOTH = f"check that the weights and {CONFIG} are complete and belong together"
NOT_IN_INDEX = "not in the index"

Shapes = Mapping[str, torch.Size]
"""Shapes of all parameters of the model by name."""


@dataclass(frozen=True)
class ReadHeaders:
    """The encoder's tensors according to the headers of its files.

    Attributes:
        stored: Tensors by name.
        missing: Names of missing tensors.
        problems: Problems of files that cannot be read.
        absent_files: These files.
    """

    stored: dict[str, TensorInfo]
    missing: list[str]
    problems: list[Problem]
    absent_files: list[str]


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
        preprocessing: Preprocessing, instead of the checkpoint's: result of
            `siglip_port.checkpoint.json_files.read_word`.

    Attributes:
        files: Weights files.
        match: Layout and prefix of the encoder.
        config: Architecture, with a pooling head if the checkpoint has one and it is not ignored.
        preprocessing: Contents of the encoder's `preprocessor_config.json`, and their source.
        mappings: Name of every stored tensor of the encoder -> the parameters that it contains.

    Raises:
        CheckpointError: The checkpoint does not exist, or has no SigLIP vision encoder.
        MultipleEncodersError: It has several; `layout` and `prefix` select one.
        ValueError: The layout does not exist, or `preprocessing` does not fit the model.
    """

    def __init__(
        self,
        source: Source,
        *,
        pooling_head: bool | None = None,
        layout: str | None = None,
        prefix: str | None = None,
        config: SigLipVisionConfig | None = None,
        preprocessing: str | StoredProcessor | None = None,
    ) -> None:
        self._source = source
        content = read_config_unless(config, source)
        refuse_adapter(source)
        self.files = WeightFiles(source)
        self.match = recognize(self.files, layout, prefix)
        if prefix is None:
            self._check_duplicates()
        if content is not None and not self.match.layout.has_hf_config:
            content = {**read_open_clip_config(source), **content}
        self._config_of_files: SigLipVisionConfig | None = None
        self._described_by = "the architecture"
        self._architecture_source = describe_override(content)
        try:
            config = self._read_architecture(config, content or {}, has_config=content is not None)
        except CheckpointError as error:
            raise self._with_cause(error) from error
        self._head_keys = self._find_head(required=bool(pooling_head))
        self._pooling = self._read_pooling(config, pooling_head)
        self.config = self._with_pooling(config, pooling_head)
        self.preprocessing = self._find_preprocessing(preprocessing, content or {})
        rules = self.match.layout.rules(self.config.pooling_head)
        self.mappings = self.match.layout.mappings(
            config.num_encoder_blocks, rules, self.match.prefix
        )

    @property
    def evidence(self) -> Evidence:
        """Where the architecture, the pooling and the preprocessing come from."""
        return Evidence(
            architecture=self._architecture_source,
            pooling=self._pooling.describe(self.config),
            preprocessing=str(self.preprocessing),
        )

    @property
    def title(self) -> str:
        """Layout, prefix and removed wrappers, for messages."""
        if not self.files.wrappers:
            return self.match.title
        return f"{self.match.title}, names without {', '.join(self.files.wrappers)}"

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
        headers = self._read_headers()
        problems = list(headers.problems)
        if headers.missing:
            problems.insert(0, ("missing tensors", headers.missing))
        problems += self._check_tensors(headers.stored, shapes)
        if unexpected:
            problems.append(("unexpected tensors, not in the key map", unexpected))
        if problems:
            raise CheckpointError(self._describe(problems, headers))
        self._check_fingerprint()  # last, because other errors are more specific
        return headers.stored

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
        paths = self.files.fetch(groups)
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in self.files.read(groups, paths):
            for port_name, part in self._split(name, tensor, shapes):
                tensors[port_name] = part.to(device, dtype)
        size = sum(self.files.header(filename).size for filename in groups)
        return tensors, Provenance(
            source=self._source.address,
            commit=self._source.commit,
            files=tuple(dict.fromkeys(paths[filename] for filename in groups)),
            layout=self.title,
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

    def _check_duplicates(self) -> None:
        """Raise CheckpointError if tensors of the encoder are also stored under a wrapper's name.

        Otherwise, one of two models would be loaded without a word.
        """
        cause = tensors_stored_twice(Symptoms([], {}, True, duplicates=self._duplicates()))
        if cause is not None:
            raise CheckpointError(f"{self._source.title}: {cause}; or select one with prefix=")

    def _duplicates(self) -> dict[str, list[str]]:
        """Return the tensors of the encoder that are also stored under a wrapper's name."""
        duplicates = {}
        for name, stored in self.files.duplicates.items():
            if any(other.startswith(self.match.prefix) for other in stored):
                duplicates[name] = stored
        return duplicates

    def _read_architecture(
        self, config: SigLipVisionConfig | None, content: Mapping[str, Any], *, has_config: bool
    ) -> SigLipVisionConfig:
        """Return the architecture, and select the layout if the configuration does.

        Args:
            config: The caller's architecture; None for the checkpoint's.
            content: Contents of the configuration file.
            has_config: Whether there is one.

        Raises:
            CheckpointError: The configuration is missing, wrong or of another kind of model.
        """
        if config is None:
            for model_type, reason in self.match.layout.refused_types:
                if model_type in model_types(content):
                    raise CheckpointError(
                        f"{self._source.title}: model_type {model_type!r} in layout "
                        f"{self.match.layout.name!r} is not supported: {reason}; pass config="
                    )
            config, self._architecture_source = read_architecture(
                self.files, self.match, content if has_config else None
            )
            self._config_of_files = config
            if self.match.layout.has_hf_config:
                self._described_by = CONFIG
        self.match = select_by_config(self.match, config.naflex, content)
        self._check_naflex(config)
        self._check_block_count(config)
        return config

    def _with_cause(self, error: CheckpointError) -> CheckpointError:
        """Return the error with its cause in front, if the tensors show one."""
        cause = diagnose(self._symptoms())
        if cause is None or isinstance(error, HubUnreachableError):
            return error
        title = f"{self._source.title}: "
        details = str(error).removeprefix(title).removesuffix(f"; {self._advice()}")
        return CheckpointError(f"{title}{cause}; {details}")

    def _symptoms(self, headers: ReadHeaders | None = None) -> Symptoms:
        """Return what is known of the encoder, for the diagnosis."""
        prefix = self.match.prefix
        names = [name for name in self.files.file_of if name.startswith(prefix)]
        known = self.files.known_tensors()
        tensors = {name: known[name] for name in names if name in known}
        if headers is None:
            return Symptoms(names, tensors, True, duplicates=self._duplicates())
        unlisted = {}
        for filename in self.files.group_by_file(tensors):
            for name in self.files.unlisted(filename):
                if name in headers.missing:
                    unlisted[name] = filename
        return Symptoms(
            names,
            tensors,
            True,
            config=self.config,
            sizes=consistent_sizes(self.match.layout, prefix, tensors),
            described_by=self._described_by,
            missing=headers.missing,
            unlisted=unlisted,
            absent_files=headers.absent_files,
            duplicates=self._duplicates(),
        )

    def _advice(self) -> str:
        """Return what to do if no cause is known."""
        return CHECK_BOTH if self._source.commit is None else DOWNLOAD_BOTH_AGAIN

    def _check_naflex(self, config: SigLipVisionConfig) -> None:
        """Raise CheckpointError unless configuration and weights agree on NaFlex."""
        if config.naflex == self.match.layout.naflex:
            return
        kinds = {
            True: "a NaFlex encoder (siglip2)",
            False: "a fixed-size encoder (siglip)",
        }
        hint = ""
        for layout in LAYOUTS:
            candidate = Match(layout, self.match.prefix)
            if layout.model_types and candidate.has_shapes_of(self.match):
                hint = (
                    "if its code has a matrix in place of a convolution, pass "
                    f"layout={layout.name!r}; "
                )
        raise CheckpointError(
            f"{self._source.title}: {self._described_by} describes {kinds[config.naflex]}, but the "
            f"shape of the patch embedding is that of {kinds[self.match.layout.naflex]}; "
            f"{hint}{self._advice()}"
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

    def _read_pooling(self, config: SigLipVisionConfig, pooling_head: bool | None) -> Pooling:
        """Return how the checkpoint pools, and what stands behind its pooling.

        Args:
            config: Architecture of the files.
            pooling_head: The caller's choice.
        """
        layout, prefix = self.match
        pools = bool(self._head_keys) or config.mean_pooling
        projection = find_projection(layout, prefix, self.files.file_of, pools)
        if pools and not projection:
            projection = modules_behind_pooling(self._source)
        classifier = []
        for name in self.files.file_of:
            is_inner = name.startswith(prefix) and name not in projection
            if is_inner and layout.reason_to_ignore(name, prefix) == CLASSIFIER:
                classifier.append(name)
        return Pooling(bool(self._head_keys), tuple(projection), tuple(classifier), pooling_head)

    def _with_pooling(
        self, config: SigLipVisionConfig, pooling_head: bool | None
    ) -> SigLipVisionConfig:
        """Return the architecture with the pooling of the file, or as requested."""
        if pooling_head is not None:
            return replace(config, pooling_head=pooling_head, mean_pooling=False)
        if self._pooling.projection:
            return replace(config, pooling_head=False, mean_pooling=False)
        if config.mean_pooling or self._is_classifier():
            return replace(config, pooling_head=False, mean_pooling=True)
        return replace(config, pooling_head=bool(self._head_keys))

    def _is_classifier(self) -> bool:
        """Return whether the file has transformers' classifier, which pools by the mean."""
        layout, prefix = self.match
        name = f"{prefix.removesuffix(PREFIX)}classifier.weight"
        return layout.has_hf_config and name in self.files.file_of

    def _find_preprocessing(
        self, word: str | StoredProcessor | None, content: Mapping[str, Any]
    ) -> Preprocessing:
        """Return the preprocessing that the user states, or else that of the files."""
        title = self._source.title
        if word is not None:
            return from_word(self.config, word, title)
        stored = read_preprocessor_config(self._source)
        origins = self.files.metadata(ORIGIN)
        if self._source.commit is not None:
            origins = {self._source.name}
        origin = "".join(origins).partition("@")[0] if len(origins) == 1 else None
        clues = Clues(title, self.match.layout, stored, content, origin)
        return derive(self.config, clues)

    def _check_block_count(self, config: SigLipVisionConfig) -> None:
        """Raise CheckpointError if the number of blocks is impossible.

        A damaged file may give any number, and expanding the rules would take all memory.
        """
        count = config.num_encoder_blocks
        subject = f"{self._source.title}: {self._described_by} has {count} blocks"
        num_tensors = len(self.files.file_of)
        if not self.match.layout.is_stacked and count > num_tensors:
            raise CheckpointError(
                f"{subject}, but the weights have only {num_tensors} tensors; {self._advice()}"
            )
        if count > MAX_BLOCKS:
            raise CheckpointError(f"{subject}, limit is {MAX_BLOCKS}; {self._advice()}")

    # --- steps of `check` and `read` --------------------------------------------------------------

    def _describe(self, problems: list[Problem], headers: ReadHeaders) -> str:
        """Return the message of all problems, with their cause in front if it is known."""
        report = describe_problems(f"{self._source.title} (layout: {self.title})", problems)
        cause = diagnose(self._symptoms(headers))
        if cause is None:
            return f"{report}\nNothing was loaded; {self._advice()}."
        return f"{self._source.title}: {cause}\n{report}\nNothing was loaded."

    def _other_keys(self) -> OtherKeys:
        """Classify the stored tensors that are not the encoder's."""
        layout, prefix = self.match
        projection = set(self._pooling.projection)
        ignored: Counter[str] = Counter()
        unexpected = []
        for name in self.files.file_of.keys() - self.mappings.keys():
            reason = layout.reason_to_ignore(name, prefix)
            if name in self._head_keys:
                reason = "pooling head"
            if name in projection:
                reason = PROJECTION
            if reason is None:
                unexpected.append(name)
            else:
                ignored[reason] += 1
        for filename in self.files.group_by_file(self._listed()):
            ignored[NOT_IN_INDEX] += len(self.files.unlisted(filename))
        return OtherKeys(dict(sorted((+ignored).items())), unexpected)

    def _listed(self) -> list[str]:
        """Return the encoder's tensors that are in the files."""
        return [name for name in self.mappings if name in self.files.file_of]

    def _read_headers(self) -> ReadHeaders:
        """Read the headers of the encoder's files; other files need not exist."""
        stored: dict[str, TensorInfo] = {}
        problems: list[Problem] = []
        absent_files = []
        missing = [name for name in self.mappings if name not in self.files.file_of]
        groups = self.files.group_by_file(self._listed())
        for filename, names in groups.items():
            try:
                tensors = self.files.header(filename).tensors
            except CheckpointError as error:
                problems.append((f"{error}; unreadable tensors", names))
                if not isinstance(error, HubUnreachableError):
                    absent_files.append(filename)
                continue
            for name in names:
                if name in tensors:
                    stored[name] = tensors[name]
                else:
                    missing.append(name)
        return ReadHeaders(stored, missing, problems, absent_files)

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
