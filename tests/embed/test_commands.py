"""The commands `embed` and `search`."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.checkpoints import edit_tensors
from tests.helpers.commands import run
from tests.helpers.embedding import broken_images, readable_rows


def test_embed(photos: Path, encoder_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    arguments = [
        "embed",
        photos,
        "-o",
        output,
        "--model",
        encoder_folder,
        "--batch-size",
        8,
        "--num-workers",
        0,
    ]
    report = json.loads(run(*arguments, "--engine", "eager", "--json", code=3).stdout)
    failed = len(broken_images(photos))
    assert report["output"] == str(output)
    assert report["done"] == report["processed"] == 50
    assert report["failed"] == failed
    for phase in ("decode", "preprocess", "model", "write"):
        assert report[f"{phase}_seconds"] > 0
    (output / "part-000000.parquet").unlink()
    lines = run(*arguments, code=3).stdout.splitlines()
    assert lines[0] == f"{50 - failed} images embedded, {failed} failed (see column error)"
    assert re.fullmatch(rf"{output}: 50 new rows in [\d.]+ s \([\d.]+ images/s\)", lines[1])
    assert re.fullmatch(
        r"time: model [\d.]+ s, waiting [\d.]+ s, writing [\d.]+ s; "
        r"all workers: decoding [\d.]+ s, preprocessing [\d.]+ s",
        lines[2],
    )
    assert run(*arguments, code=3).stdout.splitlines()[1] == f"{output}: already complete"
    refused = run(*arguments, "--normalize", code=1).stderr
    assert f"{output}: existing embeddings have other settings: normalize is False" in refused


def test_embed_without_broken_images(
    photos: Path, finished_run: Path, encoder_folder: Path, tmp_path: Path
) -> None:
    image = readable_rows(finished_run)[0]
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.png").write_bytes(Path(image["path"]).read_bytes())
    options = ["--model", encoder_folder, "--engine", "eager", "--num-workers", 0]
    result = run("embed", images, "--output", tmp_path / "output", *options, code=0)
    assert result.stdout.startswith("1 image embedded\n")


def test_search(finished_run: Path) -> None:
    query = readable_rows(finished_run)[0]
    nearest = json.loads(run("search", finished_run, query["path"], "--top-k", 3, "--json").stdout)[
        "nearest"
    ]
    assert nearest[0]["id"] == query["id"]
    assert nearest[0]["cosine"] == pytest.approx(1, abs=1e-5)
    assert len(nearest) == 3
    assert run("search", finished_run, query["path"]).stdout.startswith("1.0000  ")


def test_unusable_arguments(photos: Path, encoder_folder: Path, tmp_path: Path) -> None:
    missing = run("embed", tmp_path / "no", "-o", "output", "--model", encoder_folder, code=1)
    assert "no: does not exist; pass a folder, a file or a quoted pattern" in missing.stderr
    arguments = ["embed", photos, "-o", "output", "--model", encoder_folder]
    assert (
        "--device cuda:9 is not available: " in run(*arguments, "--device", "cuda:9", code=2).output
    )
    unknown = run(*arguments, "--engine", "quick", code=2).output
    assert "eager, prepacked" in " ".join(unknown.replace("│", " ").split())
    conflicts = {
        "normalize cannot be combined with tokens": ["--tokens", "--normalize"],
        "address requires the executor ray, got 'local'": ["--address", "host:1"],
        "the engine int8 computes in int8": ["--engine", "int8", "--dtype", "bfloat16"],
    }
    for message, options in conflicts.items():
        output = run("embed", photos, "-o", tmp_path / "x", *options, code=2).output
        assert message in " ".join(output.replace("│", " ").split())
    empty = run("search", tmp_path, photos / "x.png", code=1)
    assert (
        empty.stderr == f"{tmp_path}: contains no embeddings; write them with siglip-port embed\n"
    )


def test_unknown_preprocessing(encoder_copy: Path, tmp_path: Path) -> None:
    (encoder_copy / "preprocessor_config.json").write_text(
        '{"image_processor_type": "SmolVLMImageProcessor"}'
    )
    image = tmp_path / "a.png"
    Image.new("RGB", (20, 30), "red").save(image)
    options = [image, "-o", tmp_path / "output", "--model", encoder_copy]
    for command in (["embed", "--num-workers", 0], ["plot"]):
        error = run(*command, *options, code=1).stderr
        assert "unknown (preprocessor_config.json is of SmolVLMImageProcessor)" in error
        assert "pass --preprocessing with 'siglip' (bicubic filter)" in error
        run(*command, *options, "--preprocessing", "siglip2", code=0)
    assert readable_rows(tmp_path / "output")


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.fixture
def two_encoders(encoder_copy: Path) -> Path:
    """Two encoders with different weights, `a.` and `b.`, in a subfolder of the returned folder."""
    edit_tensors(
        encoder_copy,
        lambda tensors: {
            f"{prefix}.{name}": tensor * (1 + (prefix == "b"))
            for prefix in "ab"
            for name, tensor in tensors.items()
        },
    )
    root = encoder_copy.parent / "pipeline"
    root.mkdir()
    encoder_copy.rename(root / "image_encoder")
    return root


def test_embed_and_search_one_of_two_encoders(
    two_encoders: Path, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The errors of both commands lead to the encoder, and `search` needs no options."""
    image = readable_rows(finished_run)[0]["path"]
    monkeypatch.chdir(tmp_path)
    command = ["embed", image, "-o", "output", "--num-workers", 0, "--model", two_encoders.name]
    stderr = run(*command, code=1).stderr
    assert stderr.endswith(
        "; weights are in its folder image_encoder: pass --subfolder image_encoder\n"
    )
    command += ["--subfolder", "image_encoder"]
    choices = run(*command, code=1).stderr.partition("pass one of: ")[2].strip().split("; ")
    assert choices == [f"--layout huggingface --prefix {name}.vision_model." for name in "ab"]
    run(*command, *choices[1].split())
    monkeypatch.chdir("/")
    assert run("search", tmp_path / "output", image).stdout.startswith("1.0000  ")
    moved = two_encoders.rename(tmp_path / "moved")
    stderr = run("search", tmp_path / "output", image, code=1).stderr
    assert stderr.endswith("; pass the model as --model\n")
    command = ["search", tmp_path / "output", image, "--model", moved]
    assert "pass --subfolder image_encoder" in run(*command, code=1).stderr
    command += ["--subfolder", "image_encoder"]
    assert choices[1] in run(*command, code=1).stderr
    assert run(*command, *choices[1].split()).stdout.startswith("1.0000  ")
    assert "with other weights than those" in run(*command, *choices[0].split(), code=1).stderr


