"""Many pictures to vectors: what is written, what a run survives, and what it refuses."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from siglip_port import OptimizedModel, SigLipVisionModel, atomic, optimize
from siglip_port.checkpoint import preprocessor_config as processors
from siglip_port.cli import commands
from siglip_port.embed import run as embedding
from siglip_port.embed.embedder import Decoded, decode
from siglip_port.embed.inputs import Item, find_items, read
from siglip_port.embed.run import KEY, EmbedError, embed
from siglip_port.embed.search import search, vector_like
from siglip_port.image_processing import LARGEST, ImageError, ImageProcessor
from siglip_port.optimize import selection as inference
from siglip_port.parity import randomise
from tests.helpers.checkpoints import SMALL
from tests.helpers.commands import run as command

HOW: dict[str, Any] = {"form": "eager", "batch_size": 4, "shard_size": 12, "workers": 0}


@pytest.fixture
def model(tower: Path) -> SigLipVisionModel:
    return SigLipVisionModel.from_hf(tower)


def broken(photos: Path) -> dict[str, str]:
    return dict(json.loads((photos / "broken.json").read_text()))


def rows(out: Path) -> list[dict[str, Any]]:
    return [
        row
        for path in sorted(out.glob("part-*.parquet"))
        for row in parquet.read_table(path).to_pylist()
    ]


def exact(out: Path) -> list[str]:
    """The rows, for comparison: NaN is not even equal to itself."""
    return list(map(repr, rows(out)))


def test_every_picture_has_its_row(photos: Path, model: SigLipVisionModel, tmp_path: Path) -> None:
    done = embed([photos], tmp_path / "out", model, **HOW)
    found, bad = rows(tmp_path / "out"), broken(photos)
    assert [row["id"] for row in found] == sorted(
        p.relative_to(photos).as_posix() for p in photos.glob("*/*")
    )
    assert {row["id"] for row in found if row["error"]} == set(bad)
    assert (done.done, done.total, done.fresh, done.failed) == (50, 50, 50, len(bad))
    processor = ImageProcessor.from_config(model.preprocessor_config)
    for row in found:
        assert row["path"] == str(photos / row["id"])
        if row["error"]:
            assert row["width"] is row["height"] is None
            assert np.isnan(row["embedding"]).all()
            assert row["error"].startswith("the picture cannot be read: ")
            continue
        with torch.inference_mode():
            alone = model.embed(**processor(photos / row["id"]))[0]
        assert torch.allclose(torch.tensor(row["embedding"]), alone, rtol=1e-4, atol=1e-4)
        with Image.open(photos / row["id"]) as image:
            assert {row["width"], row["height"]} == set(image.size)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        ".lock", "_run.json", *(f"part-{i:06}.parquet" for i in range(5))
    ]  # fmt: skip


def test_what_a_file_tells_of_itself(
    photos: Path, tower: Path, model: SigLipVisionModel, tmp_path: Path
) -> None:
    embed([photos], tmp_path, model, store="float16", normalize=True, **HOW)
    file = parquet.ParquetFile(tmp_path / "part-000001.parquet")
    assert (
        str(file.schema_arrow.field("embedding").type)
        == f"fixed_size_list<element: halffloat>[{SMALL.embed_dim}]"
    )
    about = json.loads(file.schema_arrow.metadata[KEY])
    assert (about["source"], about["commit"], about["dtype"]) == (str(tower), None, "float32")
    assert (about["normalize"], about["store"], about["output"]) == (True, "float16", "pooled")
    assert about["preprocess"] == ImageProcessor.from_config(model.preprocessor_config).fingerprint
    assert about["failed"] == sum(row["error"] is not None for row in file.read().to_pylist())
    assert (
        about["versions"]["torch"] == torch.__version__.partition("+")[0]
        or about["versions"]["torch"]
    )
    vectors = [row["embedding"] for row in rows(tmp_path) if not row["error"]]
    assert np.allclose(np.linalg.norm(np.array(vectors, dtype=float), axis=1), 1, atol=1e-2)


@pytest.mark.parametrize("library", ["pandas", "polars", "duckdb"])
def test_others_read_it(
    library: str, photos: Path, model: SigLipVisionModel, tmp_path: Path
) -> None:
    other = pytest.importorskip(library)
    embed([photos], tmp_path, model, **HOW)
    if library == "duckdb":
        query = f"select id, embedding from read_parquet('{tmp_path}/part-*.parquet') where error is null order by id"
        found = other.sql(query).fetchall()
    elif library == "polars":
        table = other.read_parquet(tmp_path / "part-*.parquet").filter(other.col("error").is_null())
        found = list(zip(table["id"].to_list(), table["embedding"].to_list(), strict=True))
    else:
        table = other.read_parquet(tmp_path)  # the folder, by pyarrow
        table = table[table["error"].isna()]
        found = list(zip(table["id"], table["embedding"], strict=True))
    expected = [(row["id"], row["embedding"]) for row in rows(tmp_path) if not row["error"]]
    assert [name for name, _ in found] == [name for name, _ in expected]
    assert np.array_equal(np.array([list(v) for _, v in found]), np.array([v for _, v in expected]))


def test_arrays_beside_the_parquet_files(
    photos: Path, model: SigLipVisionModel, tmp_path: Path
) -> None:
    embed([photos], tmp_path / "npy", model, format="npy", **HOW)
    embed([photos], tmp_path / "parquet", model, **HOW)
    parts = sorted((tmp_path / "npy").glob("part-*"))
    assert [path.name for path in parts] == [
        f"part-{i:06}.{kind}" for i in range(5) for kind in ("npy", "parquet")
    ]
    vectors = np.concatenate([np.load(path) for path in parts[::2]])
    expected = rows(tmp_path / "parquet")
    assert vectors.dtype == np.float32
    assert np.array_equal(
        vectors, np.array([row.pop("embedding") for row in expected], np.float32), equal_nan=True
    )
    assert rows(tmp_path / "npy") == expected
    (tmp_path / "npy" / "part-000001.npy").unlink()
    assert embed([photos], tmp_path / "npy", model, format="npy", **HOW).fresh == 12
    query = torch.from_numpy(vectors[1])
    assert search(tmp_path / "npy", query, 3) == search(tmp_path / "parquet", query, 3)


def test_the_fastest_form(
    photos: Path, model: SigLipVisionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def choose(*_: object, batch_size: int, dtype: object) -> OptimizedModel:
        assert (batch_size, dtype) == (4, None)
        fast = optimize(model, engines=[])
        fast.choice = replace(fast.choice, engine="packed")
        return fast

    monkeypatch.setattr(inference, "optimize", choose)
    embed([photos], tmp_path / "out", model, **{**HOW, "form": "fastest"})
    assert json.loads((tmp_path / "out" / "_run.json").read_text())["form"] == "packed"
    embed([photos], tmp_path / "other", model, **{**HOW, "form": None})
    assert json.loads((tmp_path / "other" / "_run.json").read_text())["form"] == "eager"


def test_files_hold_whole_batches(photos: Path, model: SigLipVisionModel, tmp_path: Path) -> None:
    embed([photos], tmp_path, model, **{**HOW, "shard_size": 18})
    assert [parquet.read_metadata(path).num_rows for path in sorted(tmp_path.glob("part-*"))] == [
        20,
        20,
        10,
    ]


def test_tokens(photos: Path, model: SigLipVisionModel, tmp_path: Path) -> None:
    embed([photos], tmp_path, model, output="tokens", **HOW)
    row = next(row for row in rows(tmp_path) if not row["error"])
    with torch.inference_mode():
        tokens = model(**ImageProcessor.from_config(model.preprocessor_config)(row["path"]))[0]
    assert torch.allclose(
        torch.tensor(row["embedding"]).reshape(tokens.shape), tokens, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("naflex", [False, True])
def test_the_vectors_do_not_depend_on_workers_or_interruptions(
    naflex: bool, photos: Path, tmp_path: Path
) -> None:
    """Ended after each batch in turn: the same bits as in one go."""
    model = SigLipVisionModel(replace(SMALL, naflex=naflex)).eval()
    randomise(model, seed=0)
    embed([photos], tmp_path / "one", model, **HOW)
    embed([photos], tmp_path / "two", model, **{**HOW, "workers": 2})
    assert exact(tmp_path / "one") == exact(tmp_path / "two")

    class StopError(Exception):
        pass

    def stop(progress: embedding.Progress) -> None:
        if progress.fresh >= 16:
            raise StopError

    for attempt in range(100):
        try:
            done = embed([photos], tmp_path / "three", model, report=stop, **HOW)
            break
        except StopError:
            assert attempt < 50
    assert attempt >= 2
    assert done.done == 50
    assert exact(tmp_path / "three") == exact(tmp_path / "one")


PROGRAM = """
import sys, time
from siglip_port import SigLipVisionModel
from siglip_port.embed.run import embed
embed([sys.argv[1]], sys.argv[2], SigLipVisionModel.from_hf(sys.argv[3]), form="eager", batch_size=4, shard_size=12,
      workers=2, report=lambda progress: (print(progress.done, flush=True), time.sleep(0.05)))
