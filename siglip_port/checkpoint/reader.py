"""Reads a checkpoint, strictly, and writes one.

Headers first, then the tensors, mapped from the file.

Everything that is wrong with a checkpoint is collected from `config.json` and the safetensors
headers, before a single weight is read, and raised at once. What is then read is mapped from the
file (a private mapping: to change a weight never changes the file), so the weights are never in
memory twice.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from siglip_port import atomic
from siglip_port.checkpoint import layouts as key_map
from siglip_port.checkpoint import preprocessor_config as processors
from siglip_port.checkpoint import registry as architectures
from siglip_port.checkpoint.formats import (
    DTYPES,
    LONGEST_JSON,
    MOST_UNPACKED,
    PICKLES_REFUSED,
    SUFFIXES,
    Header,
    Stored,
    UnreadableFileError,
    open_tensors,
    parse_json,
    read_header,
)
from siglip_port.checkpoint.hf_config import UnknownModelError
from siglip_port.config import SigLipVisionConfig
from siglip_port.text import fold_blocks

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
OPEN_CLIP_CONFIG = "open_clip_config.json"
WEIGHTS_FILES = (WEIGHTS, INDEX, "open_clip_model.safetensors")

ORIGIN = "origin"  # in the metadata of files written here: see `Provenance.origin`
FINGERPRINT = (
    "siglip_port_config"  # likewise: of the configuration that belongs to them, see `fingerprint`
)

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))

_NAMES_SHOWN = 40  # of one kind of problem; the 27 rows of a whole tower fit

_BOTH_AGAIN = f"fetch the weights and {CONFIG} again, both from the same place and the same commit"

_NOT_SIGLIP = "this is not the configuration of a SigLIP vision tower that can be loaded; if it is wrong, pass config="

log = logging.getLogger(__name__)

_MOST_BLOCKS = 1000  # of a tower; the largest that are published have 40
# places in a checkpoint whose names may mean a tower; to look at one may mean to fetch a header
_MOST_TOWERS = 100

_AT_ONCE = 1 << 24  # elements: what is looked at for NaN and infinity at once


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded.

    The message says what was expected, what was found, and what to do.
    """


class HubUnreachableError(CheckpointError):
    """A file is not in the local cache, and the Hub could not be reached, or was not to be asked."""


class SeveralTowersError(CheckpointError):
    """A file holds more than one vision tower, or one that matches several layouts.

    Attributes:
        towers: layout and prefix of each.
    """

    def __init__(self, message: str, towers: list[tuple[key_map.Layout, str]]) -> None:
        super().__init__(message)
        self.towers = towers


class Source(Protocol):
    """Something that holds the files of one checkpoint: see `siglip_port.hub`.

    Attributes:
        name: what the user called it, for provenance.
        title: the same for messages: with the revision, where one was asked for.
        weights: the name of the weights file, where the user named it; else None.
    """

    name: str
    weights: str | None

    @property
    def title(self) -> str:
        """What messages call it."""

    @property
    def commit(self) -> str | None:
        """The commit of a Hub repository, once its first file has been fetched; else None."""

    def get(self, filename: str) -> Path | None:
        """Returns where the file lies on this machine, or None where the source does not hold it."""

    def header(self, filename: str) -> Header | None:
        """Reads which tensors a weights file holds.

        None where the source does not hold the file.
        """

    def local(self, filename: str) -> Path | None:
        """Returns where the file lies on this machine, if it does already."""

    def fetch(self, wanted: Mapping[str, Collection[str]]) -> dict[str, Path]:
        """Makes tensors available: names by weights file.

        Returns, by weights file, a file that holds them.
        """

    def listing(self) -> list[str]:
        """Returns the names of the files that the source holds, as far as it can tell.

        For messages.
        """