def test_config_option(encoder_copy: Path, finished_run: Path, tmp_path: Path) -> None:
    image = readable_rows(finished_run)[0]["path"]
    config = (encoder_copy / "config.json").rename(tmp_path / "other.json")
    command = ["embed", image, "-o", tmp_path / "output", "--num-workers", 0]
    command += ["--model", encoder_copy]
    assert "or pass --config" in run(*command, code=1).stderr
    run(*command, "--config", config)
    assert run("search", tmp_path / "output", image).stdout.startswith("1.0000  ")
    config.write_text('{"model_type": "clip"}')
    message = f"Invalid value for '--config': {config}: model_type 'clip' is not supported"
    assert message in run(*command, "--config", config, code=2).stderr
    absent = tmp_path / "absent.json"
    assert f"{absent} cannot be read" in run(*command, "--config", absent, code=2).stderr


# --- output folder --------------------------------------------------------------------------------


def test_output_in_checkpoint_is_refused(
    encoder_copy: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(encoder_copy.rglob("*"))
    link = tmp_path / "link"
    link.symlink_to(encoder_copy)
    monkeypatch.chdir(encoder_copy)
    for output in (encoder_copy, link, ".", "embeddings", link / "a" / "b"):
        stderr = run("embed", photos, "-o", output, "--model", encoder_copy, code=1).stderr
        assert stderr == (
            f"{output}: is in the folder of the checkpoint {encoder_copy}; choose an output folder "
            "outside of it\n"
        )
    weights = encoder_copy / "model.safetensors"
    assert "is in the folder" in run("embed", photos, "-o", ".", "--model", weights, code=1).stderr
    assert sorted(encoder_copy.rglob("*")) == before


def test_output_beside_weights_file(
    encoder_copy: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of weights does not make the folder around it a checkpoint."""
    image = readable_rows(finished_run)[0]["path"]
    monkeypatch.chdir(encoder_copy)
    run("embed", image, "-o", "output", "--model", "model.safetensors", "--num-workers", 0)


def test_output_and_input(
    encoder_folder: Path, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output folder may be in an input folder, but not equal to it."""
    shutil.copy(readable_rows(finished_run)[0]["path"], tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    options = ["--model", encoder_folder, "--num-workers", 0]
    stderr = run("embed", ".", "-o", tmp_path, *options, code=1).stderr
    assert stderr == f"{tmp_path}: is an input; choose another output folder\n"
    for _ in range(2):
        run("embed", ".", "-o", "embeddings", *options)


# --- images that fail -----------------------------------------------------------------------------


def test_all_images_fail(encoder_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(5):
        (tmp_path / "images" / f"{number}.png").write_bytes(b"no")
    output = tmp_path / "output"
    command = ["embed", tmp_path / "images", "-o", output, "--model", encoder_folder]
    for _ in range(2):  # also if the output is complete
        lines = run(*command, "--num-workers", 0, code=3).stderr.splitlines()
        assert lines[0] == "all images failed; the first errors:"
        assert [line.partition(": ")[0] for line in lines[1:]] == ["0.png", "1.png", "2.png"]
        assert "cannot be read" in lines[1] or "not an image" in lines[1], lines[1]
    message = f"{output}: contains no embeddings: all rows have an error; see column error\n"
    Image.new("RGB", (8, 8)).save(tmp_path / "query.png")
    assert run("search", output, tmp_path / "query.png", code=1).stderr == message