"""


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_begun_again(
    kind: signal.Signals, photos: Path, tower: Path, tmp_path: Path
) -> None:
    model, out = SigLipVisionModel.from_hf(tower), tmp_path / "out"
    arguments = [sys.executable, "-c", PROGRAM, str(photos), str(out), str(tower)]
    for wanted in (8, 24) if kind == signal.SIGKILL else (8,):
        with subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if int(line) >= wanted:
                    process.send_signal(kind)
                    break
        for path in out.glob("part-*.parquet"):
            assert parquet.read_table(path).num_rows == 12
    embed([photos], out, model, **HOW)
    embed([photos], tmp_path / "whole", model, **HOW)
    assert exact(out) == exact(tmp_path / "whole")
    assert not list(out.glob(f"{atomic.STAGING_PREFIX}*"))


def test_workers_end_with_the_process_that_is_killed(photos: Path, tmp_path: Path) -> None:
    """With more pictures on their hands than a pipe holds."""
    SigLipVisionModel(replace(SMALL, image_size=96)).save_hf(tmp_path / "tower")
    arguments = [
        sys.executable,
        "-c",
        PROGRAM.replace("0.05", "60"),
        photos,
        tmp_path / "out",
        tmp_path / "tower",
    ]
    with subprocess.Popen(
        list(map(str, arguments)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(1)
        assert len(of_run(tmp_path)) == 3
        process.kill()
    for _ in range(100):
        if not of_run(tmp_path):
            return
        time.sleep(0.1)
    pytest.fail(f"still running: {of_run(tmp_path)}")


def of_run(folder: Path) -> list[str]:
    """The processes that name a folder."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in (place / "cmdline").read_bytes():
                found.append(place.name)
    return found


