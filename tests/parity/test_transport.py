from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from siglip_port.parity import transport

DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.uint8,
    torch.bool,
)


def round_trip(content: object, folder: Path) -> Any:  # noqa: ANN401 (what was sent)
    stream = io.BytesIO()
    transport.send(stream, content, folder)
    stream.seek(0)
    return transport.receive(stream)


@pytest.fixture(params=["within the message", "in a file"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder for large tensors; with the second parameter, every tensor is large."""
    if request.param == "in a file":
        monkeypatch.setattr(transport, "INLINE_BYTES", 0)
    return tmp_path


def random_tensor(dtype: torch.dtype) -> Tensor:
    noise = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    return (100 * noise).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_all_dtypes(dtype: torch.dtype, folder: Path) -> None:
    tensor = random_tensor(dtype)
    result = round_trip({"a": [tensor, "text"], "b": tensor[1]}, folder)
    assert result["a"][0].dtype == dtype
    assert torch.equal(result["a"][0], tensor)
    assert result["a"][1] == "text"
    assert torch.equal(result["b"], tensor[1])
    assert not list(folder.iterdir())


def test_tensors_of_all_layouts(folder: Path) -> None:
    noise = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        computed = noise * 2
    tensors = [
        noise.to(memory_format=torch.channels_last),
        noise[:, 1:, ::2],
        noise[:1].expand(4, -1, -1, -1),
        torch.tensor(3.5),
        torch.empty(0, 7),
        nn.Parameter(noise),
        computed,
    ]
    for tensor, result in zip(tensors, round_trip(tensors, folder), strict=True):
        assert result.shape == tensor.shape
        assert torch.equal(result, tensor)


def test_special_values_keep_their_bits(folder: Path) -> None:
    tensor = torch.tensor([torch.nan, torch.inf, -0.0, 1e-45])
    result = round_trip(tensor, folder)
    assert torch.equal(result.view(torch.int32), tensor.view(torch.int32))


def test_tensor_in_two_places_is_sent_once(tmp_path: Path) -> None:
    tensor = torch.zeros(1000)
    stream = io.BytesIO()
    transport.send(stream, [tensor] * 50, tmp_path)
    assert len(stream.getvalue()) < 10_000


def test_received_tensors_can_be_changed(folder: Path) -> None:
    tensor = torch.zeros(3)
    result = round_trip(tensor, folder)
    result += 1
    assert result.tolist() == [1, 1, 1]
    assert tensor.tolist() == [0, 0, 0]


def test_file_is_read_without_mapping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, where a mapped file cannot be deleted."""
    monkeypatch.setattr(transport, "INLINE_BYTES", 0)
    monkeypatch.setattr(transport, "CAN_DELETE_MAPPED_FILES", False)
    tensor = torch.arange(1000)
    assert torch.equal(round_trip(tensor, tmp_path), tensor)
    assert not list(tmp_path.iterdir())


def test_content_that_cannot_be_pickled_writes_nothing(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with pytest.raises((AttributeError, pickle.PicklingError)):
        transport.send(stream, [torch.zeros(3), lambda: None], tmp_path)
    assert not stream.getvalue()


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transport, "memory_of", fail)
    message = (
        r": 2 MB of tensors cannot be written \(.*No space left on device\); set TMPDIR to a "
        r"folder with more free space"
    )
    with pytest.raises(OSError, match=message):
        transport.send(io.BytesIO(), torch.zeros(500_000), tmp_path)
    assert not list(tmp_path.iterdir())


def test_end_of_pipe(tmp_path: Path) -> None:
    stream = io.BytesIO()
    transport.send(stream, "text", tmp_path)
    content = stream.getvalue()
    for length in (0, 3, len(content) - 1):
        with pytest.raises(EOFError):
            transport.receive(io.BytesIO(content[:length]))


def test_modules_that_must_not_be_imported(tmp_path: Path) -> None:
    stream = io.BytesIO()
    transport.send(stream, [Path("a"), ValueError], tmp_path)
    stream.seek(0)
    with pytest.raises(pickle.UnpicklingError, match=r"^pathlib\.\S+ must not be imported in this"):
        transport.receive(stream, lambda name: name != "pathlib")


class ThreeArgumentsError(OSError):
    def __init__(self, a: int, b: int, c: int) -> None:
        super().__init__(f"{a} {b} {c}")


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (ValueError("wrong"), ValueError, "wrong"),
        (torch.OutOfMemoryError("full"), torch.OutOfMemoryError, "full"),
        (ThreeArgumentsError(1, 2, 3), OSError, "1 2 3"),
    ],
)
def test_portable_errors(error: Exception, kind: type[Exception], text: str) -> None:
    result = transport.portable(error, lambda _: True)
    assert type(result) is kind
    assert str(result) == text


def test_portable_error_of_a_module_that_must_not_be_imported() -> None:
    result = transport.portable(torch.OutOfMemoryError("full"), lambda name: name != "torch")
    assert type(result) is RuntimeError
    assert str(result) == "full"