@dataclass(frozen=True)
class Provenance:
    """Where a model's weights come from, and what was made of the file. `print` it.

    Attributes:
        source: the Hub id or path that was asked for.
        commit: the Hub commit, or None for a local path.
        files: the files that were read.
        layout: the layout that was recognised.
        tensors_read: number of stored tensors that make up the tower.
        bytes_read: their size in the files.
        bytes_whole: the size of all weights files, as far as the source tells.
        dropped: number of stored tensors left unread, by reason.
        stored_dtypes: the dtypes of the tower's tensors in the file.
        dtype: the dtype they were loaded in.
        origin: the Hub id and commit of the weights, `name@commit`; of a local file, where a file
            that was written here says so; else None.
    """

    source: str
    commit: str | None
    files: tuple[Path, ...]
    layout: str
    tensors_read: int
    bytes_read: int
    bytes_whole: int
    dropped: Mapping[str, int]
    stored_dtypes: tuple[torch.dtype, ...]
    dtype: torch.dtype
    origin: str | None

    def __str__(self) -> str:
        dropped = "; ".join(f"{count} of the {reason}" for reason, count in self.dropped.items())
        unit, name = next((u, n) for u, n in _UNITS if self.bytes_whole >= u or n == "kB")
        read = f"{self.bytes_read / unit:.2f} of {self.bytes_whole / unit:.2f} {name}, {self.tensors_read} tensors"
        origin = "" if self.commit or not self.origin else f", made from {self.origin}"
        stored = ", ".join(map(str, self.stored_dtypes))
        return "\n".join(
            (
                f"source   {self.source}"
                + (f" at commit {self.commit}" if self.commit else origin),
                f"files    {', '.join(path.name for path in self.files)}",
                f"layout   {self.layout}",
                f"read     {read}",
                f"dropped  {dropped or 'nothing'}",
                f"dtype    {self.dtype}"
                + (f" (stored: {stored})" if stored != str(self.dtype) else ""),
            )
        )