def test_another_run_of_the_same_folder_is_refused(
    photos: Path, model: SigLipVisionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed([photos], tmp_path, model, **HOW)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = SigLipVisionModel(SMALL).eval()
    randomise(other, seed=1)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"batch_size": 6}, "batch_size was 4 and would be 6"),
        ({"normalize": True}, "normalize was False and would be True"),
        ({"form": "packed"}, "form was 'eager' and would be 'packed'"),
        ({"backend": "torchvision"}, "preprocess was "),
        ({"store": "float16"}, "store was 'float32' and would be 'float16'"),
        ({"dtype": torch.bfloat16}, "dtype was 'float32' and would be 'bfloat16'"),
        ({"model": other}, "weights was "),
        ({"inputs": [photos / "000" / "*.jpg"]}, "pictures was 50 and would be "),
    ]
    for change, message in changes:
        arguments = {"inputs": [photos], "out": tmp_path, "model": model, **HOW, **change}
        if "inputs" in change:
            arguments["inputs"] = [str(change["inputs"][0])]
        with pytest.raises(EmbedError, match=f"holds rows of another run: .*{message}"):
            embed(**arguments)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for form in (None, "fastest"):  # the folder's
        assert embed([photos], tmp_path, model, **{**HOW, "form": form}).fresh == 0
    monkeypatch.setattr(embedding, "PATIENCE", 0.1)
    with embedding._alone(tmp_path), pytest.raises(EmbedError, match="another run is writing to"):
        embed([photos], tmp_path, model, **HOW)


