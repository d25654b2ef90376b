"""Reads a checkpoint, strictly, and writes one: headers first, then the tensors, mapped from the file.

Everything that is wrong with a checkpoint is collected from `config.json` and the safetensors headers, before a
single weight is read, and raised at once. What is then read is mapped from the file (a private mapping: to
change a weight never changes the file), so the weights are never in memory twice.
"""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from siglip_port import key_map
from siglip_port.config import SigLipVisionConfig

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

_NAMES_SHOWN = 40  # of one kind of problem; the 27 rows of a whole tower fit

_BOTH_AGAIN = f"fetch the weights and {CONFIG} again, both from the same place and the same commit"

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes a tower may be stored and loaded in, by their names in a safetensors header."""


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded. The message says what was expected, what was found, and what to do."""


class Source(Protocol):
    """Something that holds the files of one checkpoint: see `siglip_port.hub`.

    Attributes:
        name: what the user called it, for messages and provenance.
        commit: the commit of a Hub repository, once its first file has been fetched; else None.
        weights: the name of the weights file, where the user named it; else None.
    """

    name: str
    commit: str | None
    weights: str | None

    def get(self, filename: str) -> Path | None:
        """Returns where the file lies on this machine, or None where the source does not hold it."""

    def listing(self) -> list[str]:
        """Returns the names of the files that the source holds, as far as it can tell; for messages."""


