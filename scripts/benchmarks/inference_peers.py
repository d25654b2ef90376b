"""The peers of scripts/benchmarks/inference.py: this port and what else runs the same model."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from siglip_port import SigLipVisionConfig, SigLipVisionModel, optimize
from siglip_port.parity import randomize

MODELS = {
    "base": SigLipVisionConfig(pooling_head=True),
    "so400m": SigLipVisionConfig(
        embed_dim=1152,
        image_size=384,
        patch_size=14,
        num_attention_heads=16,
        num_encoder_blocks=27,
        mlp_hidden_dim=4304,
        pooling_head=True,
    ),
    "tiny": SigLipVisionConfig(
        embed_dim=96,
        image_size=64,
        num_attention_heads=2,
        num_encoder_blocks=2,
        mlp_hidden_dim=192,
        pooling_head=True,
    ),
}
TIMM_NAMES = {"base": "ViT-B-16-SigLIP", "so400m": "ViT-SO400M-14-SigLIP-384"}

BASELINE = "transformers sdpa"
INT8 = "siglip_port optimize, int8"

MAX_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.05}
"""Largest difference from our float32 vectors, over the largest number, of a peer that is timed."""

Run = Callable[[Tensor], Tensor]
"""[B, C, S, S] -> pooled [B, D], by way of all tokens."""

Module = TypeVar("Module", bound=nn.Module)


@dataclass
class Bench:
    """What all peers share: the weights, as our model and as folders, and where to run.

    Attributes:
        model: ours, on the CPU, float32.
        folder: with `hf` and `timm` in it.
        name: of the model, a key of `MODELS`.
        device: where to run.
        dtype: of all.
        agreement: of each peer's vectors with ours in float32.
        left_out: peers that are not timed, with the reason.
    """

    model: SigLipVisionModel
    folder: Path
    name: str
    device: str
    dtype: torch.dtype
    agreement: dict[str, dict[str, float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def is_float32_on_cpu(self) -> bool:
        """Whether everything that only runs so can run."""
        return self.dtype == torch.float32 and self.device == "cpu"

    def place(self, module: Module) -> Module:
        """Bring a module to the device and dtype."""
        return module.to(self.device, self.dtype).eval()

    def images(self, batch_size: int) -> Tensor:
        """Noise in [-1, 1]: [B, 3, S, S]."""
        size = self.model.config.image_size
        generator = torch.Generator().manual_seed(1)
        noise = torch.rand((batch_size, 3, size, size), generator=generator) * 2 - 1
        return noise.to(self.device, self.dtype)


@contextmanager
def prepare(name: str, device: str, dtype: torch.dtype) -> Iterator[Bench]:
    """Make the weights of one of `MODELS`, in a temporary folder."""
    model = SigLipVisionModel(MODELS[name]).eval()
    randomize(model, seed=0)
    with tempfile.TemporaryDirectory(prefix="siglip_port-") as folder:
        model.save_hf(Path(folder) / "hf")
        if name in TIMM_NAMES:
            model.save_timm(Path(folder) / "timm")
        yield Bench(model, Path(folder), name, device, dtype)


# --- the peers ------------------------------------------------------------------------------------


def transformers_peer(attention: str, *, compiled: bool = False) -> Callable[[Bench], Run]:
    """The reference, with an attention of its own choice."""

    def make(bench: Bench) -> Run:
        from transformers import SiglipVisionModel

        model = SiglipVisionModel.from_pretrained(
            bench.folder / "hf", attn_implementation=attention
        )
        model = bench.place(model)
        run = torch.compile(model, dynamic=False) if compiled else model
        return lambda x: run(pixel_values=x).pooler_output

    return make


def timm_peer(bench: Bench) -> Run:
    """Timm's model of the same architecture."""
    return bench.place(load_timm_model(bench))


def load_timm_model(bench: Bench) -> nn.Module:
    """Load the weights into timm's model."""
    import timm

    name = f"local-dir:{bench.folder / 'timm'}"
    model: nn.Module = timm.create_model(name, pretrained=True, num_classes=0)
    return model


def open_clip_peer(bench: Bench) -> Run:
    """open_clip's vision model, which is timm's with a wrapper around it."""
    import open_clip

    visual = open_clip.create_model(TIMM_NAMES[bench.name], pretrained=None).visual
    visual.trunk.load_state_dict(load_timm_model(bench).state_dict())
    for block in [*visual.trunk.blocks, visual.trunk.attn_pool]:
        # Its configuration of the first SigLIP says exact.
        block.mlp.act = nn.GELU(approximate="tanh")
    vision_model: nn.Module = bench.place(visual)
    return vision_model