def test_what_could_not_begin_is_in_nobodys_way(
    photos: Path, model: SigLipVisionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A form that cannot be used leaves nothing; settings without rows bind nobody.

    A file is no folder.
    """
    how = {**HOW, "form": "onnxruntime", "dtype": torch.bfloat16}
    with pytest.raises(
        EmbedError,
        match="form onnxruntime cannot be used here: it is for float32 on CPUs; take another",
    ):
        embed([photos], tmp_path / "out", model, **how)
    assert not (tmp_path / "out").exists()

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(embedding, "result", fail)
    with pytest.raises(KeyboardInterrupt):
        embed([photos], tmp_path / "out", model, **HOW)
    monkeypatch.undo()
    assert (tmp_path / "out" / "_run.json").exists()
    assert (
        embed(
            [photos], tmp_path / "out", model, **{**HOW, "form": "packed", "normalize": True}
        ).fresh
        == 50
    )
    assert json.loads((tmp_path / "out" / "_run.json").read_text())["form"] == "packed"
    (tmp_path / "file").touch()
    with pytest.raises(EmbedError, match="file is a file; name a folder"):
        embed([photos], tmp_path / "file", model, **HOW)


def test_int8(photos: Path, model: SigLipVisionModel, tmp_path: Path) -> None:
    embed([photos], tmp_path / "int8", model, **{**HOW, "form": "int8"})
    embed([photos], tmp_path / "float32", model, **HOW)
    assert json.loads((tmp_path / "int8" / "_run.json").read_text())["dtype"] == "int8"
    pairs = zip(rows(tmp_path / "int8"), rows(tmp_path / "float32"), strict=True)
    far = [
        np.abs(np.subtract(a["embedding"], b["embedding"])).max()
        for a, b in pairs
        if not b["error"]
    ]
    assert 0 < max(far) < 1


def test_damaged_results_are_told(photos: Path, model: SigLipVisionModel, tmp_path: Path) -> None:
    embed([photos], tmp_path, model, **HOW)
    part = tmp_path / "part-000001.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[:100])
    with pytest.raises(
        EmbedError, match=f"{part} is no file of this program, or damaged: .*; delete it"
    ):
        embed([photos], tmp_path, model, **HOW)
    part.write_bytes((tmp_path / "part-000004.parquet").read_bytes())
    with pytest.raises(EmbedError, match=f"{part} holds 2 rows, expected 12; delete it"):
        embed([photos], tmp_path, model, **HOW)
    part.unlink()
    done = embed([photos], tmp_path, model, **HOW)
    assert (done.fresh, done.done) == (12, 50)
    assert part.read_bytes() == whole
    (tmp_path / "_run.json").write_text("{")
    with pytest.raises(EmbedError, match=r"_run\.json cannot be read"):
        embed([photos], tmp_path, model, **HOW)
    (tmp_path / "_run.json").unlink()
    with pytest.raises(EmbedError, match=r"holds parquet files, but no _run\.json"):
        embed([photos], tmp_path, model, **HOW)


def test_a_full_disk_loses_nothing(
    photos: Path, model: SigLipVisionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, left = parquet.write_table, [2]

    def full(table: pa.Table, where: Path) -> None:
        write(table, where)
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(parquet, "write_table", full)
    with pytest.raises(
        EmbedError, match="cannot be written to: No space left on device; what is complete stays"
    ):
        embed([photos], tmp_path, model, **HOW)
    assert len(list(tmp_path.glob("part-*.parquet"))) == 2
    assert not list(tmp_path.glob(f"{atomic.STAGING_PREFIX}*"))
    monkeypatch.undo()
    assert embed([photos], tmp_path, model, **HOW).fresh == 26


@pytest.mark.parametrize("deadly", [True, False], ids=["deadly", "by chance"])
def test_a_process_that_dies_is_replaced(
    deadly: bool,
    photos: Path,
    model: SigLipVisionModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A picture that kills whoever decodes it becomes a row with an error.

    What was killed by chance is done again.
    """

    def die(item: Item, processor: ImageProcessor) -> Decoded:
        if Path(item.id).stem in ("0000009", "0000030", "0000031"):
            (seen := tmp_path / Path(item.id).stem).write_bytes(b"x" * (deaths := size(seen) + 1))
            if deadly or deaths == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        return decode(item, processor)

    embed([photos], tmp_path / "whole", model, **HOW)
    monkeypatch.setattr(embedding, "decode", die)
    embed([photos], tmp_path / "out", model, **{**HOW, "workers": 2})
    for row, expected in zip(rows(tmp_path / "out"), rows(tmp_path / "whole"), strict=True):
        if deadly and Path(row["id"]).stem in ("0000009", "0000030", "0000031"):
            assert (row["error"], row["width"]) == (embedding.DIED, None)
        else:
            assert repr(row) == repr(expected)
    assert all(size(tmp_path / name) >= 2 for name in ("0000009", "0000030", "0000031"))


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def test_processes_that_cannot_begin_are_no_fault_of_the_pictures(
    photos: Path, model: SigLipVisionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "_begin_worker", lambda: os._exit(1))
    with pytest.raises(
        EmbedError, match=r"processes to decode cannot be begun: .* take fewer workers, or 0"
    ):
        embed([photos], tmp_path, model, **{**HOW, "workers": 2})

    def refuse() -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.undo()
    monkeypatch.setattr(os, "fork", refuse)
    with pytest.raises(EmbedError, match=r"cannot be begun: .*Resource temporarily unavailable"):
        embed([photos], tmp_path, model, **{**HOW, "workers": 2})
    monkeypatch.undo()
    assert embed([photos], tmp_path, model, **HOW).fresh == 50


def test_folders_are_followed_and_pipes_are_not(model: SigLipVisionModel, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "b").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for place in (folder / "b" / "1.png", tmp_path / "elsewhere" / "2.PNG", folder / "3.txt"):
        Image.new("RGB", (4, 4)).save(place, "PNG")
    (folder / "a").symlink_to(tmp_path / "elsewhere")
    (folder / "b" / "again").symlink_to(folder)
    os.mkfifo(folder / "c.png")
    (folder / "d.jpg").symlink_to(tmp_path / "absent.jpg")
    (folder / "e.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "f").symlink_to(tmp_path / "elsewhere")  # as `a` is: nothing twice
    with open(folder / "g.jpg", "wb") as file:  # noqa: PTH123 (sparse: nothing is written)
        file.truncate(10**12)
    embed([folder], tmp_path / "out", model, **HOW)
    told = {row["id"]: row["error"] for row in rows(tmp_path / "out")}
    assert told == {
        "c.png": "the picture cannot be read: it is no regular file",
        "d.jpg": "the picture cannot be read: No such file or directory",
        "e.heic": "the picture cannot be read: it is of no kind that Pillow knows",
        "g.jpg": f"the picture cannot be read: 1,000,000,000,000 bytes, more than the {LARGEST:,} of the largest",
        "a/2.PNG": None,
        "b/1.png": None,
    }


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    scandir = os.scandir

    def refuse(path: str) -> Any:  # noqa: ANN401
        if str(path).endswith("a"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may list every folder
    with pytest.raises(ValueError, match="a cannot be listed: Permission denied"):
        find_items([tmp_path])


def test_a_vector_that_is_no_number_is_an_error(photos: Path, tmp_path: Path) -> None:
    model = SigLipVisionModel(SMALL).eval()
    with torch.no_grad():
        model.transformer.post_layernorm.bias[0] = torch.nan
    done = embed([photos], tmp_path, model, **HOW)
    assert done.failed == 50
    assert {row["error"] for row in rows(tmp_path)} >= {"the model gave what is no number"}


# --- inputs ---------------------------------------------------------------------------------------


def test_inputs_of_every_kind_give_the_same(
    photos: Path, model: SigLipVisionModel, tmp_path: Path
) -> None:
    names = sorted(p.relative_to(photos).as_posix() for p in photos.glob("*/*"))
    contents = [(photos / name).read_bytes() for name in names]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in zip(names, contents, strict=True):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
            tar.addfile(tarfile.TarInfo(name + ".json"))
    (tmp_path / "list.txt").write_text(
        "\r\n".join(str(photos / name) for name in names) + "\n\n", "utf-8-sig"
    )
    structs = [
        {"bytes": content, "path": name} for name, content in zip(names, contents, strict=True)
    ]
    tables = {
        "bytes": pa.table({"id": names, "bytes": contents}),
        "image": pa.table({"id": names, "image": structs}),
        "path": pa.table({"id": names, "path": [str(photos / name) for name in names]}),
    }
    for name, table in tables.items():
        parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=7)
    expected = [(item.id, read(item)) for item in find_items([photos])]
    assert [name for name, _ in expected] == names
    for given in ("a.tar", "bytes.parquet", "image.parquet", "path.parquet"):
        assert [(item.id, read(item)) for item in find_items([tmp_path / given])] == expected, given
    assert [read(item) for item in find_items([tmp_path / "list.txt"])] == contents
    shards = find_items([f"{tmp_path}/*.[tp]ar*"])
    assert [read(item) for item in shards] == contents * 4
    assert [item.id for item in shards[: len(names)]] == [
        f"{tmp_path}/a.tar/{name}" for name in names
    ]
    assert [read(item) for item in find_items([f"{photos}/**/*.*g"])] == [
        (photos / name).read_bytes() for name in names if name.endswith("g")
    ]
    embed([photos], tmp_path / "folder", model, **HOW)
    embed([tmp_path / "bytes.parquet"], tmp_path / "parquet", model, **HOW)
    pairs = zip(rows(tmp_path / "folder"), rows(tmp_path / "parquet"), strict=True)
    assert all((a["id"], repr(a["embedding"])) == (b["id"], repr(b["embedding"])) for a, b in pairs)


def test_several_inputs_keep_their_names_apart(photos: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        Image.new("RGB", (4, 4)).save(folder / "a.png")
    assert [item.id for item in find_items([one, two])] == [f"{one}/a.png", f"{two}/a.png"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no", None, "does not exist"),
        ("a.tar", b"no tar" * 200, "cannot be read as a tar file"),
        ("a.parquet", b"no parquet", "cannot be read as a parquet file"),
        ("a.txt", b"\xff\xfe\xff", "cannot be read as a list of paths"),
        ("b.txt", b"\n\n", "holds no picture"),
        ("folder", None, "does not exist"),
        ("a.tar.gz", b"", "is a compressed archive: unpack it"),
    ],
)
def test_inputs_that_are_none(
    name: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        find_items([tmp_path / name])
    with pytest.raises(ValueError, match="there are no inputs"):
        find_items([])
    with pytest.raises(ValueError, match=r"\*.jpg is a pattern that no file here matches"):
        find_items([tmp_path / "*.jpg"])
    with pytest.raises(
        ValueError, match=r"holds no picture .* by a pattern such as 'folder/\*.tar'"
    ):
        find_items([tmp_path])


def test_a_parquet_file_without_pictures(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="has no column bytes or image or path, but text"):
        find_items([tmp_path / "a.parquet"])
    parquet.write_table(pa.table({"bytes": pa.array([None], pa.binary())}), tmp_path / "b.parquet")
    (item,) = find_items([tmp_path / "b.parquet"])
    with pytest.raises(ImageError, match="holds neither bytes nor a path"):
        read(item)


def test_names_that_are_no_unicode(model: SigLipVisionModel, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / os.fsdecode(b"\xff.png"))
    embed([folder], tmp_path / "out", model, **HOW)
    (row,) = rows(tmp_path / "out")
    assert row["id"] == "\\xff.png"
    assert row["embedding"]


def test_a_file_that_goes_away_is_a_row_with_an_error(
    model: SigLipVisionModel, tmp_path: Path
) -> None:
    with pytest.raises(ImageError, match="No such file"):
        read(Item("a", str(tmp_path / "a.png")))


def test_a_tar_file_that_names_itself_for_ever(tmp_path: Path) -> None:
    """A size of -512 leads back to the same header."""
    member = tarfile.TarInfo("a.jpg")
    header = bytearray(member.tobuf())
    header[124:136] = b"\xff" * 10 + (0x10000 - 512).to_bytes(2, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "a.tar").write_bytes(bytes(header) + bytes(10240))
    with pytest.raises(
        ValueError, match=r"a.tar cannot be read as a tar file"
    ):  # by newer Pythons themselves
        find_items([tmp_path / "a.tar"])


@pytest.mark.parametrize("naflex", [False, True])
def test_without_resizing_a_picture_that_does_not_fit_is_a_row(
    naflex: bool, tmp_path: Path
) -> None:
    model, folder = SigLipVisionModel(replace(SMALL, naflex=naflex)).eval(), tmp_path / "in"
    randomise(model, seed=0)
    model.preprocessor_config = {**processors.default(model.config), "do_resize": False}
    folder.mkdir()
    for number, size in enumerate([(16, 16), (40, 61), (16, 16), (2, 3)]):
        Image.new("RGB", size, (number, 90, 9)).save(folder / f"{number}.png")
    embed([folder], tmp_path / "out", model, **HOW)
    assert [bool(row["error"]) for row in rows(tmp_path / "out")] == [False, True, False, True]


def test_torchvision_is_missed_before_anything_is_written(
    photos: Path, model: SigLipVisionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.transforms.v2", None)
    with pytest.raises(ValueError, match="needs torchvision"):
        embed([photos], tmp_path / "out", model, **HOW, backend="torchvision")
    assert not (tmp_path / "out").exists()


def test_a_parquet_file_that_changes_is_no_end(tmp_path: Path) -> None:
    pictures, file = pa.table({"bytes": [b"x" * 1000] * 4}), tmp_path / "a.parquet"
    parquet.write_table(pictures, file, row_group_size=2)
    items = find_items([file])
    parquet.write_table(pictures.slice(0, 1), file)
    for item in items[1:]:
        with pytest.raises(ImageError, match="the parquet file cannot be read: "):
            read(item)
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ImageError, match=r"the parquet file cannot be read: .*footer"):
        read(items[3])
    paths = pa.array([b"\xff.jpg"], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"path": paths}), file)
    with pytest.raises(ImageError, match=r"the parquet file cannot be read: .*codec"):
        read(find_items([file])[0])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number from 1 on, got 0"),
        ({"workers": -1}, "workers must be a whole number from 0 on, got -1"),
        ({"threads": 0}, "threads must be a whole number from 1 on, got 0"),
        ({"shard_size": True}, "shard_size must be"),
        ({"output": "both"}, "output must be pooled or tokens"),
        ({"output": "tokens", "normalize": True}, "are not normalised"),
        ({"form": "fast"}, "form must be one of eager, packed,"),
        ({"address": "auto"}, "an address is that of a Ray cluster"),
        ({"engine": "spark"}, "engine local or ray, got 'parquet' and 'spark'"),
        ({"format": "csv"}, "format must be parquet or npy"),
    ],
)
def test_wrong_arguments(
    how: dict[str, Any], message: str, photos: Path, model: SigLipVisionModel, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        embed([photos], tmp_path / "out", model, **{**HOW, **how})
    assert not (tmp_path / "out").exists()


def test_models_that_make_no_vectors(photos: Path, tmp_path: Path) -> None:
    headless = SigLipVisionModel(replace(SMALL, pooling_head=False)).eval()
    with pytest.raises(ValueError, match="no pooling head"):
        embed([photos], tmp_path / "out", headless, **HOW)
    with pytest.raises(ValueError, match="model must be a SigLipVisionModel"):
        embed([photos], tmp_path / "out", "model", **HOW)  # type: ignore[arg-type]


# --- the commands ---------------------------------------------------------------------------------


def test_the_commands(photos: Path, tower: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["embed", photos, "-o", out, "--model", tower, "--batch-size", 8, "--workers", 0]
    told = json.loads(command(*arguments, "--form", "eager", "--json", code=3).stdout)
    assert (told["done"], told["failed"], told["fresh"]) == (50, len(broken(photos)), 50)
    assert all(told[kind] > 0 for kind in ("decoding", "preprocessing", "model", "writing"))
    assert "50 of 50 pictures in" in command(*arguments, code=3).stdout
    assert (
        "holds rows of another run: normalize was"
        in command(*arguments, "--normalize", code=1).stderr
    )
    query = next(row for row in rows(out) if not row["error"])
    nearest = json.loads(command("search", out, query["path"], "-k", 3, "--json").stdout)["nearest"]
    assert nearest[0]["id"] == query["id"]
    assert nearest[0]["cosine"] == pytest.approx(1, abs=1e-5)
    assert len(nearest) == 3
    assert command("search", out, query["path"]).stdout.startswith("1.0000  ")
    good = tmp_path / "good"
    good.mkdir()
    (good / "a.png").write_bytes((photos / query["id"]).read_bytes())
    command(
        "embed",
        good,
        "-o",
        tmp_path / "b",
        "--model",
        tower,
        "--form",
        "eager",
        "--workers",
        0,
        code=0,
    )


def test_the_line_of_a_run_fits_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, terminal = os.openpty()
    with open(terminal, "w") as stderr, open(screen, "rb", buffering=0) as seen:  # noqa: PTH123 (descriptors)
        monkeypatch.setattr(sys, "stderr", stderr)
        monkeypatch.setenv("COLUMNS", "30")
        progress = embedding.Progress(
            total=10_000, done=5000, failed=47, fresh=100, seconds=10.0, model=9.0
        )
        line = commands._Line()
        line.show(commands._progress(progress))
        assert seen.read(1000).decode() == "\r\033[K5000/10000, 47 failed, 10.0 p"
        monkeypatch.setenv("COLUMNS", "200")
        line.last = 0.0
        line.show(commands._progress(progress))
        told = "10.0 pictures/s, 8 min left: model 90%, waiting 0%, writing 0%, decoding 0%, preprocessing 0%"
        assert seen.read(1000).decode() == f"\r\033[K5000/10000, 47 failed, {told}"
        line.clear()
        assert seen.read(1000).decode() == "\r\033[K"


def test_commands_that_cannot_be_done(photos: Path, tower: Path, tmp_path: Path) -> None:
    assert (
        "does not exist"
        in command("embed", tmp_path / "no", "-o", "out", "--model", tower, code=1).stderr
    )
    assert (
        "cannot be used here"
        in command(
            "embed", photos, "-o", "out", "--model", tower, "--device", "cuda:9", code=2
        ).output
    )
    wrong = command(
        "embed", photos, "-o", "out", "--model", tower, "--form", "quick", code=2
    ).output
    assert "'quick' is none of eager, packed" in " ".join(wrong.replace("│", " ").split())
    assert "holds no vectors" in command("search", tmp_path, photos / "x.png", code=1).stderr


def test_nearest_is_by_cosine(tmp_path: Path) -> None:
    vectors = np.array([[3.0, 0], [1, 1], [0, 2], [-1, 0]], dtype=np.float32)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), 2)
    errors = pa.array([None, None, None, "no"], pa.string())
    table = pa.table(
        {"id": list("abcd"), "path": list("abcd"), "embedding": lists, "error": errors}
    )
    parquet.write_table(table, tmp_path / "part-000000.parquet")
    found = search(tmp_path, torch.tensor([1.0, 0.9]), 2)
    assert [name for _, name, _ in found] == ["b", "a"]
    with pytest.raises(EmbedError, match="holds no vectors"):
        vector_like(tmp_path, "a.png")
    (tmp_path / "_run.json").write_text('{"output": "pooled"}')
    with pytest.raises(EmbedError, match="is not of this program"):
        vector_like(tmp_path, "a.png")


def test_other_weights_are_not_searched_with(
    photos: Path, model: SigLipVisionModel, tmp_path: Path
) -> None:
    embed([photos], tmp_path / "out", model, **HOW)
    other = SigLipVisionModel(SMALL).eval()
    randomise(other, seed=1)
    other.save_hf(tmp_path / "other")
    with pytest.raises(EmbedError, match="are of other weights"):
        vector_like(tmp_path / "out", photos / "a.png", source=str(tmp_path / "other"))
