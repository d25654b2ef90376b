"""Checkpoints of a few kB in the layouts that are read most, and what may be done to their files.

For `run.py`.
"""

from __future__ import annotations

import fnmatch
import io
import json
import pickle
import re
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save

from siglip_port import SigLipVisionConfig, SigLipVisionModel
from siglip_port.checkpoint import layouts as key_map
from siglip_port.parity.stress_weights import randomise

Files = dict[str, bytes]
"""The files of a checkpoint: names and contents."""

WEIGHTS, INDEX, CONFIG, PREPROCESSOR = (
    "model.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "preprocessor_config.json",
)
NPZ = "tower.npz"

# Nothing is as by default, so that a default in the place of what a file says does not go unseen.
TOWER = SigLipVisionConfig(
    embed_dim=4,
    image_size=5,
    patch_size=2,
    num_attention_heads=2,
    num_encoder_blocks=2,
    mlp_hidden_dim=6,
    layer_norm_eps=1e-5,
    hidden_act="gelu",
    attention_dropout=0.25,
    pooling_head=True,
)


@dataclass(frozen=True)
class Kind:
    """A layout that is fuzzed.

    Attributes:
        config: of the tower.
        prefix: what stands before the names of the tower in the file.
        head: what stands before those of its pooling head, after the prefix.
        described: whether transformers' configuration tells the architecture.
        dtype: of the stored tensors.
        local: whether it is read from folders only.
    """

    config: SigLipVisionConfig = TOWER
    prefix: str = "vision_model."
    head: str = "head."
    described: bool = True
    dtype: torch.dtype = torch.float32
    local: bool = False


_TOLD_BY_SHAPES = replace(
    TOWER, layer_norm_eps=1e-6, attention_dropout=0.0
)  # timm and big_vision write neither
KINDS = {
    "whole": Kind(),
    "sharded": Kind(),
    "flat": Kind(prefix=""),
    "timm": Kind(_TOLD_BY_SHAPES, prefix="", head="attn_pool.", described=False),
    "naflex": Kind(replace(TOWER, naflex=True, image_size=4)),
    "big_vision": Kind(
        replace(_TOLD_BY_SHAPES, image_size=4, hidden_act="gelu_pytorch_tanh"),
        prefix="params/img/",
        head="MAPHead_0/",
        described=False,
        local=True,
    ),
    "bf16": Kind(dtype=torch.bfloat16),
}
"""What is fuzzed, by name.

The first two with a text tower, so that on the Hub the tower is the lesser part.
"""


def make(name: str, parameters: Callable[[SigLipVisionModel], None] = randomise) -> Files:
    """Makes an intact checkpoint.

    Args:
        name: one of `KINDS`.
        parameters: fills the tower; without, with random numbers that hide nothing, always the
            same.
    """
    kind = KINDS[name]
    model = SigLipVisionModel(kind.config)
    parameters(model)
    if name == "big_vision":
        rows = key_map.BIG_VISION.rules(True)
        state = {key: tensor.detach() for key, tensor in model.state_dict().items()}
        stored = key_map.BIG_VISION.to_stored(
            state, kind.config.num_encoder_blocks, 2, rows, kind.prefix
        )
        file = io.BytesIO()
        np.savez(file, **{key: tensor.numpy() for key, tensor in stored.items()})  # type: ignore[arg-type]
        return {NPZ: file.getvalue()}
    with tempfile.TemporaryDirectory() as folder:
        (model.save_timm if name == "timm" else model.save_hf)(folder)
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        tensors = load_file(Path(folder, WEIGHTS))
    if PREPROCESSOR in files:
        files[PREPROCESSOR] = json.dumps(
            {**json.loads(files[PREPROCESSOR]), "image_mean": [0.25, 0.5, 0.75]}
        ).encode()
    if name in ("flat", "bf16"):
        tensors = {
            key.removeprefix("vision_model."[: 0 if kind.prefix else None]): t
            for key, t in tensors.items()
        }
        files[WEIGHTS] = save(
            {key: tensor.to(kind.dtype) for key, tensor in tensors.items()}, {"format": "pt"}
        )
    if name in ("whole", "sharded"):
        inner = {"vision_config": json.loads(files[CONFIG]), "text_config": {"hidden_size": 4}}
        files[CONFIG] = json.dumps(
            {"model_type": "siglip", "architectures": ["SiglipModel"], **inner}
        ).encode()
        tensors["text_model.embeddings.token_embedding.weight"] = torch.ones(2000)
        tensors["logit_scale"] = torch.ones(1)
        files[WEIGHTS] = save(tensors, {"format": "pt"})
    if name == "sharded":
        del files[WEIGHTS]
        shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
        weight_map = {key: shards[i % 3] for i, key in enumerate(tensors)}
        for shard in shards:
            files[shard] = save(
                {key: t for key, t in tensors.items() if weight_map[key] == shard}, {"format": "pt"}
            )
        files[INDEX] = json.dumps(
            {"metadata": {"total_size": 10_000}, "weight_map": weight_map}
        ).encode()
    return files


