from __future__ import annotations

import functools
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import transformers
from PIL import Image
from torch import Tensor, nn

from siglip_port import SigLipVisionModel
from siglip_port import model as port_module
from siglip_port.parity import transport
from siglip_port.parity.observe import run_reference
from siglip_port.parity.results import Finding
from siglip_port.parity.siglip import reference, reference_process
from siglip_port.parity.siglip.cases import Case, random_case
from siglip_port.parity.siglip.reference import Reference
from siglip_port.parity.siglip.reference_process import (
    IN_THIS_PROCESS,
    ReferenceProcess,
    ReferenceProcessError,
    load_processors,
)
from siglip_port.parity.siglip.sample_images import sample_images, synthetic_image
from siglip_port.parity.siglip.small_pixels import check_small_pixels
from siglip_port.threads import torch_threads
from tests.helpers.checkpoints import SMALL, edit_tensors, pixels

GATES = ("environment", "config", "weights", "sensitivity", "numerics", "rounding")
MODULES = "sorted(__import__('sys').modules)"


@pytest.fixture(scope="module")
def case(references: ReferenceProcess) -> Iterator[Case]:
    with random_case(SMALL, "N1", gates=GATES, references=references) as case:
        yield case


def findings(case: Case) -> list[Finding]:
    port = SigLipVisionModel.from_hf(case.source)
    return [finding for gate in case.check(port) for finding in gate.findings]


# --- the same results as in this process ----------------------------------------------------------


def test_port_passes_all_gates(case: Case) -> None:
    port = SigLipVisionModel.from_hf(case.source)
    results = list(case.check(port))
    assert [result.name for result in results] == [*GATES[:-1], "rounding float32"]
    assert [result.name for result in results if not result.passed] == []


def test_reference_is_the_same_in_both_places(case: Case) -> None:
    local = reference.load(case.source, pooling_head=True, dtype=torch.float32)
    remote = case.reference
    assert remote.config() == local.config()
    assert remote.hf_config() == local.hf_config()
    assert remote.module_types() == local.module_types()
    expected = local.state_dict()
    tensors = remote.state_dict()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_wrong_port_gets_the_same_findings_with_hints(case: Case) -> None:
    local = Case(**{**vars(case), "reference_runs": {}})
    local.reference = reference.load(case.source, pooling_head=True, dtype=torch.float32)
    texts = []
    for place in (case, local):
        port = SigLipVisionModel.from_hf(case.source)
        block = port.transformer.encoder.encoder_blocks[1]
        assert isinstance(block.layer_norm2, nn.LayerNorm)
        block.layer_norm2.eps = 1e-3
        results = place.check(port)
        texts.append([str(finding) for gate in results for finding in gate.findings])
    assert texts[0] == texts[1]
    assert any("looks like: eps 0.001 instead of 1e-06" in text for text in texts[0])


@pytest.mark.parametrize("naflex", [False, True])
def test_image_processors(references: ReferenceProcess, naflex: bool) -> None:
    """Images of every kind survive the way to the other process."""
    config = reference.fields_of(SMALL)
    config.naflex = naflex  # type: ignore[misc]
    local = load_processors(IN_THIS_PROCESS, config)
    remote = load_processors(references, config)
    assert list(remote) == list(local)
    for name, sample in sample_images(synthetic_image()):
        expected = local["pil"](sample)
        pixels = remote["pil"](sample)
        assert pixels.keys() == expected.keys()
        assert all(torch.equal(pixels[key], expected[key]) for key in expected), name


