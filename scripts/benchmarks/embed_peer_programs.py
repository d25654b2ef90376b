"""Programs that scripts/benchmarks/embed_peers.py compares: weights, commands, outputs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from siglip_port import SigLipVisionConfig, SigLipVisionModel
from siglip_port.parity import randomize

BATCH_SIZE = 16
BASELINE = "siglip-port, eager"
OPEN_CLIP_MODEL = "ViT-B-16-SigLIP"

Vectors = dict[str, NDArray[np.float64]]
"""Image name -> embedding."""


@dataclass(frozen=True)
class Peer:
    """A program that embeds a folder of images.

    Attributes:
        name: display name.
        packages: pinned packages; empty for siglip-port, which runs in this environment.
        command: (weights, images, output) -> command line.
        read: output -> embeddings.
        remark: deviations of its setup.
    """

    name: str
    packages: tuple[str, ...]
    command: Callable[[Path, Path, Path], Sequence[str]]
    read: Callable[[Path], Vectors]
    remark: str = ""


# --- the weights ----------------------------------------------------------------------------------


def write_weights(folder: Path) -> None:
    """Write the same model for siglip-port, timm, transformers and open_clip."""
    import torch

    model = SigLipVisionModel(SigLipVisionConfig(pooling_head=True)).eval()
    randomize(model, seed=0)
    model.save_hf(folder / "hf")
    model.save_timm(folder / "timm")
    torch.manual_seed(0)
    write_transformers(folder)
    write_open_clip(folder)


def write_transformers(folder: Path) -> None:
    """Write a SiglipModel for sentence-transformers.

    Given a vision model, sentence-transformers would average the tokens.
    """
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel, SiglipVisionModel

    vision = SiglipVisionModel.from_pretrained(folder / "hf")
    model = SiglipModel(SiglipConfig(vision_config=vision.config.to_dict()))
    tensors = vision.state_dict()
    model.vision_model.load_state_dict(
        {name.removeprefix("vision_model."): tensor for name, tensor in tensors.items()}
    )
    model.save_pretrained(folder / "whole")
    SiglipImageProcessor.from_pretrained(folder / "hf").save_pretrained(folder / "whole")
    write_tokenizer(folder / "whole")


def write_open_clip(folder: Path) -> None:
    """Write an open_clip repository.

    Its configuration references the timm folder, so that GELU uses the tanh approximation.
    """
    import open_clip
    import timm
    from safetensors.torch import save_file

    timm_name = f"local-dir:{folder / 'timm'}"
    model = open_clip.create_model(OPEN_CLIP_MODEL, pretrained=None)
    vision = timm.create_model(timm_name, pretrained=True, num_classes=0)
    model.visual.trunk.load_state_dict(vision.state_dict())
    repository = folder / "open_clip"
    repository.mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, repository / "open_clip_model.safetensors")
    config = open_clip.get_model_config(OPEN_CLIP_MODEL)
    config["vision_cfg"]["timm_model_name"] = timm_name
    preprocessing = {
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
        "resize_mode": "squash",
    }
    content = {"model_cfg": config, "preprocess_cfg": preprocessing}
    (repository / "open_clip_config.json").write_text(json.dumps(content), encoding="utf-8")
    write_tokenizer(repository)


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of three words, without which the peers do not start."""
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 64,
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


# --- siglip-port ----------------------------------------------------------------------------------


def siglip_port(engine: str) -> Callable[[Path, Path, Path], Sequence[str]]:
    """Return the command line of `siglip-port embed` with an engine."""
    program = str(Path(sys.executable).with_name("siglip-port"))

    def command(weights: Path, images: Path, output: Path) -> list[str]:
        options = ["--output", str(output), "--model", str(weights / "hf"), "--engine", engine]
        return [program, "embed", str(images), *options]

    return command


def read_siglip_port(output: Path) -> Vectors:
    """Read the Parquet files of siglip-port; rows with an error are NaN."""
    from pyarrow import parquet

    vectors: Vectors = {}
    for path in sorted(output.glob("part-*.parquet")):
        for row in parquet.read_table(path).to_pylist():
            vectors[row["id"]] = np.array(row["embedding"], float)
    return vectors


# --- sentence-transformers ------------------------------------------------------------------------

