"""Inputs of a run: listing and reading images."""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from siglip_port import SigLipVisionModel
from siglip_port.embed import embed
from siglip_port.embed.inputs import Item, find_items, read
from siglip_port.image_processing import ImageError
from siglip_port.image_reading import MAX_FILE_BYTES
from tests.helpers.embedding import OPTIONS, image_names, image_paths, read_column, read_rows


def ids_of(items: list[Item]) -> list[str]:
    return [item.id for item in items]


def contents_of(items: list[Item]) -> list[bytes]:
    return [read(item) for item in items]


def read_photos(photos: Path) -> list[bytes]:
    return [Path(path).read_bytes() for path in image_paths(photos)]


def write_tar(path: Path, names: list[str], contents: list[bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in zip(names, contents, strict=True):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
            tar.addfile(tarfile.TarInfo(name + ".json"))


@pytest.fixture(scope="module")
def archives(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photos as a tar file, as Parquet files with each image column, and as a list."""
    folder = tmp_path_factory.mktemp("archives")
    names = image_names(photos)
    contents = read_photos(photos)
    paths = image_paths(photos)
    structs = [{"bytes": data, "path": name} for name, data in zip(names, contents, strict=True)]
    write_tar(folder / "a.tar", names, contents)
    for column, values in (("bytes", contents), ("image", structs), ("path", paths)):
        table = pa.table({"id": names, column: values})
        parquet.write_table(table, folder / f"{column}.parquet", row_group_size=7)
    (folder / "list.txt").write_text("\r\n".join(paths) + "\n\n", "utf-8-sig")
    return folder


def test_items_of_folder(photos: Path) -> None:
    items = find_items([photos])
    assert ids_of(items) == image_names(photos)
    assert contents_of(items) == read_photos(photos)


@pytest.mark.parametrize("name", ["a.tar", "bytes.parquet", "image.parquet", "path.parquet"])
def test_items_of_archive(name: str, archives: Path, photos: Path) -> None:
    items = find_items([archives / name])
    assert ids_of(items) == image_names(photos)
    assert contents_of(items) == read_photos(photos)


def test_items_of_list(archives: Path, photos: Path) -> None:
    items = find_items([archives / "list.txt"])
    assert contents_of(items) == read_photos(photos)


def test_items_of_pattern(archives: Path, photos: Path) -> None:
    items = find_items([f"{archives}/*.[tp]ar*"])
    assert contents_of(items) == read_photos(photos) * 4
    ids = [f"{archives}/a.tar/{name}" for name in image_names(photos)]
    assert ids_of(items[:50]) == ids
    images = [path for path in image_paths(photos) if path.endswith("g")]
    assert ids_of(find_items([f"{photos}/**/*.*g"])) == images


def test_embed_parquet_input(
    archives: Path, finished_run: Path, model: SigLipVisionModel, tmp_path: Path
) -> None:
    embed([archives / "bytes.parquet"], tmp_path, model, **OPTIONS)
    assert read_column(tmp_path, "id") == read_column(finished_run, "id")
    vectors = repr(read_column(tmp_path, "embedding"))
    assert vectors == repr(read_column(finished_run, "embedding"))


def test_ids_of_several_inputs_are_distinct(tmp_path: Path) -> None:
    first = tmp_path / "one"
    second = tmp_path / "two"
    for folder in (first, second):
        folder.mkdir()
        Image.new("RGB", (4, 4)).save(folder / "a.png")
    assert ids_of(find_items([first, second])) == [f"{first}/a.png", f"{second}/a.png"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no", None, "no: does not exist; pass a folder, a file or a quoted pattern"),
        ("a.tar", b"no tar" * 200, "a.tar: cannot be read as an uncompressed tar file"),
        ("a.parquet", b"no parquet", "a.parquet: cannot be read as a Parquet file"),
        ("a.txt", b"\xff\xfe\xff", "a.txt: cannot be read as a list of paths"),
        ("b.txt", b"\n\n", "b.txt: no images found"),
        ("folder", None, "does not exist"),
        ("a.tar.gz", b"", "compressed archives are not supported; unpack it"),
    ],
)
def test_unusable_input(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        find_items([tmp_path / name])


def test_input_without_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no inputs; pass folders, files or patterns"):
        find_items([])
    with pytest.raises(ValueError, match=r"\*.jpg: no file matches this pattern"):
        find_items([tmp_path / "*.jpg"])
    message = r"no images found .* as a pattern such as 'folder/\*.tar'"
    with pytest.raises(ValueError, match=message):
        find_items([tmp_path])


def test_parquet_input_without_images(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(
        ValueError, match="no image column; expected bytes or image or path, found text"
    ):
        find_items([tmp_path / "a.parquet"])
    parquet.write_table(pa.table({"bytes": pa.array([None], pa.binary())}), tmp_path / "b.parquet")
    (item,) = find_items([tmp_path / "b.parquet"])
    with pytest.raises(ImageError, match="the row contains neither bytes nor a path"):
        read(item)


def test_parquet_input_without_ids(tmp_path: Path) -> None:
    table = pa.table({"bytes": [b"a", b"b", b"c"]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    ids = ids_of(find_items([tmp_path / "a.parquet"]))
    assert ids == ["a.parquet:0:0", "a.parquet:0:1", "a.parquet:1:0"]


def test_changed_parquet_input(tmp_path: Path) -> None:
    table = pa.table({"bytes": [b"x" * 1000] * 4})
    file = tmp_path / "a.parquet"
    parquet.write_table(table, file, row_group_size=2)
    items = find_items([file])
    parquet.write_table(table.slice(0, 1), file)
    for item in items[1:]:
        with pytest.raises(ImageError, match="the Parquet file cannot be read: "):
            read(item)
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ImageError, match=r"the Parquet file cannot be read: .*footer"):
        read(items[3])
    paths = pa.array([b"\xff.jpg"], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"path": paths}), file)
    with pytest.raises(ImageError, match=r"the Parquet file cannot be read: .*codec"):
        read(find_items([file])[0])


def test_deleted_file(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="No such file"):
        read(Item("a", str(tmp_path / "a.png")))


def test_truncated_tar(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", ["a.jpg"], [b"x" * 1000])
    (item,) = find_items([tmp_path / "a.tar"])
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:700])
    with pytest.raises(ImageError, match="the tar file is truncated inside the image"):
        read(item)


def test_tar_member_of_negative_size(tmp_path: Path) -> None:
    """A size of -512 makes the next header the same one."""
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf())
    header[124:136] = b"\xff" * 10 + (0x10000 - 512).to_bytes(2, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "a.tar").write_bytes(bytes(header) + bytes(10240))
    # Newer releases of Python reject it themselves.
    with pytest.raises(ValueError, match=r"a.tar: cannot be read as an uncompressed tar file"):
        find_items([tmp_path / "a.tar"])


def test_folder_with_links_pipes_and_huge_files(model: SigLipVisionModel, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "b").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for path in (folder / "b" / "1.png", tmp_path / "elsewhere" / "2.PNG", folder / "3.txt"):
        Image.new("RGB", (4, 4)).save(path, "PNG")
    (folder / "a").symlink_to(tmp_path / "elsewhere")
    (folder / "b" / "again").symlink_to(folder)
    os.mkfifo(folder / "c.png")
    (folder / "d.jpg").symlink_to(tmp_path / "absent.jpg")
    (folder / "e.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "f").symlink_to(tmp_path / "elsewhere")  # same target as `a`
    with (folder / "g.jpg").open("wb") as file:
        file.truncate(10**12)  # sparse: nothing is written
    embed([folder], tmp_path / "out", model, **OPTIONS)
    cannot = "the image cannot be read: "
    ids = read_column(tmp_path / "out", "id")
    errors = read_column(tmp_path / "out", "error")
    assert dict(zip(ids, errors, strict=True)) == {
        "c.png": cannot + "not a regular file",
        "d.jpg": cannot + "No such file or directory",
        "e.heic": cannot + "not an image format that Pillow supports",
        "g.jpg": cannot
        + f"file size 1,000,000,000,000 bytes exceeds the limit of {MAX_FILE_BYTES:,}",
        "a/2.PNG": None,
        "b/1.png": None,
    }


def test_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    scandir = os.scandir

    def refuse(path: str) -> Iterator[os.DirEntry[str]]:
        if str(path).endswith("a"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may list every folder
    with pytest.raises(ValueError, match=r"a: folder cannot be listed \(Permission denied\)"):
        find_items([tmp_path])


def test_file_name_that_is_not_unicode(model: SigLipVisionModel, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / os.fsdecode(b"\xff.png"))
    embed([folder], tmp_path / "out", model, **OPTIONS)
    (row,) = read_rows(tmp_path / "out")
    assert row["id"] == "\\xff.png"
    assert row["embedding"]


def test_urls(tmp_path: Path, model: SigLipVisionModel) -> None:
    """A URL ends the run before any work; in a Parquet file it is the error of its row."""
    url = "https://example.org/a.jpg?size=1"
    message = f"{url} is a URL; download the images first and pass their folder"
    with pytest.raises(ValueError, match=re.escape(message)):
        find_items([url])
    (tmp_path / "list.txt").write_text(f"a.png\n{url}\n")
    message = f"list.txt: {url} is a URL; download the images first, list the files"
    with pytest.raises(ValueError, match=re.escape(message)):
        find_items([tmp_path / "list.txt"])
    parquet.write_table(pa.table({"path": [url]}), tmp_path / "urls.parquet")
    embed([tmp_path / "urls.parquet"], tmp_path / "out", model, **OPTIONS)
    (error,) = read_column(tmp_path / "out", "error")
    assert error == "the image cannot be read: it is a URL; download it first, or pass its bytes"


def test_file_named_like_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("https:/host").mkdir(parents=True)
    Image.new("RGB", (3, 3)).save("https:/host/a.png")
    assert ids_of(find_items(["https:/host/a.png"])) == ["a.png"]