# --- bytes ----------------------------------------------------------------------------------------


def noise(rng: Random, content: bytes) -> bytes:
    """Damages a few bytes, somewhere."""
    at, length = rng.randrange(len(content) + 1), rng.choice((1, 1, 1, 2, 4, 8, 64))
    before, here, after = content[:at], content[at : at + length], content[at + length :]
    match rng.randrange(7):
        case 0:
            return (
                before
                + bytes(byte ^ 1 << rng.randrange(8) for byte in here[:1])
                + content[at + 1 :]
            )
        case 1:
            return before + after
        case 2:
            return before + rng.randbytes(length) + content[at:]
        case 3:
            return before + rng.randbytes(len(here)) + after
        case 4:
            return before + bytes(len(here)) + after
        case 5:
            other = rng.randrange(len(content) + 1)
            return before + content[other : other + length] + rng.choice((after, content[at:]))
        case _:
            return before


def change(rng: Random, content: bytes) -> bytes:
    """Damages bytes of tensors: values, or how many there are."""
    return rng.choice(
        (
            noise(rng, content),
            content + rng.randbytes(rng.choice((1, 4, 4096))),
            bytes(len(content)),
        )
    )


def split(content: bytes) -> tuple[bytes, bytes]:
    """The header of a safetensors file without its length, and the rest."""
    length = struct.unpack("<Q", content[:8].ljust(8, b"\0"))[0]
    return content[8 : 8 + length], content[8 + length :]


def join(header: bytes, data: bytes) -> bytes:
    """The reverse of `split`."""
    return struct.pack("<Q", len(header)) + header + data


def length(rng: Random, content: bytes) -> bytes:
    """Puts another length before the header."""
    true, size = len(split(content)[0]), len(content)
    odd = (
        0,
        1,
        2,
        true - 1,
        true + 1,
        true + 8,
        size - 8,
        size - 7,
        size,
        25_000_001,
        2**31,
        2**63,
        2**64 - 1,
    )
    if rng.random() < 0.3:
        return noise(rng, content[:8]) + content[8:]
    return struct.pack("<Q", max(rng.choice(odd), 0)) + content[8:]


# --- JSON -----------------------------------------------------------------------------------------

_RAW = "\N{SYMBOL FOR NULL}"  # stands for a text that no value is written as
RAW: tuple[str, ...] = (
    "[" * 100_000,
    "[" * 500 + "]" * 500,
    '{"a":' * 50_000 + "1" + "}" * 50_000,
    "9" * 5000,
    "1e400",
    "NaN",
    "-0",
)
RAW += ("-Infinity", "", "0x10", "'", '"\\ud800"', "\x00", "\ufeff", "1,1", "null,")
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        3,
        4,
        5,
        6,
        8,
        16,
        2**31,
        2**63,
        2**64,
        -(2**63),
        10**40,
        10**400,
    ),
    *(
        0.0,
        0.5,
        1e-6,
        1e-300,
        -1.5,
        4.0,
        "",
        "x",
        "4",
        "gelu",
        "gelu_new",
        "F32",
        "BF16",
        "F16",
        "F64",
        "I32",
        "F8_E4M3",
    ),
    *(
        "../x.safetensors",
        "/etc/passwd",
        "model.bin",
        "a/b.safetensors",
        "siglip_vision_model",
        "siglip2_vision_model",
    ),
    *(
        [],
        {},
        [0],
        [0, 0],
        [4, 4],
        [4, 5],
        [-4, -4],
        [2**40, 2**40],
        [1] * 70,
        {"a": 1},
        [None],
        [[4]],
        ["4"],
        [4.0],
    ),
    *([_RAW], {"a": _RAW}) + (_RAW,) * 8,
)
"""What is put in the place of a value, besides what is made of it."""


