"""Damages checkpoints at random."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from scripts.fuzz.byte_edits import edit_data, edit_length, join, noise, split
from scripts.fuzz.intact import NPZ, Files
from scripts.fuzz.json_edits import edit_index, edit_json
from scripts.fuzz.npz_edits import PICKLE, edit_npz
from scripts.fuzz.setting_edits import add_adapter, add_setting, edit_field, omit_from_index
from scripts.fuzz.tensor_edits import add, swap
from siglip_port.checkpoint.preprocessor_config import PREPROCESSOR
from siglip_port.checkpoint.source import CONFIG, INDEX, WEIGHTS

Edit = Callable[[Random, bytes], bytes]
Rearrange = Callable[[Random, Files, str], None]

STRAY_FILES = (
    "pytorch_model.bin",
    "model.pt",
    INDEX,
    WEIGHTS,
    "open_clip_model.safetensors",
    "adapter.safetensors",
    "x.npz",
)


def rearrange(rng: Random, files: Files, target: str) -> None:
    """Remove, add, empty, rename or swap files, or add an adapter."""
    other = rng.choice(sorted(files))
    match rng.randrange(8):
        case 0:
            del files[target]
        case 1:
            files[target] = b""
        case 2:
            content = files[target]
            files[target] = files[other]
            files[other] = content
        case 3:
            files[target] = PICKLE
        case 4:
            contents = (PICKLE, b"", files[other], rng.randbytes(100))
            content = rng.choice(contents)
            files[rng.choice(STRAY_FILES)] = content
        case 5:
            files[f"{target}x"] = files.pop(target)
        case 6 if NPZ not in files:
            add_adapter(rng, files)
        case _:
            files[target] += files[other]


def of_file(edit: Edit) -> Rearrange:
    """Apply an edit to a whole file."""

    def edit_file(rng: Random, files: Files, target: str) -> None:
        files[target] = edit(rng, files[target])

    return edit_file


def of_header(edit: Edit) -> Rearrange:
    """Apply an edit to the header of a safetensors file."""

    def edit_header(rng: Random, content: bytes) -> bytes:
        header, data = split(content)
        return join(edit(rng, header), data)

    return of_file(edit_header)


def of_data(edit: Edit) -> Rearrange:
    """Apply an edit to the data of a safetensors file."""

    def edit_tensors(rng: Random, content: bytes) -> bytes:
        header, data = split(content)
        return join(header, edit(rng, data))

    return of_file(edit_tensors)


class Mutator(NamedTuple):
    """A way to damage a checkpoint.

    Attributes:
        group: row of the summary table.
        name: what it damages, for the report.
        files: pattern of the files that it applies to.
        edit: damages one of these files in the dict of all files.
    """

    group: str
    name: str
    files: str
    edit: Rearrange


MUTATORS = (
    Mutator("header", "bytes", "*.safetensors", of_header(noise)),
    Mutator("header", "JSON", "*.safetensors", of_header(edit_json)),
    Mutator("header", "tensors", "*.safetensors", of_file(swap)),
    Mutator("header", "more", "*.safetensors", of_file(add)),
    Mutator("length", "length", "*.safetensors", of_file(edit_length)),
    Mutator("data", "data", "*.safetensors", of_data(edit_data)),
    Mutator("index", "JSON", INDEX, of_file(edit_json)),
    Mutator("index", "bytes", INDEX, of_file(noise)),
    Mutator("index", "files", INDEX, of_file(edit_index)),
    Mutator("index", "omits", INDEX, of_file(omit_from_index)),
    Mutator("config", "JSON", CONFIG, of_file(edit_json)),
    Mutator("config", "bytes", CONFIG, of_file(noise)),
    Mutator("config", "settings", CONFIG, of_file(add_setting)),
    Mutator("preprocessor", "JSON", PREPROCESSOR, of_file(edit_json)),
    Mutator("preprocessor", "bytes", PREPROCESSOR, of_file(noise)),
    Mutator("preprocessor", "fields", PREPROCESSOR, of_file(edit_field)),
    Mutator("npz", "bytes", "*.npz", of_file(noise)),
    Mutator("npz", "arrays", "*.npz", of_file(edit_npz)),
    Mutator("files", "files", "*", rearrange),
)


@dataclass(frozen=True)
class Mutant:
    """A checkpoint, damaged or not.

    Attributes:
        kind: key of `scripts.fuzz.intact.KINDS`.
        group: group of its mutators; `several` if they differ.
        steps: description of each edit.
        files: the files after the edits.
        changed: whether they differ from the intact files.
    """

    kind: str
    group: str
    steps: tuple[str, ...]
    files: Files
    changed: bool


def mutate(rng: Random, intact: Mapping[str, Files], kind: str) -> Mutant:
    """Damage a checkpoint with one mutator in most cases, otherwise with two or three.

    Args:
        rng: random generator.
        intact: intact checkpoints by kind.
        kind: kind of the checkpoint to damage.
    """
    files = dict(intact[kind])
    groups = set()
    steps = []
    for _ in range(rng.choice((1, 1, 1, 1, 1, 2, 3))):
        targets = find_targets(files)
        if not targets:
            continue
        group = rng.choice(sorted({mutator.group for mutator in targets}))
        mutator = rng.choice([mutator for mutator in targets if mutator.group == group])
        target = rng.choice(targets[mutator])
        before = dict(files)
        for _ in range(10):  # an edit may change nothing, e.g. replace a zero by a zero
            mutator.edit(rng, files, target)
            if files != before:
                break
        groups.add(group)
        steps.append(f"{group} ({mutator.name}) of {target}")
    group = groups.pop() if len(groups) == 1 else "several"
    return Mutant(kind, group, tuple(steps), files, files != intact[kind])


def find_targets(files: Files) -> dict[Mutator, list[str]]:
    """Return the mutators that apply to these files, with the names of the files."""
    targets = {}
    for mutator in MUTATORS:
        names = sorted(name for name in files if fnmatch.fnmatch(name, mutator.files))
        if names:
            targets[mutator] = names
    return targets