def test_errors_keep_type_and_message(references: ReferenceProcess, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^recipe must be one of .*, got 'X9'") as error:
        references.call(
            reference.write_random_checkpoint, tmp_path, reference.fields_of(SMALL), 1, "X9"
        )
    assert str(error.value).endswith("got 'X9'")
    assert "In the reference's process:\nTraceback" in error.value.__notes__[0]
    with pytest.raises(OSError, match="absent"):
        references.load(tmp_path / "absent", pooling_head=True, dtype=torch.float32)


def test_weights_with_nan_are_refused(references: ReferenceProcess, tmp_path: Path) -> None:
    reference.write_random_checkpoint(tmp_path, SMALL)
    edit_tensors(tmp_path, lambda t: {**t, "head.probe": t["head.probe"] * torch.nan})
    loaded = references.load(tmp_path, pooling_head=True, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"^the reference's weights contain NaN or Inf in float32"):
        run_reference(loaded.side(), pixels(SMALL), [], torch.float32)


# --- tampering ------------------------------------------------------------------------------------


def test_patched_activation(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The port computes exact GELU for everything in its process."""
    gelu = F.gelu
    monkeypatch.setattr(F, "gelu", lambda x, approximate="none": gelu(x))
    tanh = functools.partial(F.gelu, approximate="tanh")
    monkeypatch.setitem(port_module.ACTIVATIONS, "gelu_pytorch_tanh", tanh)
    first = findings(case)[0]
    assert first.reference == "encoder.layers.0.mlp.fc2:input"
    assert first.hint == "exact (erf) GELU instead of tanh GELU"


def test_patched_layer(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(norm: nn.LayerNorm, x: Tensor) -> Tensor:
        return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, 1e-3)

    monkeypatch.setattr(nn.LayerNorm, "forward", forward)
    first = findings(case)[0]
    assert first.reference == "encoder.layers.0.layer_norm1"
    assert first.hint == "eps 0.001 instead of 1e-06"


def test_patched_attention(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = F.scaled_dot_product_attention

    def scaled(query: Tensor, *others: Tensor, **options: object) -> Tensor:
        return attention(query * 1.01, *others, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "scaled_dot_product_attention", scaled)
    assert findings(case)[0].reference == "encoder.layers.0.self_attn.out_proj:input"


def test_patched_linear(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Linear, "forward", lambda linear, x: F.linear(x, linear.weight))
    places = [finding.reference for finding in findings(case)]
    assert "encoder.layers.0.self_attn.q_proj" in places


def test_patched_reference(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process has its own copy of transformers' classes."""

    def forward(mlp: nn.Module, x: Tensor) -> Tensor:
        return x * 0

    siglip = transformers.models.siglip.modeling_siglip
    monkeypatch.setattr(siglip.SiglipMLP, "forward", forward)
    monkeypatch.setattr(siglip.SiglipVisionModel, "forward", forward)
    monkeypatch.setattr(transformers.SiglipVisionModel, "from_pretrained", None)
    case.reference_runs.clear()
    assert findings(case) == []


def test_patched_pillow(references: ReferenceProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    resize = Image.Image.resize

    def resize_coarsely(image: Image.Image, size: tuple[int, int], *_: object) -> Image.Image:
        return resize(image, size, Image.Resampling.NEAREST)

    assert check_small_pixels(naflex=False, references=references).passed
    monkeypatch.setattr(Image.Image, "resize", resize_coarsely)
    result = check_small_pixels(naflex=False, references=references)
    assert result.findings[0].message.startswith("the image, pil: differs by up to ")


def test_process_imports_no_code_of_the_port(references: ReferenceProcess, case: Case) -> None:
    case.reference_run(torch.float32)
    modules = references.call(eval, MODULES)
    assert "transformers.models.siglip2.modeling_siglip2" in modules
    imported = {name for name in modules if name.partition(".")[0] == "siglip_port"}
    imported = {name for name in imported if not name.startswith("siglip_port.parity")}
    assert imported == {"siglip_port", "siglip_port.text"}
    assert references.call(eval, "hasattr(__import__('siglip_port'), '__version__')") is False


@pytest.mark.parametrize("name", ["siglip_port.model", "siglip_port.config", "siglip_port.cli"])
def test_process_refuses_code_of_the_port(references: ReferenceProcess, name: str) -> None:
    with pytest.raises(ImportError, match=rf"^{name} is code of the port, which the reference's "):
        references.call(eval, f"__import__({name!r})")
    with pytest.raises(pickle.UnpicklingError, match="must not be imported in this process"):
        references.call(len, SMALL)  # type: ignore[arg-type]


# --- the process ----------------------------------------------------------------------------------


def test_large_tensors_leave_no_files(references: ReferenceProcess) -> None:
    tensor = torch.arange(1 + transport.INLINE_BYTES, dtype=torch.float32)
    assert torch.equal(references.call(torch.neg, tensor), -tensor)
    assert not list(references.scratch.iterdir())


def test_number_of_threads_follows(references: ReferenceProcess) -> None:
    for number in (2, 1):
        with torch_threads(number):
            assert references.call(torch.get_num_threads) == number


def test_environment_of_process(case: Case) -> None:
    """TF32 is off, although torch allows it to cuDNN by default."""
    assert case.reference.check_environment().passed


def test_released_references_are_freed(references: ReferenceProcess, case: Case) -> None:
    host = references.load(case.source, pooling_head=True, dtype=torch.float32).side()
    assert isinstance(host, reference_process.RemoteHost)
    key = host.key
    assert references.released == []
    del host
    assert references.released == [key]
    references.call(len, "")
    assert references.released == []


@pytest.mark.parametrize("argument", [lambda: None, threading.Lock()], ids=["function", "lock"])
def test_what_cannot_be_pickled(references: ReferenceProcess, argument: object) -> None:
    message = r"cannot be called in the reference's process \(.*\); use a function of a module"
    with pytest.raises(ReferenceProcessError, match=message):
        references.call(id, argument)
    with pytest.raises(TypeError, match="lock"):
        references.call(threading.Lock)
    assert references.call(len, "abc") == 3


def test_prints_of_the_reference_do_not_disturb(references: ReferenceProcess) -> None:
    assert references.call(print, "a message of transformers", "\n" * 3) is None
    assert references.call(os.write, 1, b"bytes") == 5
    assert references.call(eval, "__import__('sys').stdin.read()") == ""


@pytest.fixture
def process(tmp_path: Path) -> Iterator[ReferenceProcess]:
    """A process that a test may end."""
    with ReferenceProcess(tmp_path, preload=False) as process:
        yield process


def test_process_that_ended(process: ReferenceProcess) -> None:
    message = r"^the reference's process ended \(exit code 7\); its messages are above"
    with pytest.raises(ReferenceProcessError, match=message):
        process.call(os._exit, 7)
    with pytest.raises(ReferenceProcessError, match=message):
        process.call(len, "")


def test_process_that_was_killed(process: ReferenceProcess) -> None:
    pid = process.call(os.getpid)
    message = r"ended \(exit code -9\); it was killed, probably for lack of memory: "
    with pytest.raises(ReferenceProcessError, match=message):
        process.call(os.kill, pid, signal.SIGKILL)


def test_interrupt_is_left_to_the_other_process(references: ReferenceProcess) -> None:
    os.kill(references.call(os.getpid), signal.SIGINT)
    assert references.call(len, "abc") == 3


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_process_ends_with_its_parent() -> None:
    """Also while it computes."""
    program = (
        "import os, threading, time\n"
        "from pathlib import Path\n"
        "from siglip_port.parity.siglip.reference_process import ReferenceProcess\n"
        "with ReferenceProcess(Path(), preload=False) as process:\n"
        "    pid = process.call(os.getpid)\n"
        "    threading.Thread(target=process.call, args=(time.sleep, 999), daemon=True).start()\n"
        "    time.sleep(0.5)\n"
        "    print(pid, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    pid = int(run.stdout)
    deadline = time.monotonic() + 60
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_local_references_stay_in_this_process(tmp_path: Path) -> None:
    with random_case(SMALL, "N1") as case:
        assert isinstance(case.reference, Reference)
        assert case.reference.compute(lambda side: side.module) is case.reference.model