@dataclass(frozen=True)
class Provenance:
    """Where a model's weights come from, and what was made of the file. `print` it.

    Attributes:
        source: the Hub id or path that was asked for.
        commit: the Hub commit, or None for a local path.
        files: the files that were read.
        layout: the layout that was recognised.
        tensors_read: number of stored tensors that make up the tower.
        bytes_read: their size in the file.
        dropped: number of stored tensors left unread, by reason.
        stored_dtypes: the dtypes of the tower's tensors in the file.
        dtype: the dtype they were loaded in.
    """

    source: str
    commit: str | None
    files: tuple[Path, ...]
    layout: str
    tensors_read: int
    bytes_read: int
    dropped: Mapping[str, int]
    stored_dtypes: tuple[torch.dtype, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        dropped = "; ".join(f"{count} of the {reason}" for reason, count in self.dropped.items())
        stored = ", ".join(map(str, self.stored_dtypes))
        return "\n".join(
            (
                f"source   {self.source}" + (f" at commit {self.commit}" if self.commit else ""),
                f"files    {', '.join(path.name for path in self.files)}",
                f"layout   {self.layout}",
                f"read     {self.tensors_read} tensors, {self.bytes_read / 1e6:.1f} MB",
                f"dropped  {dropped or 'nothing'}",
                f"dtype    {self.dtype}" + (f" (stored: {stored})" if stored != str(self.dtype) else ""),
            )
        )


@dataclass(frozen=True)
class _Stored:
    """A tensor as the header of its file describes it."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """A checkpoint whose configuration and tensor names have been read; its weights have not.

    Args:
        source: where its files come from.
        pooling_head: None to keep the pooling head if there is one, True to demand it, False to leave it out.

    Attributes:
        config: the architecture. It has a pooling head where the file holds one and it is not left out.
        layout: the layout that was recognised.

    Raises:
        CheckpointError: there is no such checkpoint, or it does not hold a SigLIP vision tower.
    """

    def __init__(self, source: Source, *, pooling_head: bool | None = None) -> None:
        self._source = source
        config = read_config(source)
        self._file_of = self._find_tensors()  # the name of every stored tensor -> the name of its file
        self.layout = self._recognise()

        head = self.layout.claims(0, key_map.HEAD).keys() & self._file_of.keys()
        if pooling_head and not head:
            raise CheckpointError(
                f"{source.name} holds no pooling head, which pooling_head=True demands; load it without, for tokens"
            )
        keep_head = bool(head) if pooling_head is None else pooling_head
        self._left_out = set() if keep_head else head
        self.config = replace(config, pooling_head=keep_head)

        # Before all blocks are spelled out, since in a damaged file this number may be of any size.
        if config.num_encoder_blocks > len(self._file_of):
            raise CheckpointError(
                f"{source.name}: {CONFIG} asks for {config.num_encoder_blocks} blocks, but the weights have only "
                f"{len(self._file_of)} tensors; {_BOTH_AGAIN}"
            )
        rows = key_map.TOWER + (key_map.HEAD if keep_head else ())
        self._claims = self.layout.claims(config.num_encoder_blocks, rows)

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
            dtype: None for the dtype of the file; where its tensors differ, the one that holds them all exactly.
            device: None for the CPU, where tensors of the file's own dtype are mapped, not copied.

        Returns:
            Our names with the tensors, and where they come from.

        Raises:
            CheckpointError: a tensor is missing, unknown, of the wrong shape or of an unusable dtype; it names all.
        """
        dropped, unknown = self._sort_out_the_rest()
        stored, problems = self._read_headers()
        problems += self._check(stored, shapes)
        if unknown:
            problems.append(("unknown tensors, which no row of the key map claims or drops", unknown))
        if problems:
            what = f"{self._source.name} (layout: {self.layout.name})"
            raise CheckpointError(f"{_report(what, problems)}\nNothing was loaded; {_BOTH_AGAIN}.")

        stored_dtypes = tuple(dict.fromkeys(DTYPES[tensor.dtype] for tensor in stored.values()))
        dtype = dtype or functools.reduce(torch.promote_types, stored_dtypes)
        tensors: dict[str, torch.Tensor] = {}
        bytes_read = 0
        for path in (paths := tuple(dict.fromkeys(tensor.path for tensor in stored.values()))):
            with safe_open(path, framework="pt") as file:
                for name in (name for name, tensor in stored.items() if tensor.path == path):
                    tensor, ours = file.get_tensor(name), self._claims[name]
                    bytes_read += tensor.nbytes
                    parts = key_map.split(tensor, len(ours))
                    tensors |= {our: part.to(device, dtype) for our, part in zip(ours, parts, strict=True)}
        return tensors, Provenance(
            source=self._source.name,
            commit=self._source.commit,
            files=paths,
            layout=self.layout.name,
            tensors_read=len(stored),
            bytes_read=bytes_read,
            dropped=dropped,
            stored_dtypes=stored_dtypes,
            dtype=dtype,
        )

    def _find_tensors(self) -> dict[str, str]:
        source = self._source
        if source.weights is not None:
            return dict.fromkeys(_read_header(self._fetch(source.weights)), source.weights)
        not_cached: CheckpointError | None = None
        for filename in (WEIGHTS, INDEX):
            try:
                path = source.get(filename)
            except CheckpointError as error:  # Offline, a cache tells what it has, not what the repository has.
                not_cached = not_cached or error
                continue
            if path is not None:
                return _read_index(path) if filename == INDEX else dict.fromkeys(_read_header(path), filename)
        if not_cached is not None:
            raise not_cached
        found = source.listing()
        raise CheckpointError(
            f"{source.name} holds neither {WEIGHTS} nor {INDEX}; found: {', '.join(found) or 'nothing'}"
            + pickle_advice(found)
        )

    def _recognise(self) -> key_map.Layout:
        layouts = [layout for layout in key_map.LAYOUTS if layout.recognises(self._file_of)]
        if len(layouts) == 1:
            return layouts[0]
        if layouts:
            raise CheckpointError(
                f"{self._source.name} matches several layouts ({'; '.join(layout.name for layout in layouts)}): it "
                "holds more than one vision tower; keep one of them"
            )
        groups = Counter(name.split(".")[0] for name in self._file_of)
        raise CheckpointError(
            f"{self._source.name} holds no SigLIP vision tower in a layout that is known here "
            f"({'; '.join(layout.name for layout in key_map.LAYOUTS)}); its tensors begin with: "
            + ", ".join(f"{group} ({count})" for group, count in groups.most_common(12))
        )

    def _sort_out_the_rest(self) -> tuple[dict[str, int], list[str]]:
        """Splits what is not the tower's into what is dropped, counted by reason, and what is unknown."""
        dropped: Counter[str] = Counter()
        unknown = []
        for name in self._file_of.keys() - self._claims.keys():
            reason = "pooling head, left out" if name in self._left_out else self.layout.reason_to_drop(name)
            if reason is None:
                unknown.append(name)
            else:
                dropped[reason] += 1
        return dict(sorted(dropped.items())), unknown

    def _read_headers(self) -> tuple[dict[str, _Stored], list[tuple[str, list[str]]]]:
        """Reads the headers of the files that hold the tower; of the others, none is opened, or even needed."""
        stored: dict[str, _Stored] = {}
        missing = [name for name in self._claims if name not in self._file_of]
        problems = []
        for filename in dict.fromkeys(self._file_of[name] for name in self._claims if name in self._file_of):
            expected = [name for name in self._claims if self._file_of.get(name) == filename]
            try:
                header = _read_header(self._fetch(filename))
            except CheckpointError as error:
                problems.append((f"{error}, so these cannot be read", expected))
                continue
            stored |= {name: header[name] for name in expected if name in header}
            missing += [name for name in expected if name not in header]
            if astray := [name for name in header if self._file_of.get(name) != filename]:
                problems.append((f"tensors in {filename} that the index does not place there", astray))
        if missing:
            problems.insert(0, ("missing tensors", missing))
        return stored, problems

    def _check(self, stored: Mapping[str, _Stored], shapes: Mapping[str, torch.Size]) -> list[tuple[str, list[str]]]:
        problems: dict[str, list[str]] = {}
        for name, tensor in stored.items():
            expected = key_map.fused_shape([shapes[our] for our in self._claims[name]])
            if tensor.shape != expected:
                what = f"shape: expected {list(expected)} by {CONFIG}, found {list(tensor.shape)}"
                problems.setdefault(what, []).append(name)
            if tensor.dtype not in DTYPES:
                what = f"dtype: expected one of {', '.join(DTYPES)}, found {tensor.dtype}"
                problems.setdefault(what, []).append(name)
        return list(problems.items())

    def _fetch(self, filename: str) -> Path:
        path = self._source.get(filename)
        if path is None:
            raise CheckpointError(f"{self._source.name} has no file {filename}")
        return path


def read_config(source: Source) -> SigLipVisionConfig:
    """Reads `config.json`, and nothing else.

    Raises:
        CheckpointError: there is none, or it does not describe a SigLIP vision tower.
    """
    path = source.get(CONFIG)
    if path is None:
        raise CheckpointError(
            f"{source.name} has no {CONFIG}, which says what the tensors mean; put the checkpoint's own beside the "
            "weights"
        )
    content = _read_json(path)
    try:
        return SigLipVisionConfig.from_hf(content)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: {error}; this is not the configuration of a SigLIP vision tower that can be loaded"
        ) from error