SENTENCE_TRANSFORMERS = """
import sys, numpy, pathlib, sentence_transformers
name, folder, output = sys.argv[1:]
paths = sorted(str(path) for path in pathlib.Path(folder).iterdir())
model = sentence_transformers.SentenceTransformer(name, device="cpu")
numpy.savez(output, paths=paths, vectors=model.encode(paths, batch_size=16))
"""
"""sentence-transformers has no CLI; this is the program of its documentation."""


def sentence_transformers(weights: Path, images: Path, output: Path) -> Sequence[str]:
    """Return the command line of `SENTENCE_TRANSFORMERS`."""
    arguments = [str(weights / "whole"), str(images), f"{output}.npz"]
    return ["python", "-c", SENTENCE_TRANSFORMERS, *arguments]


def read_sentence_transformers(output: Path) -> Vectors:
    """Read the .npz file, which is written at the end."""
    with np.load(f"{output}.npz") as arrays:
        names = [Path(path).name for path in arrays["paths"]]
        return dict(zip(names, arrays["vectors"], strict=True))


# --- dinotool -------------------------------------------------------------------------------------


def dinotool(weights: Path, images: Path, output: Path) -> Sequence[str]:
    """Return the command line for embeddings of whole images, without visualization."""
    return [
        "dinotool",
        str(images),
        *("--output", str(output)),
        *("--model-name", f"hf-hub:timm/{OPEN_CLIP_MODEL}"),
        *("--save-features", "frame", "--no-vis"),
        *("--input-size", "224", "224"),
        *("--batch-size", str(BATCH_SIZE)),
    ]


def read_dinotool(output: Path) -> Vectors:
    """Read the folder of Parquet files, which is written at the end."""
    from pyarrow import parquet

    rows = parquet.read_table(output.with_suffix(".parquet")).to_pandas()
    names = [str(name) for name in rows.index]
    return dict(zip(names, rows.to_numpy(float), strict=True))


# --- clip-retrieval -------------------------------------------------------------------------------


def clip_retrieval(weights: Path, images: Path, output: Path) -> Sequence[str]:
    """Return the command line for images only, with one decoding process per CPU core.

    clip-retrieval imports pkg_resources, which setuptools no longer contains in the releases that
    work with this torch; a stub replaces it.
    """
    stub = weights / "shim"
    stub.mkdir(exist_ok=True)
    module = "import packaging.version\n"
    (stub / "pkg_resources.py").write_text(module, encoding="utf-8")
    model = weights / "open_clip" / "open_clip_model.safetensors"
    return [
        *("env", f"PYTHONPATH={stub}"),
        *("clip-retrieval", "inference"),
        *("--input_dataset", str(images)),
        *("--output_folder", str(output)),
        *("--clip_model", f"open_clip:{OPEN_CLIP_MODEL}/{model}"),
        *("--batch_size", str(BATCH_SIZE)),
        *("--num_prepro_workers", str(len(os.sched_getaffinity(0)))),
        *("--enable_text", "False"),
    ]


def read_clip_retrieval(output: Path) -> Vectors:
    """Read the arrays, with image names from the Parquet files beside them."""
    from pyarrow import parquet

    vectors: Vectors = {}
    for path in sorted((output / "img_emb").glob("*.npy")):
        number = path.stem.rpartition("_")[2]
        metadata = parquet.read_table(output / "metadata" / f"metadata_{number}.parquet")
        paths = metadata.column("image_path").to_pylist()
        for image, vector in zip(paths, np.load(path), strict=True):
            vectors[Path(image).name] = vector.astype(float)
    return vectors


PEERS = (
    Peer(BASELINE, (), siglip_port("eager"), read_siglip_port),
    Peer("siglip-port, onnxruntime", (), siglip_port("onnxruntime"), read_siglip_port),
    Peer(
        "sentence-transformers",
        ("sentence-transformers[image]==6.2.0",),
        sentence_transformers,
        read_sentence_transformers,
        "loads a SiglipModel; given only a vision model, it averages the tokens",
    ),
    Peer(
        "dinotool",
        ("dinotool==0.4.0",),
        dinotool,
        read_dinotool,
        "loads an open_clip model from a local Hub server, since it needs a Hub id; unit length",
    ),
    Peer(
        "clip-retrieval",
        ("clip-retrieval==2.45.0",),
        clip_retrieval,
        read_clip_retrieval,
        "stub for pkg_resources; CLIP's mean, std and crop, as open_clip uses for a file; float16",
    ),
)