def onnxruntime_peer(bench: Bench) -> Run:
    """ONNX Runtime, on what `export_onnx` writes."""
    import onnxruntime

    from siglip_port.optimize.export import export_onnx

    if not bench.is_float32_on_cpu:
        raise ValueError("measured in float32 on a CPU only")
    file = bench.folder / "tower.onnx"
    export_onnx(bench.model, file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(["pooled"], {"pixel_values": x.numpy()})[0])


def openvino_peer(bench: Bench) -> Run:
    """OpenVINO on its own, head included; not by way of our `optimize`."""
    import openvino

    from siglip_port.optimize.comparison import ModelOutputs
    from siglip_port.optimize.export import export_any_batch

    if bench.dtype == torch.float16 or bench.device != "cpu":
        raise ValueError("measured in float32 and bfloat16 on a CPU only")
    size = bench.model.config.image_size
    program = export_any_batch(ModelOutputs(bench.model), torch.zeros(2, 3, size, size))
    settings = {
        "INFERENCE_PRECISION_HINT": "f32" if bench.dtype == torch.float32 else "bf16",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(openvino.convert_model(program), "CPU", settings)
    return lambda x: torch.from_numpy(compiled(x.float().numpy(), share_inputs=True)[1])


def eager_peer(bench: Bench) -> Run:
    """Our model as `from_hf` returns it."""
    source = bench.folder / "hf"
    return SigLipVisionModel.from_hf(source, dtype=bench.dtype, device=bench.device).embed


def optimized_peer(
    engines: Sequence[str] | None, batch_size: int, dtype: torch.dtype | None = None
) -> Callable[[Bench], Run]:
    """Our model after `optimize`."""

    def make(bench: Bench) -> Run:
        model = SigLipVisionModel.from_hf(bench.folder / "hf", device=bench.device)
        fast = optimize(
            model,
            dtype=dtype or bench.dtype,
            engines=engines,
            batch_size=batch_size,
            cache_dir=bench.folder / "kept",
        )
        print(f"optimize: {fast.choice}", file=sys.stderr)
        return fast.embed

    return make


def peer_makers(bench: Bench, batch_size: int, *, quick: bool) -> dict[str, Callable[[Bench], Run]]:
    """Everything that is to be timed, by name."""
    makers: dict[str, Callable[[Bench], Run]] = {}
    makers[BASELINE] = transformers_peer("sdpa")
    makers["transformers eager"] = transformers_peer("eager")
    if not quick:
        makers["transformers compiled"] = transformers_peer("sdpa", compiled=True)
    makers["timm"] = timm_peer
    makers["open_clip"] = open_clip_peer
    makers["ONNX Runtime"] = onnxruntime_peer
    makers["OpenVINO"] = openvino_peer
    makers["siglip_port"] = eager_peer
    own_engines = ["packed", "packed-gelu", "compiled"]
    makers["siglip_port optimize, without extras"] = optimized_peer(own_engines, batch_size)
    makers["siglip_port optimize"] = optimized_peer(None, batch_size)
    if bench.is_float32_on_cpu:
        makers[INT8] = optimized_peer(None, batch_size, torch.int8)
    return makers


def make_peers(bench: Bench, batch_size: int, *, quick: bool) -> dict[str, Run]:
    """Make all peers that run, and equal our float32 model; note the others in `left_out`."""
    peers: dict[str, Run] = {}
    images = bench.images(batch_size)
    with torch.inference_mode():
        expected = bench.model.embed(images.cpu().float()).double()
        for name, make in peer_makers(bench, batch_size, quick=quick).items():
            try:
                run = make(bench)
                vectors = run(images).cpu().double()
            except (ImportError, KeyError, OSError, ValueError, RuntimeError) as error:
                reason = (str(error).splitlines() or [""])[0]
                bench.left_out[name] = f"{type(error).__name__}: {reason}"
                continue
            difference = ((vectors - expected).abs().max() / expected.abs().max()).item()
            cosine = torch.cosine_similarity(vectors, expected, dim=-1).min().item()
            bench.agreement[name] = {"difference": difference, "cosine": cosine}
            if not difference <= MAX_DIFFERENCE[bench.dtype] and name != INT8:
                bench.left_out[name] = f"not equal: differs by {difference:.1e}"
                continue
            peers[name] = run
    return peers