def save(
    folder: str | os.PathLike[str],
    config: SigLipVisionConfig,
    tensors: Mapping[str, torch.Tensor],
    shapes: Mapping[str, torch.Size],
) -> None:
    """Writes a `SiglipVisionModel` checkpoint in the prefixed HuggingFace layout, each file whole or not at all.

    Args:
        folder: where to; made if it does not exist. `model.safetensors` and `config.json` in it are replaced.
        config: the architecture.
        tensors: our names with the tensors.
        shapes: our names of all that the architecture has, with the shape of each.

    Raises:
        CheckpointError: the tensors are not those of the architecture, or the folder cannot be written.
    """
    layout = key_map.PREFIXED
    problems = {
        "missing tensors": sorted(shapes.keys() - tensors.keys()),
        "unknown tensors": sorted(tensors.keys() - shapes.keys()),
        "another shape than the configuration says": [
            n for n in shapes if n in tensors and tensors[n].shape != shapes[n]
        ],
        "a dtype or device that cannot be saved": [
            name for name, tensor in tensors.items() if tensor.dtype not in DTYPES.values() or tensor.is_meta
        ],
    }
    if found := [(what, names) for what, names in problems.items() if names]:
        raise CheckpointError(_report("the model to be saved", found))
    rows = key_map.TOWER + (key_map.HEAD if config.pooling_head else ())
    stored = layout.to_stored(tensors, config.num_encoder_blocks, rows)
    dtype = functools.reduce(torch.promote_types, {tensor.dtype for tensor in stored.values()})
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        # Beside their places and then moved there: a reader sees the old files or the new ones, never a part, and
        # a model that is mapped from the old file keeps it.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as unfinished:
            weights, config_file = Path(unfinished, WEIGHTS), Path(unfinished, CONFIG)
            save_file(
                {name: tensor.detach().cpu().contiguous() for name, tensor in stored.items()},
                weights,
                metadata={"format": "pt"},  # without it, transformers 4.40 cannot read the file
            )
            hf_config = {**config.to_hf(), "dtype": str(dtype).removeprefix("torch.")}
            config_file.write_text(json.dumps(hf_config, indent=2) + "\n", encoding="utf-8")
            weights.chmod(config_file.stat().st_mode)  # safetensors hides its files from everybody else
            for file in (weights, config_file):
                file.replace(Path(folder, file.name))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the checkpoint could not be written to {os.fspath(folder)}: {error}") from error


def pickle_advice(filenames: Iterable[str]) -> str:
    """Says why pickled weights are refused and what to do, where there are any among the files; else nothing."""
    pickles = [name for name in filenames if name.endswith(PICKLE_SUFFIXES)]
    if not pickles:
        return ""
    return (
        f". Pickled weights ({', '.join(pickles)}) are refused: to load a pickle can run any code. Where you "
        "trust their origin, transformers' `SiglipVisionModel.from_pretrained(SOURCE).save_pretrained(FOLDER)` makes "
        "safetensors of them"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found a {type(content).__name__}; fetch it again")
    return content


def _read_index(path: Path) -> dict[str, str]:
    """Reads which shard holds which tensor. A shard is a file beside the index: no path leads elsewhere."""
    files = _read_json(path).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise CheckpointError(f"{path} has no usable weight_map (tensor name -> file name); fetch it again")
    if bad := sorted({file for file in files.values() if not re.fullmatch(r"[\w.-]+\.safetensors", file)}):
        raise CheckpointError(
            f"{path} names shards that are no plain .safetensors file names: {', '.join(bad[:5])}" + pickle_advice(bad)
        )
    return files


def _read_header(path: Path) -> dict[str, _Stored]:
    try:
        path.open("rb").close()  # safetensors calls a file that may not be read missing
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            return {name: _Stored(path, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}); it is damaged or of another format: fetch it again"
        ) from error


def _report(what: str, problems: list[tuple[str, list[str]]]) -> str:
    """One message for all that is wrong: what, how many, and their names, folded by block."""
    lines = [f"{what} does not hold the tower that its configuration describes"]
    for problem, names in problems:
        lines.append(f"  {problem} ({len(names)}):")
        folded = key_map.fold_blocks(sorted(names))
        lines += [f"    {name}" for name in folded[:_NAMES_SHOWN]]
        if len(folded) > _NAMES_SHOWN:
            lines.append(f"    ... and {len(folded) - _NAMES_SHOWN} more")
    return "\n".join(lines)