def places(value: object) -> Iterator[tuple[Any, Any]]:
    """All places in a piece of JSON: what they lie in, and their keys or numbers."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def nudge(rng: Random, value: object) -> object:
    """Another value that is near, or the same in another type."""
    if isinstance(value, bool) or value is None:
        return rng.choice((not value, int(bool(value)), str(value)))
    if isinstance(value, int | float):
        return rng.choice(
            (
                value + 1,
                value - 1,
                value * 2,
                value / 2,
                -value,
                str(value),
                [value] * 2,
                float(value),
            )
        )
    if isinstance(value, str):
        return rng.choice(
            (
                value + "x",
                value[:-1],
                value.upper(),
                [value],
                {value: value},
                value + "\0",
                f" {value}",
            )
        )
    return rng.choice((list(value), dict.fromkeys(map(str, value)), [value], json.dumps(value)))  # type: ignore[call-overload]


def edit_json(rng: Random, content: bytes) -> bytes:
    """Changes one thing in JSON, whose text stays JSON most of the time."""
    try:
        document = json.loads(content)
        found = list(places(document))
    except (ValueError, RecursionError):  # by another mutator
        return noise(rng, content)
    if not found:
        return noise(rng, content)
    holder, key = rng.choice(found)
    other_holder, other = rng.choice(found)
    value, tail = holder[key], ""
    match rng.randrange(8):
        case 0 | 1:
            holder[key] = rng.choice(VALUES)
        case 2:
            holder[key] = (
                nudge(rng, value) if not isinstance(value, int) or abs(value) < 10**300 else 0
            )
        case 3:
            del holder[key]
        case 4 if isinstance(holder, dict):
            del holder[key]
            holder[
                rng.choice((f"{key}x", str(key).upper(), rng.choice(list(holder) or ["x"]), ""))
            ] = value
        case 5:
            holder[key] = json.loads(json.dumps(other_holder[other]))
        case 6:
            same = [k for h, k in found if h is holder]
            sibling = rng.choice(same)
            holder[key], holder[sibling] = holder[sibling], holder[key]
        case _ if isinstance(document, dict):
            again = rng.choice(list(document))
            tail = f", {json.dumps(again)}: {json.dumps(rng.choice([*document.values(), None]))}"
    text = json.dumps(document)
    text = text[:-1] + tail + text[-1:]
    return text.replace(json.dumps(_RAW), rng.choice(RAW)).encode("utf-8", "surrogatepass")


def lead_astray(rng: Random, content: bytes) -> bytes:
    """Has an index name another file for one of its tensors, or for thousands more."""
    try:
        document = json.loads(content)
        weight_map = document["weight_map"]
        names = list(weight_map)
        if rng.random() < 0.1:
            weight_map |= {f"text_model.{i}": f"model-{i}.safetensors" for i in range(5000)}
        odd: tuple[str, ...] = (
            "../model.safetensors",
            "/dev/zero",
            "/dev/zero.safetensors",
            "model.bin",
            "",
            ".",
            "a/b.safetensors",
        )
        odd += (
            "model-00001-of-00003.safetensors\n",
            "\0.safetensors",
            "x.safetensors",
            ".safetensors",
            "~.safetensors",
        )
        weight_map[rng.choice(names)] = rng.choice((*odd, *set(weight_map.values())))
    except (ValueError, RecursionError, KeyError, TypeError, IndexError):  # by another mutator
        return noise(rng, content)
    return json.dumps(document).encode()


def exchange(rng: Random, content: bytes) -> bytes:
    """Exchanges what a header says of two tensors of one size: all of it, the place, or the name.

    It stays well-formed.

    Or has it lose the whole pooling head, which leaves a tower without.
    """
    header, data = split(content)
    try:
        document = json.loads(header)
        sizes = {
            key: value["data_offsets"][1] - value["data_offsets"][0]
            for key, value in document.items()
            if key[0] != "_"
        }
        one = rng.choice(list(sizes))
        two = rng.choice([key for key in sizes if sizes[key] == sizes[one]])
        part = rng.choice(("data_offsets", "dtype", "shape"))
        document[one][part], document[two][part] = document[two][part], document[one][part]
        keys = list(document)
        rng.shuffle(keys)
        if rng.random() < 0.1:
            return save(
                {
                    k: t
                    for k, t in _tensors(content).items()
                    if "head." not in k and "attn_pool." not in k
                }
            )
    except (ValueError, RecursionError, KeyError, TypeError, IndexError):  # by another mutator
        return noise(rng, content)
    return join(json.dumps({key: document[key] for key in keys}).encode(), data)


def add(rng: Random, content: bytes) -> bytes:
    """Adds a copy of a tensor under another name.

    Of a block that there is not, or one that nobody knows.
    """
    header, data = split(content)
    try:
        document = json.loads(header)
        one = rng.choice(list(document))
        begin, end = document[one]["data_offsets"]
        more = {**document[one], "data_offsets": [len(data), len(data) + end - begin]}
        document[
            rng.choice((f"{one}x", one.replace("1", "7"), f"head.{one}", f"text_model.{one}"))
        ] = more
    except (
        ValueError,
        RecursionError,
        KeyError,
        TypeError,
        IndexError,
    ):  # by another mutator, or of the metadata
        return noise(rng, content)
    return join(json.dumps(document).encode(), data + data[begin:end])


def _tensors(content: bytes) -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, WEIGHTS)
        path.write_bytes(content)
        try:
            return {key: tensor.clone() for key, tensor in load_file(path).items()}
        except Exception as error:  # by another mutator: whatever safetensors raises
            raise ValueError from error


# --- npz ------------------------------------------------------------------------------------------


def edit_npz(rng: Random, content: bytes) -> bytes:
    """Makes the archive anew, whole as a zip file, with a fault in one of its arrays or its names."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [(name, archive.read(name)) for name in archive.namelist()]
        at = rng.randrange(len(members))
    except Exception:  # by another mutator: what zipfile raises has no base in common
        return noise(rng, content)
    name, array = members[at]
    match rng.randrange(8):
        case 0:
            descr = rng.choice(
                (">f4", "<i4", "<f8", "<f2", "|O", "|V4", "|V2", "<U1", "<c8", "f4,f4", "x")
            )
            array = array.replace(b"'<f4'", repr(descr).encode())
        case 1:
            shape = rng.choice(
                (
                    "(4,)",
                    "(2, 2)",
                    "(-1,)",
                    "(1000000000, 1000000000)",
                    "4",
                    "(4.0,)",
                    "((),)",
                    "(True,)",
                )
            )
            array = re.sub(rb"'shape': \([^)]*\)", f"'shape': {shape}".encode(), array)
        case 2:
            array = array.replace(b"False", b"True")
        case 3:
            array = noise(rng, array[:128]) + array[128:]
        case 4:
            array = array[:128] + change(rng, array[128:])
        case 5:
            name = rng.choice(
                (name + "x", name.removesuffix(".npy"), "../" + name, rng.choice(members)[0], "")
            )
        case 6:
            array = rng.choice(
                (b"", PICKLE, array[:6] + bytes([3, 0]) + array[8:], array + bytes(1 << 22))
            )
        case _:
            members.insert(rng.randrange(len(members)), rng.choice(members))
    members[at] = name, array
    if rng.random() < 0.1:
        members = [(name, array) for name, array in members if "MAPHead" not in name]
    file = io.BytesIO()
    compression = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", compression) as archive:
        warnings.simplefilter("ignore")  # of a name that is there twice
        for name, array in dict(members).items() if rng.random() < 0.9 else members[:-1]:
            archive.writestr(zipfile.ZipInfo(name), array)
    return file.getvalue()