class Checkpoint:
    """A checkpoint whose configuration and headers have been looked at.

    Its weights have not been read.

    Args:
        source: where its files come from.
        pooling_head: None to keep the pooling head if there is one, True to demand it, False to
            leave it out.
        layout: the name of one of `siglip_port.checkpoint.layouts.LAYOUTS`; None to recognise it.
        prefix: what stands before the names of the tower; None to find it.
        config: the architecture, instead of what the checkpoint says of it.

    Attributes:
        config: the architecture. It has a pooling head where the file holds one and it is not left
            out.
        layout: the layout that was recognised.
        prefix: what stands before the names of the tower.
        processor: the contents of the `preprocessor_config.json` that belongs to the tower.

    Raises:
        CheckpointError: there is no such checkpoint, or it does not hold a SigLIP vision tower.
        SeveralTowersError: it holds several, and neither layout nor prefix tells which is meant.
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
        self._headers: dict[str, Header] = {}  # by file
        self._bytes_told = 0  # of all shards, by their index
        contents = None
        try:
            contents = read_contents(source)
        except CheckpointError:
            if config is None:
                raise
        self._file_of = (
            self._find_tensors()
        )  # the name of every stored tensor -> the name of its file
        self.layout, self.prefix = self._recognise(layout, prefix)
        if contents is not None and not self.layout.described:
            with contextlib.suppress(
                HubUnreachableError
            ):  # open_clip's may lie beside one that says nothing
                contents = {**(read_contents(source, (OPEN_CLIP_CONFIG,)) or {}), **contents}
        self._told_by = CONFIG if config is None and self.layout.described else "the architecture"
        by_files = config is None
        config = config or self._configure(contents)
        self._by_files = config if by_files else None
        if config.naflex != self.layout.naflex:
            kinds = {
                True: "a NaFlex tower (siglip2)",
                False: "a tower for pictures of one size (siglip)",
            }
            raise CheckpointError(
                f"{source.title}: {self._told_by} describes {kinds[config.naflex]}, but the shape "
                "of the patch "
                f"embedding is that of {kinds[self.layout.naflex]}; {_BOTH_AGAIN}"
            )

        head = self.layout.claims(0, self.layout.head, self.prefix).keys() & self._file_of.keys()
        if pooling_head and not head:
            raise CheckpointError(
                f"{source.title} holds no pooling head, which pooling_head=True demands; load it "
                "without, for tokens"
            )
        keep_head = bool(head) if pooling_head is None else pooling_head
        self._left_out = set() if keep_head else head
        self.config = replace(
            config,
            pooling_head=keep_head,
            mean_pooling=config.mean_pooling and pooling_head is None and not head,
        )
        self.processor = processors.derive(
            self.config, read_processor(source), contents or {}, source.name
        )

        # Before all blocks are spelled out, since in a damaged file this number may be of any size.
        if not self.layout.stacked and config.num_encoder_blocks > len(self._file_of):
            raise CheckpointError(
                f"{source.title}: {self._told_by} asks for {config.num_encoder_blocks} blocks, but "
                "the weights have "
                f"only {len(self._file_of)} tensors; {_BOTH_AGAIN}"
            )
        if config.num_encoder_blocks > _MOST_BLOCKS:
            raise CheckpointError(
                f"{source.title}: {self._told_by} asks for {config.num_encoder_blocks} blocks, and "
                "no tower has more "
                f"than {_MOST_BLOCKS}; {_BOTH_AGAIN}"
            )
        self._claims = self.layout.claims(
            config.num_encoder_blocks, self.layout.rows(keep_head), self.prefix
        )

    @property
    def claims(self) -> Mapping[str, key_map.Claim]:
        """Every stored tensor of the tower: its name in the file -> what of ours it holds."""
        return self._claims

    @property
    def title(self) -> str:
        """The layout and the prefix, for people."""
        return f"{self.layout.title}, " + (
            f"prefix {self.prefix.rstrip('./')}" if self.prefix else "no prefix"
        )

    @property
    def towers(self) -> list[tuple[key_map.Layout, str]]:
        """Layout and prefix of every tower that the file holds, whichever this checkpoint has taken.

        Only of the one taken, where they are too many.
        """
        with contextlib.suppress(CheckpointError):
            if found := self._candidates(key_map.LAYOUTS, None)[0]:
                return found
        return [(self.layout, self.prefix)]

    def headers(self) -> dict[str, Header | None]:
        """Reads the headers of all weights files.

        By the name of the file, None where it is not there or damaged.
        """
        headers: dict[str, Header | None] = {}
        for filename in dict.fromkeys(self._file_of.values()):
            headers[filename] = None
            with contextlib.suppress(CheckpointError):
                headers[filename] = self._header(filename)
        return headers

    def check(self, shapes: Mapping[str, torch.Size]) -> dict[str, Stored]:
        """Checks the headers against the model.

        Args:
            shapes: our names of all the model's tensors, with the shape of each.

        Returns:
            Every stored tensor of the tower, by its name in the file.

        Raises:
            CheckpointError: a tensor is missing, unknown, of the wrong shape or of an unusable
                dtype; it names all.
        """
        _, unknown = self._sort_out_the_rest()
        stored, problems = self._read_headers()
        problems += self._check(stored, shapes)
        if unknown:
            problems.append(
                ("unknown tensors, which no row of the key map claims or drops", unknown)
            )
        if problems:
            what = f"{self._source.title} (layout: {self.title})"
            raise CheckpointError(f"{_report(what, problems)}\nNothing was loaded; {_BOTH_AGAIN}.")
        self._refuse_other_weights()  # last, since all else says more
        return stored

    def read(
        self,
        shapes: Mapping[str, torch.Size],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> tuple[dict[str, torch.Tensor], Provenance]:
        """Checks the headers against the model, then reads its tensors, and only these.

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
        stored_dtypes = tuple(dict.fromkeys(DTYPES[tensor.dtype] for tensor in stored.values()))
        dtype = dtype or functools.reduce(torch.promote_types, stored_dtypes)
        wanted = self._by_file(stored)
        paths = self._source.fetch(wanted)
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in self._read(wanted, paths):
            ours = self._claims[name].ours
            parts = self._claims[name].from_stored(tensor, [shapes[our] for our in ours])
            parts = tuple(part.contiguous() for part in parts)
            tensors |= {our: part.to(device, dtype) for our, part in zip(ours, parts, strict=True)}
        return tensors, Provenance(
            source=self._source.name,
            commit=self._source.commit,
            files=tuple(dict.fromkeys(paths[filename] for filename in wanted)),
            layout=self.title,
            tensors_read=len(stored),
            bytes_read=sum(tensor.nbytes for tensor in stored.values()),
            bytes_whole=max(
                self._bytes_told, sum(self._header(filename).size for filename in wanted)
            ),
            dropped=self.dropped,
            stored_dtypes=stored_dtypes,
            dtype=dtype,
            origin=self._origin(wanted),
        )

    def count_not_finite(self, stored: Collection[str]) -> dict[str, tuple[int, int]] | None:
        """Reads tensors, one after the other, and counts what is NaN or infinite in each.

        Args:
            stored: their names in the file.

        Returns:
            By name, the number of NaN and of infinite elements; None where the files are not on
            this machine.

        Raises:
            CheckpointError: a tensor is damaged.
        """
        wanted = self._by_file(stored)
        paths = {
            filename: path
            for filename in wanted
            if (path := self._source.local(filename)) is not None
        }
        if len(paths) < len(wanted):
            return None
        counts = {}
        for name, tensor in self._read(wanted, paths):
            parts = torch.split(
                tensor.reshape(-1), _AT_ONCE
            )  # so that a mapped tensor is never in memory as a whole
            counts[name] = (
                sum(int(p.isnan().sum()) for p in parts),
                sum(int(p.isinf().sum()) for p in parts),
            )
        return counts

    def _by_file(self, stored: Collection[str]) -> dict[str, list[str]]:
        wanted: dict[str, list[str]] = {}
        for name in stored:
            wanted.setdefault(self._file_of[name], []).append(name)
        return wanted

    def _read(
        self, wanted: Mapping[str, Collection[str]], paths: Mapping[str, Path]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Reads stored tensors: names by weights file, from the files that hold them."""
        for filename, names in wanted.items():
            path, header = paths[filename], self._header(filename)
            if (
                unpacked := sum(header.tensors[name].nbytes for name in names)
            ) > MOST_UNPACKED * header.size:
                raise CheckpointError(
                    f"{path} has {header.size} bytes, and its tower would have {unpacked}: more "
                    f"than {MOST_UNPACKED} "
                    "times as many, which no weights have. Nothing was loaded; where you trust it, "
                    "unpack it yourself"
                )
            with open_tensors(path) as get_tensor:
                for name in names:
                    try:
                        yield name, get_tensor(name)
                    except UnreadableFileError as error:
                        raise CheckpointError(
                            f"{path}: {name} is damaged ({error}); fetch the file again"
                        ) from error

    def _origin(self, filenames: Iterable[str]) -> str | None:
        """Where the weights were fetched from, or where their file says that they were when it was made."""
        if self._source.commit is not None:
            return f"{self._source.name}@{self._source.commit}"
        told = {self._header(filename).metadata.get(ORIGIN, "") for filename in filenames}
        origin = told.pop() if len(told) == 1 else ""
        return (
            origin if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+@[0-9a-f]{40}", origin, re.ASCII) else None
        )

    @property
    def dropped(self) -> dict[str, int]:
        """The number of stored tensors that are not the tower's, by the reason for which they are left unread."""
        return self._sort_out_the_rest()[0]

    def _find_tensors(self) -> dict[str, str]:
        source = self._source
        if source.weights is not None:
            return dict.fromkeys(self._header(source.weights).tensors, source.weights)
        not_cached: HubUnreachableError | None = None
        for filename in WEIGHTS_FILES:
            try:
                if filename == INDEX:
                    if (path := source.get(filename)) is not None:
                        files, self._bytes_told = _read_index(path)
                        return files
                elif (header := source.header(filename)) is not None:
                    self._headers[filename] = header
                    return dict.fromkeys(header.tensors, filename)
            except (
                HubUnreachableError
            ) as error:  # Offline, a cache tells what it has, not what the repository has.
                not_cached = not_cached or error
        if not_cached is not None:
            raise not_cached
        found = source.listing()
        raise CheckpointError(
            f"{source.title} holds neither {WEIGHTS} nor {INDEX}; found: "
            f"{', '.join(found) or 'nothing'}"
            + pickle_advice(found)
            + "".join(f"; pass the file {name} itself" for name in found if name.endswith(SUFFIXES))
        )

    def _recognise(self, name: str | None, prefix: str | None) -> tuple[key_map.Layout, str]:
        """Finds the one layout and prefix whose rule the names and shapes meet."""
        layouts = [layout for layout in key_map.LAYOUTS if name in (None, layout.name)]
        if not layouts:
            known = ", ".join(layout.name for layout in key_map.LAYOUTS)
            raise ValueError(f"layout must be None or one of {known}, got {name!r}")
        if prefix and prefix[-1] not in "./":  # as messages show it
            prefix += "/" if name and name.startswith("big_vision") else "."
        if name is not None and prefix is not None:
            weight = self._stored(prefix + layouts[0].marks[0])
            if weight is not None and not layouts[0].fits(weight.shape):
                raise CheckpointError(
                    f"{self._source.title}: the patch embedding has the shape "
                    f"{list(weight.shape)}, which it cannot "
                    f"have in the layout {name!r}; leave layout= out"
                )
            return layouts[0], prefix
        found, refused = self._candidates(layouts, prefix)
        if len(found) == 1:
            return found[0]
        if found:
            which = "; ".join(
                f"layout={layout.name!r}, prefix={place!r}" for layout, place in found
            )
            raise SeveralTowersError(
                f"{self._source.title} holds more than one vision tower, or one that matches "
                f"several layouts: {which}; "
                "say which by layout= and prefix=",
                found,
            )
        groups = Counter(re.split(r"[./]", name)[0] for name in self._file_of)
        raise CheckpointError(
            f"{self._source.title} holds no SigLIP vision tower in a layout that is known here "
            f"({', '.join(layout.name for layout in layouts)})"
            + ("" if prefix is None else f" behind the prefix {prefix!r}")
            + "; its tensors begin with: "
            + ", ".join(f"{group} ({count})" for group, count in groups.most_common(12))
            + "".join(f"; refused: {what}" for what in refused)
        )

    def _candidates(
        self, layouts: Iterable[key_map.Layout], prefix: str | None
    ) -> tuple[list[tuple[key_map.Layout, str]], list[str]]:
        """Finds all layouts and prefixes whose rule the names and shapes meet, and says why others are refused."""
        found: list[tuple[key_map.Layout, str]] = []
        refused = []
        for layout in layouts:
            places = [
                p
                for p in layout.prefixes(self._file_of)
                if prefix is None or p.rstrip("./") == prefix.rstrip("./")
            ]
            if len(places) > _MOST_TOWERS:
                raise CheckpointError(
                    f"{self._source.name} names {len(places)} towers in the layout "
                    f"{layout.name!r}, more than the "
                    f"{_MOST_TOWERS} that are looked at; say which is meant by prefix="
                )
            for place in places:
                weight = self._stored(place + layout.marks[0])
                if weight is not None and not layout.fits(weight.shape):
                    continue
                if weight is None and any(place == other for _, other in found):
                    # A damaged file, whose shape cannot tell: the first that fits has to do.
                    continue
                if reasons := [
                    why for other, why in layout.never if place + other in self._file_of
                ]:
                    refused.append(f"{place or 'no prefix'} ({layout.title}): it has {reasons[0]}")
                    continue
                found.append((layout, place))
        if not found and not refused and (layout := key_map.HUGGINGFACE) in layouts:
            # A damaged file that has lost what it is recognised by, in the commonest places: to say
            # what is missing.
            names, places = (
                self._file_of.keys(),
                [p for p in ("", key_map.PREFIX) if prefix in (None, p)],
            )
            found = [
                (layout, place)
                for place in places
                if layout.claims(1, layout.rows(True), place).keys() & names
            ]
        return found, refused

    def _configure(self, contents: Mapping[str, Any] | None) -> SigLipVisionConfig:
        """Takes the architecture from transformers' configuration, or from shapes and whatever else tells."""
        source, refusal = self._source.title, None
        if self.layout.described:
            if contents is None:
                raise CheckpointError(
                    f"{source} has no {CONFIG}, which says what the tensors mean; put the "
                    "checkpoint's own beside "
                    "the weights, or pass config="
                )
            try:
                return SigLipVisionConfig.from_hf(contents)
            except UnknownModelError as error:
                refusal = error  # It may name its tower, as the first LLaVAs' do.
            except ValueError as error:
                raise CheckpointError(f"{source}: {error}; {_NOT_SIGLIP}") from error
        names = (name for name in self._file_of if name.startswith(self.prefix))
        shapes = {
            name: stored.shape for name in names if (stored := self._stored(name)) is not None
        }
        try:
            return architectures.describe(
                self.layout, self.layout.sizes(shapes, self.prefix), contents or {}
            )
        except ValueError as error:
            if refusal is not None:
                raise CheckpointError(f"{source}: {refusal}; {_NOT_SIGLIP}") from error
            raise CheckpointError(f"{source} (layout: {self.title}): {error}") from error

    def _refuse_other_weights(self) -> None:
        """Where files written here say which configuration belongs to them, it must be the one that was found."""
        told = {header.metadata.get(FINGERPRINT) for header in self._headers.values()} - {None}
        if self._by_files is not None and told - {fingerprint(self._by_files)}:
            raise CheckpointError(
                f"{self._source.title}: the configuration is not the one that these weights were "
                "saved with: saving "
                "was interrupted between the files, or one of them was changed since; save or "
                "fetch both again, or, if "
                "it is right, pass it: config=SigLipVisionConfig(...)"
            )

    def _sort_out_the_rest(self) -> tuple[dict[str, int], list[str]]:
        """Splits what is not the tower's into what is dropped, counted by reason, and what is unknown."""
        dropped: Counter[str] = Counter()
        unknown = []
        for name in self._file_of.keys() - self._claims.keys():
            left_out = name in self._left_out
            reason = (
                "pooling head, left out"
                if left_out
                else self.layout.reason_to_drop(name, self.prefix)
            )
            if reason is None:
                unknown.append(name)
            else:
                dropped[reason] += 1
        return dict(sorted(dropped.items())), unknown

    def _read_headers(self) -> tuple[dict[str, Stored], list[tuple[str, list[str]]]]:
        """Reads the headers of the files that hold the tower.

        Of the others, none is opened, or even needed.
        """
        stored: dict[str, Stored] = {}
        missing = [name for name in self._claims if name not in self._file_of]
        problems = []
        for filename in dict.fromkeys(
            self._file_of[name] for name in self._claims if name in self._file_of
        ):
            expected = [name for name in self._claims if self._file_of.get(name) == filename]
            try:
                header = self._header(filename).tensors
            except CheckpointError as error:
                problems.append((f"{error}, so these cannot be read", expected))
                continue
            stored |= {name: header[name] for name in expected if name in header}
            missing += [name for name in expected if name not in header]
            if astray := [name for name in header if self._file_of.get(name) != filename]:
                problems.append(
                    (f"tensors in {filename} that the index does not place there", astray)
                )
        if missing:
            problems.insert(0, ("missing tensors", missing))
        return stored, problems

    def _check(
        self, stored: Mapping[str, Stored], shapes: Mapping[str, torch.Size]
    ) -> list[tuple[str, list[str]]]:
        problems: dict[str, list[str]] = {}
        for name, tensor in stored.items():
            claim = self._claims[name]
            expected = claim.stored_shape(
                [shapes[our] for our in claim.ours], self.config.num_attention_heads
            )
            if tensor.shape != expected:
                what = f"shape: expected {list(expected)} by {self._told_by}, found {list(tensor.shape)}"
                problems.setdefault(what, []).append(name)
            if tensor.dtype not in DTYPES:
                what = f"dtype: expected one of {', '.join(DTYPES)}, found {tensor.dtype}"
                problems.setdefault(what, []).append(name)
        return list(problems.items())

    def _header(self, filename: str) -> Header:
        if filename not in self._headers:
            header = self._source.header(filename)
            if header is None:
                raise CheckpointError(f"{self._source.title} has no file {filename}")
            self._headers[filename] = header
        return self._headers[filename]

    def _stored(self, name: str) -> Stored | None:
        """The header of one tensor.

        None where there is none, or it cannot be read, which is found out again later.
        """
        with contextlib.suppress(CheckpointError):
            return (
                self._header(self._file_of[name]).tensors.get(name)
                if name in self._file_of
                else None
            )
        return None


def read_contents(
    source: Source, filenames: Iterable[str] = (CONFIG, OPEN_CLIP_CONFIG)
) -> dict[str, Any] | None:
    """Reads the checkpoint's configuration, or open_clip's, as it is; None where there is neither.

    Raises:
        CheckpointError: it is not readable.
        HubUnreachableError: neither is cached, and there may be one.
    """
    not_cached: HubUnreachableError | None = None
    for filename in filenames:
        try:
            path = source.get(filename)
        except HubUnreachableError as error:
            not_cached = not_cached or error
            continue
        if path is not None:
            return _read_json(path)
    if not_cached is not None:
        raise not_cached
    return None


def read_processor(source: Source) -> dict[str, Any] | None:
    """Reads how the checkpoint's pictures are made; None where no file tells, or none is cached.

    Raises:
        CheckpointError: the file is not readable.
    """
    unreachable: HubUnreachableError | None = None
    for filename in (processors.PROCESSOR, processors.PREPROCESSOR):  # as transformers 5 reads them
        try:
            path = source.get(filename)
        except HubUnreachableError as error:
            unreachable = unreachable or error
            continue
        if path is not None:
            document = _read_json(path)
            processor = (
                document if filename == processors.PREPROCESSOR else document.get("image_processor")
            )
            if isinstance(processor, dict):
                return processor
    if unreachable is not None:  # The tower can do without.
        log.warning(
            "how pictures are prepared is not known, so it is as SigLIP's towers are: %s",
            unreachable,
        )
    return None


def save(
    folder: str | os.PathLike[str],
    layout: key_map.Layout,
    prefix: str,
    config: SigLipVisionConfig,
    tensors: Mapping[str, torch.Tensor],
    shapes: Mapping[str, torch.Size],
    documents: Mapping[str, Mapping[str, Any]],
    origin: str | None = None,
) -> None:
    """Writes a checkpoint, each file whole or not at all.

    Args:
        folder: where to; made if it does not exist. `model.safetensors` and the documents in it are
            replaced.
        layout: how tensors are to be stored.
        prefix: what to put before their names.
        config: the architecture.
        tensors: our names with the tensors.
        shapes: our names of all that the architecture has, with the shape of each.
        documents: names and contents of the JSON files that go with them.
        origin: where the weights come from, if from the Hub: see `Provenance.origin`.

    Raises:
        CheckpointError: the tensors are not those of the architecture, or the folder cannot be
            written.
    """
    # Quantised modules keep other things among their state than tensors; all of it is unknown here.
    other = sorted(name for name, value in tensors.items() if not isinstance(value, torch.Tensor))
    tensors = {name: tensor for name, tensor in tensors.items() if name not in other}
    problems = {
        "missing tensors": sorted(shapes.keys() - tensors.keys()),
        "unknown tensors": sorted([*(tensors.keys() - shapes.keys()), *other]),
        "another shape than the configuration says": [
            n for n in shapes if n in tensors and tensors[n].shape != shapes[n]
        ],
        "a dtype or device that cannot be saved": [
            name
            for name, tensor in tensors.items()
            if tensor.dtype not in DTYPES.values() or tensor.is_meta
        ],
        # A subclass of torch's Tensor: FSDP's DTensor, say, of which every process holds a part.
        "sharded or quantised; to be gathered or dequantised first": [
            name
            for name, tensor in tensors.items()
            if type(tensor) not in (torch.Tensor, torch.nn.Parameter)
        ],
    }
    if found := [(what, names) for what, names in problems.items() if names]:
        raise CheckpointError(_report("the model to be saved", found))
    if not isinstance(folder, (str, os.PathLike)) or not os.fspath(folder):
        raise CheckpointError(f"the checkpoint needs a folder to be written to, got {folder!r}")
    rows = layout.rows(config.pooling_head)
    stored = layout.to_stored(
        tensors, config.num_encoder_blocks, config.num_attention_heads, rows, prefix
    )
    try:
        # Beside their places and then moved there: a reader sees the old files or the new ones,
        # never a part, and a model that is mapped from the old file keeps it.
        with atomic.staging_dir(Path(folder)) as unfinished:
            weights, *others = (unfinished / name for name in (WEIGHTS, *documents))
            save_file(
                {name: tensor.detach().cpu().contiguous() for name, tensor in stored.items()},
                weights,
                # without its format, transformers 4.40 cannot read the file
                metadata={"format": "pt", FINGERPRINT: fingerprint(config)}
                | ({} if origin is None else {ORIGIN: origin}),
            )
            _sort_metadata(weights)
            for file in others:
                content = dict(documents[file.name])
                if file.name == CONFIG and layout.described:
                    dtype = functools.reduce(
                        torch.promote_types, {tensor.dtype for tensor in stored.values()}
                    )
                    content["dtype"] = str(dtype).removeprefix("torch.")
                file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            weights.chmod(
                others[0].stat().st_mode
            )  # safetensors hides its files from everybody else
            atomic.commit_files((weights, *others), Path(folder))
    except (OSError, SafetensorError, TypeError) as error:  # TypeError: a document that is no JSON
        raise CheckpointError(
            f"the checkpoint could not be written to {os.fspath(folder)}: {error}"
        ) from error


def _sort_metadata(path: Path) -> None:
    """Puts the metadata of a safetensors file in order, which the library writes in another one each time."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(
            json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        )


def fingerprint(config: SigLipVisionConfig) -> str:
    """A hash of all that a configuration says of what its tower computes.

    Not of what no file says (`interpolation`), of what the tensors say better (`pooling_head`), of
    the dropout, which timm does not store, nor of pixels at the edge of a NaFlex tower's picture.
    """
    told = asdict(replace(config, interpolation=None, pooling_head=False, attention_dropout=0.0))
    if config.naflex:
        told["image_size"] = config.grid_size * config.patch_size
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def pickle_advice(filenames: Iterable[str]) -> str:
    """Says why pickled weights are refused and what to do, where there are any among the files.

    Else nothing.
    """
    pickles = [name for name in filenames if name.endswith(PICKLE_SUFFIXES)]
    if not pickles:
        return ""
    return f". Pickled weights ({', '.join(pickles)}) are refused: {PICKLES_REFUSED}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if (size := path.stat().st_size) > LONGEST_JSON:
            raise ValueError(f"it has {size} bytes, and at most {LONGEST_JSON} are read")
        content = parse_json(path.read_bytes().removeprefix(codecs.BOM_UTF8))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} must hold a JSON object, found a {type(content).__name__}; fetch it again"
        )
    return content


def _read_index(path: Path) -> tuple[dict[str, str], int]:
    """Reads which shard holds which tensor, and how many bytes all have together.

    0 where the index does not tell.

    A shard is a file beside the index, by its plain name: no path leads elsewhere. It may be a
    link, as all files of the Hub's cache are: what a link leads to is up to whoever made the
    folder, not to the index.
    """
    content = _read_json(path)
    files, metadata = content.get("weight_map"), content.get("metadata")
    told = metadata.get("total_size") if isinstance(metadata, dict) else None
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise CheckpointError(
            f"{path} has no usable weight_map (tensor name -> file name); fetch it again"
        )
    if bad := sorted(
        {file for file in files.values() if not re.fullmatch(r"[\w.-]+\.safetensors", file)}
    ):
        raise CheckpointError(
            f"{path} names shards that are no plain .safetensors file names: {', '.join(bad[:5])}"
            + pickle_advice(bad)
        )
    return files, told if isinstance(told, int) and not isinstance(
        told, bool
    ) and 0 < told < 1e15 else 0


def header_of(path: Path) -> Header:
    """Reads which tensors a weights file holds.

    Raises:
        CheckpointError: it cannot be read, or is damaged.
    """
    try:
        return read_header(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except UnreadableFileError as error:
        kind = path.suffix.removeprefix(".")
        raise CheckpointError(
            f"{path} is not a whole {kind} file ({error}); {error.advice}"
        ) from error


def _report(what: str, problems: list[tuple[str, list[str]]]) -> str:
    """One message for all that is wrong: what, how many, and their names, folded by block."""
    lines = [f"{what} does not hold the tower that its configuration describes"]
    for problem, names in problems:
        lines.append(f"  {problem} ({len(names)}):")
        folded = fold_blocks(sorted(names))
        lines += [f"    {name}" for name in folded[:_NAMES_SHOWN]]
        if len(folded) > _NAMES_SHOWN:
            lines.append(f"    ... and {len(folded) - _NAMES_SHOWN} more")
    return "\n".join(lines)
