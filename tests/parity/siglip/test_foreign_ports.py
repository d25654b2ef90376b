"""Ports that are no module: loading them, and judging their outputs."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import cast

import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from torch import Tensor, nn

from siglip_port import SigLipVisionModel
from siglip_port.parity.siglip import against, foreign_ports, reference
from siglip_port.parity.siglip.cases import Case, random_case
from siglip_port.parity.siglip.foreign_ports import ForeignPortError
from siglip_port.parity.siglip.sample_images import synthetic_image
from tests.helpers.checkpoints import SMALL


def test_evenly_spaced_images() -> None:
    assert against.evenly_spaced(3, 64) == [0, 1, 2]
    for length in (64, 65, 127, 1000):
        chosen = against.evenly_spaced(length, 64)
        assert len(set(chosen)) == 64
        assert (chosen[0], chosen[-1]) == (0, length - 1)


class Pool(nn.Module):
    """Mean over pixels: [B, 3, S, S] -> [B, 3]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def write_onnx(path: Path, batch: int | str) -> None:
    from onnx import TensorProto, helper, save

    shape = [batch, 3, 4, 4]
    graph = helper.make_graph(
        [helper.make_node("ReduceMean", ["x", "axes"], ["image_embeds"], keepdims=0)],
        "pool",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("image_embeds", TensorProto.FLOAT, [batch, 3])],
        [helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    save(helper.make_model(graph, opset_imports=model.opset_import, ir_version=9), path)


def write_openvino(path: Path, batch: int | str) -> None:
    import openvino

    size = batch if isinstance(batch, int) else -1
    program = torch.export.export(Pool(), (torch.zeros(2, 3, 4, 4),))
    model = openvino.convert_model(program)
    model.reshape([size, 3, 4, 4])
    openvino.save_model(model, path)


def write_program(path: Path, batch: int | str) -> None:
    dim = {0: torch.export.Dim("batch")} if isinstance(batch, str) else {}
    example = torch.zeros(2, 3, 4, 4)
    torch.export.save(torch.export.export(Pool(), (example,), dynamic_shapes=(dim,)), path)


@pytest.mark.parametrize(
    ("name", "write", "batch"),
    [
        ("pool.onnx", write_onnx, "batch"),
        ("pool.onnx", write_onnx, 2),
        ("pool.xml", write_openvino, "batch"),
        ("pool.xml", write_openvino, 2),
        ("pool.pt2", write_program, "batch"),
    ],
)
def test_file(
    tmp_path: Path, name: str, write: Callable[[Path, int | str], None], batch: int | str
) -> None:
    write(tmp_path / name, batch)
    port = foreign_ports.load_pixel_port(str(tmp_path / name))
    x = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    outputs = port(x)
    assert outputs.keys() == {"pooled"}
    torch.testing.assert_close(outputs["pooled"], x.mean((2, 3)))


@pytest.mark.parametrize("name", ["x.onnx", "x.xml", "x.pt2"])
def test_damaged_or_missing_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(ForeignPortError, match="no such file"):
        foreign_ports.load_pixel_port(str(tmp_path / name))
    (tmp_path / name).write_bytes(b"not a model")
    with pytest.raises(ForeignPortError, match="cannot be loaded"):
        foreign_ports.load_pixel_port(str(tmp_path / name))


@pytest.mark.parametrize(
    ("result", "names"),
    [
        (torch.zeros(2, 4), {"pooled"}),
        (torch.zeros(2, 3, 4), {"tokens"}),
        ((torch.zeros(2, 3, 4), torch.zeros(2, 4)), {"tokens", "pooled"}),
        ({"last_hidden_state": torch.zeros(2, 3, 4), "mask": torch.zeros(2)}, {"tokens"}),
        (torch.zeros(2, 4).numpy(), {"pooled"}),
    ],
)
def test_names_of_outputs(result: object, names: set[str]) -> None:
    assert foreign_ports.name_result(result).keys() == names


def test_unknown_outputs() -> None:
    with pytest.raises(ForeignPortError, match=r"expected an output of shape .* got \[2\]"):
        foreign_ports.name_result(torch.zeros(2))


@pytest.mark.parametrize(
    ("target", "message"),
    [("no_such_module:f", "cannot be imported"), ("math:pi", "expected a function, got float")],
)
def test_wrong_function(target: str, message: str) -> None:
    with pytest.raises(ForeignPortError, match=message):
        foreign_ports.load_pixel_port(target)


@pytest.mark.parametrize(
    ("target", "expected"),
    [("a.b:c", True), ("a.onnx", True), ("photos", False), ("C:\\photos", False), ("a:", False)],
)
def test_is_pixel_port(target: str, expected: bool) -> None:
    assert foreign_ports.is_pixel_port(target) is expected


# --- judged on a checkpoint -----------------------------------------------------------------------

IMAGES = {"a": synthetic_image(), "b": synthetic_image().rotate(90)}


@pytest.fixture(scope="module")
def case() -> Iterator[Case]:
    with random_case(SMALL, "N1") as case:
        yield case


@pytest.fixture(scope="module")
def model(case: Case) -> SigLipVisionModel:
    return SigLipVisionModel.from_hf(case.source)


def process(image: Image.Image) -> Tensor:
    processors = reference.image_processors(SMALL)
    return processors["pil"](image)["pixel_values"]


def judge(target: str, case: Case) -> tuple[bool, str]:
    comparison = against.judge_target(target, case, process, IMAGES["a"], torch.float32)
    return comparison.equal, str(comparison)


def encode(model: SigLipVisionModel, pixel_values: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        tokens = model(pixel_values)
        return {"tokens": tokens, "pooled": model.pool(tokens)}


def test_function_is_equal(
    case: Case, model: SigLipVisionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        foreign_ports, "encode", lambda pixel_values: encode(model, pixel_values), raising=False
    )
    equal, text = judge("siglip_port.parity.siglip.foreign_ports:encode", case)
    assert equal, text


@pytest.mark.parametrize("size", [1, 2, 3])
def test_function_that_is_wrong_for_one_batch_size(
    case: Case, model: SigLipVisionModel, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    def encode_wrongly(pixel_values: Tensor) -> Tensor:
        scale = 1.001 if len(pixel_values) == size else 1.0
        return encode(model, pixel_values)["pooled"] * scale

    monkeypatch.setattr(foreign_ports, "encode", encode_wrongly, raising=False)
    equal, text = judge("siglip_port.parity.siglip.foreign_ports:encode", case)
    assert not equal
    assert "pooled: error in float32" in text


def test_function_that_raises(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(pixel_values: Tensor) -> Tensor:
        raise AssertionError

    monkeypatch.setattr(foreign_ports, "encode", fail, raising=False)
    equal, text = judge("siglip_port.parity.siglip.foreign_ports:encode", case)
    assert not equal
    assert "the port raises AssertionError" in text


def vectors(model: SigLipVisionModel, *, normalize: bool) -> list[list[float]]:
    with torch.no_grad():
        pixel_values = torch.cat([process(image) for image in IMAGES.values()])
        embeddings: list[list[float]] = model.embed(pixel_values, normalize=normalize).tolist()
    return embeddings


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("wrong", [False, True])
def test_parquet(
    case: Case, model: SigLipVisionModel, tmp_path: Path, normalize: bool, wrong: bool
) -> None:
    for name, image in IMAGES.items():
        image.save(tmp_path / f"{name}.png")
    embeddings = vectors(model, normalize=normalize)
    if wrong:
        embeddings.reverse()
    table = pa.table({"path": ["a.png", "b.png"], "embedding": embeddings})
    parquet.write_table(table, tmp_path / "vectors.parquet")
    equal, text = judge(str(tmp_path / "vectors.parquet"), case)
    assert equal is not wrong, text


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"path": ["a.png"]}, "expected a column embedding or vector, found path"),
        ({"embedding": [[1.0]]}, "expected a column path or id, found embedding"),
        ({"path": ["a", "b"], "embedding": [[1.0], [1.0, 2.0]]}, "vectors of one length"),
        ({"path": ["gone.png"], "embedding": [[1.0]]}, "'gone.png' not found"),
    ],
)
def test_wrong_parquet(
    case: Case, tmp_path: Path, columns: dict[str, list[object]], message: str
) -> None:
    parquet.write_table(pa.table(columns), tmp_path / "vectors.parquet")
    with pytest.raises(ForeignPortError, match=message):
        judge(str(tmp_path / "vectors.parquet"), case)


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[dict[str, object]], object]], str]]:
    servers = []

    def start(answer: Callable[[dict[str, object]], object]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(answer(body)).encode())

            def log_message(self, *_: object) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/embeddings"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("scale", [1.0, 1.001])
def test_service(
    case: Case,
    model: SigLipVisionModel,
    serve: Callable[[Callable[[dict[str, object]], object]], str],
    scale: float,
) -> None:
    def answer(body: dict[str, object]) -> object:
        uri = cast(list[str], body["input"])[0]
        file = io.BytesIO(base64.b64decode(uri.partition(",")[2]))
        with torch.no_grad():
            vector = model.embed(process(Image.open(file)))[0] * scale
        return {"data": [{"embedding": vector.tolist()}]}

    equal, text = judge(serve(answer), case)
    assert equal is (scale == 1.0), text


def test_service_without_vector(
    case: Case, serve: Callable[[Callable[[dict[str, object]], object]], str]
) -> None:
    with pytest.raises(ForeignPortError, match="expected an embedding, got"):
        judge(serve(lambda body: {"error": "no model"}), case)


def test_no_service(case: Case) -> None:
    with pytest.raises(ForeignPortError, match="no answer that can be read"):
        judge("http://127.0.0.1:9/embeddings", case)


def test_unknown_target(case: Case) -> None:
    with pytest.raises(ValueError, match="--against must be a golden folder, vectors"):
        judge("somewhere", case)