# --- files ----------------------------------------------------------------------------------------


class _Trap:
    """Its pickle runs code where it is loaded, as any pickle could."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"import os; os.environ[{TRAP!r}] = 'a pickle was loaded'",)


TRAP = "SIGLIP_PORT_TRAP"
"""A variable of the environment that is set once a pickle of ours has been loaded."""

PICKLE = pickle.dumps(_Trap())
_STRAY = (
    "pytorch_model.bin",
    "model.pt",
    INDEX,
    WEIGHTS,
    "open_clip_model.safetensors",
    "adapter.safetensors",
    "x.npz",
)


def rearrange(rng: Random, files: Files, target: str) -> None:
    """Takes files away, adds some, or exchanges them."""
    other = rng.choice(sorted(files))
    match rng.randrange(7):
        case 0:
            del files[target]
        case 1:
            files[target] = b""
        case 2:
            files[target], files[other] = files[other], files[target]
        case 3:
            files[target] = PICKLE
        case 4:
            files[rng.choice(_STRAY)] = rng.choice((PICKLE, b"", files[other], rng.randbytes(100)))
        case 5:
            files[f"{target}x"] = files.pop(target)
        case _:
            files[target] += files[other]


# --- all together ---------------------------------------------------------------------------------

Edit = Callable[[Random, bytes], bytes]


def _of_file(edit: Edit) -> Callable[[Random, Files, str], None]:
    def mutate(rng: Random, files: Files, target: str) -> None:
        files[target] = edit(rng, files[target])

    return mutate


def _of_header(edit: Edit) -> Edit:
    return lambda rng, content: join(edit(rng, split(content)[0]), split(content)[1])


def _of_data(edit: Edit) -> Edit:
    return lambda rng, content: join(split(content)[0], edit(rng, split(content)[1]))


_MUTATORS: tuple[tuple[str, str, str, Callable[[Random, Files, str], None]], ...] = (
    ("header", "bytes", "*.safetensors", _of_file(_of_header(noise))),
    ("header", "JSON", "*.safetensors", _of_file(_of_header(edit_json))),
    ("header", "tensors", "*.safetensors", _of_file(exchange)),
    ("header", "more", "*.safetensors", _of_file(add)),
    ("length", "length", "*.safetensors", _of_file(length)),
    ("data", "data", "*.safetensors", _of_file(_of_data(change))),
    ("index", "JSON", INDEX, _of_file(edit_json)),
    ("index", "bytes", INDEX, _of_file(noise)),
    ("index", "files", INDEX, _of_file(lead_astray)),
    ("config", "JSON", CONFIG, _of_file(edit_json)),
    ("config", "bytes", CONFIG, _of_file(noise)),
    ("preprocessor", "JSON", PREPROCESSOR, _of_file(edit_json)),
    ("preprocessor", "bytes", PREPROCESSOR, _of_file(noise)),
    ("npz", "bytes", "*.npz", _of_file(noise)),
    ("npz", "arrays", "*.npz", _of_file(edit_npz)),
    ("files", "files", "*", rearrange),
)
"""Group, name, and the files that it is for."""


@dataclass(frozen=True)
class Mutant:
    """A checkpoint, damaged or not.

    Attributes:
        kind: which of `KINDS` it was.
        group: of its mutators, or `several`.
        steps: what has been done, in words.
        files: what it is now.
        changed: whether it is another than the intact one.
    """

    kind: str
    group: str
    steps: tuple[str, ...]
    files: Files
    changed: bool


def mutate(rng: Random, intact: Mapping[str, Files], kind: str) -> Mutant:
    """Damages a checkpoint by one mutator in most cases, else by up to three.

    Args:
        rng: decides.
        intact: the checkpoints, by kind.
        kind: which of them.
    """
    files = dict(intact[kind])
    groups, steps = set(), []
    for _ in range(rng.choice((1, 1, 1, 1, 1, 2, 3))):
        fit = [
            (row, t)
            for row in _MUTATORS
            if (t := sorted(name for name in files if fnmatch.fnmatch(name, row[2])))
        ]
        if fit:
            chosen = rng.choice(sorted({row[0] for row, _ in fit}))
            (group, name, _, act), targets = rng.choice(
                [(row, t) for row, t in fit if row[0] == chosen]
            )
            target, before = rng.choice(targets), dict(files)
            for _ in range(10):  # since to put a zero in the place of a zero, say, tries nothing
                act(rng, files, target)
                if files != before:
                    break
            groups.add(group)
            steps.append(f"{group} ({name}) of {target}")
    group = groups.pop() if len(groups) == 1 else "several"
    return Mutant(kind, group, tuple(steps), files, files != intact[kind])
