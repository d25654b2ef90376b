"""Peers of scripts/benchmarks/inference.py: the port and other implementations of the model."""

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
"""Largest accepted difference of a peer from the port in float32, relative to the largest value."""

Run = Callable[[Tensor], Tensor]
"""[B, C, S, S] -> pooled [B, D]."""

Module = TypeVar("Module", bound=nn.Module)


@dataclass
class Bench:
    """Weights, device and dtype that all peers share.

    Attributes:
        model: The port in float32 on the CPU.
        folder: Folder of the checkpoints `hf` and `timm`.
        name: Name of the model in `MODELS`.
        device: Device of the peers.
        dtype: Dtype of the peers.
        agreement: Peer -> difference and cosine similarity to `model`.
        skipped: Peer -> reason why it was not timed.
    """

    model: SigLipVisionModel
    folder: Path
    name: str
    device: str
    dtype: torch.dtype
    agreement: dict[str, dict[str, float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def is_float32_on_cpu(self) -> bool:
        """Whether peers can run that need float32 on a CPU."""
        return self.dtype == torch.float32 and self.device == "cpu"

    def place(self, module: Module) -> Module:
        """Move a module to the device and dtype."""
        return module.to(self.device, self.dtype).eval()

    def images(self, batch_size: int) -> Tensor:
        """Return noise [B, 3, S, S] in [-1, 1]."""
        size = self.model.config.image_size
        generator = torch.Generator().manual_seed(1)
        noise = torch.rand((batch_size, 3, size, size), generator=generator) * 2 - 1
        return noise.to(self.device, self.dtype)


@contextmanager
def prepare(name: str, device: str, dtype: torch.dtype) -> Iterator[Bench]:
    """Write random weights of one of `MODELS` to a temporary folder."""
    model = SigLipVisionModel(MODELS[name]).eval()
    randomize(model, seed=0)
    with tempfile.TemporaryDirectory(prefix="siglip_port-") as folder:
        model.save_hf(Path(folder) / "hf")
        if name in TIMM_NAMES:
            model.save_timm(Path(folder) / "timm")
        yield Bench(model, Path(folder), name, device, dtype)


# --- the peers ------------------------------------------------------------------------------------


def transformers_peer(attention: str, *, compiled: bool = False) -> Callable[[Bench], Run]:
    """Use transformers with the given attention implementation."""

    def build(bench: Bench) -> Run:
        from transformers import SiglipVisionModel

        model = SiglipVisionModel.from_pretrained(
            bench.folder / "hf", attn_implementation=attention
        )
        model = bench.place(model)
        run = torch.compile(model, dynamic=False) if compiled else model
        return lambda x: run(pixel_values=x).pooler_output

    return build


def timm_peer(bench: Bench) -> Run:
    """The model of timm."""
    return bench.place(load_timm_model(bench))


def load_timm_model(bench: Bench) -> nn.Module:
    """Load the weights into timm's model."""
    import timm

    name = f"local-dir:{bench.folder / 'timm'}"
    model: nn.Module = timm.create_model(name, pretrained=True, num_classes=0)
    return model


def open_clip_peer(bench: Bench) -> Run:
    """The vision model of open_clip, a wrapper of timm's."""
    import open_clip

    visual = open_clip.create_model(TIMM_NAMES[bench.name], pretrained=None).visual
    visual.trunk.load_state_dict(load_timm_model(bench).state_dict())
    for block in [*visual.trunk.blocks, visual.trunk.attn_pool]:
        # open_clip configures the exact GELU for SigLIP.
        block.mlp.act = nn.GELU(approximate="tanh")
    vision_model: nn.Module = bench.place(visual)
    return vision_model


def onnxruntime_peer(bench: Bench) -> Run:
    """ONNX Runtime with a file of `export_onnx`."""
    import onnxruntime

    from siglip_port.optimize.export import export_onnx

    if not bench.is_float32_on_cpu:
        raise ValueError("requires float32 on a CPU")
    file = bench.folder / "encoder.onnx"
    export_onnx(bench.model, file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(["pooled"], {"pixel_values": x.numpy()})[0])


def openvino_peer(bench: Bench) -> Run:
    """OpenVINO with the whole model, independent of `optimize`."""
    import openvino

    from siglip_port.optimize.comparison import ModelOutputs
    from siglip_port.optimize.export import export_any_batch

    if bench.dtype == torch.float16 or bench.device != "cpu":
        raise ValueError("requires float32 or bfloat16 on a CPU")
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
    """The port without `optimize`."""
    source = bench.folder / "hf"
    return SigLipVisionModel.from_hf(source, dtype=bench.dtype, device=bench.device).embed


def optimized_peer(
    engines: Sequence[str] | None, batch_size: int, dtype: torch.dtype | None = None
) -> Callable[[Bench], Run]:
    """The port with `optimize`."""

    def build(bench: Bench) -> Run:
        model = SigLipVisionModel.from_hf(bench.folder / "hf", device=bench.device)
        fast = optimize(
            model,
            dtype=dtype or bench.dtype,
            engines=engines,
            batch_size=batch_size,
            cache_dir=bench.folder / "cache",
        )
        print(f"optimize: {fast.choice}", file=sys.stderr)
        return fast.embed

    return build


def peer_builders(
    bench: Bench, batch_size: int, *, quick: bool
) -> dict[str, Callable[[Bench], Run]]:
    """Return functions that build the peers, by name."""
    builders: dict[str, Callable[[Bench], Run]] = {}
    builders[BASELINE] = transformers_peer("sdpa")
    builders["transformers eager"] = transformers_peer("eager")
    if not quick:
        builders["transformers compiled"] = transformers_peer("sdpa", compiled=True)
    builders["timm"] = timm_peer
    builders["open_clip"] = open_clip_peer
    builders["ONNX Runtime"] = onnxruntime_peer
    builders["OpenVINO"] = openvino_peer
    builders["siglip_port"] = eager_peer
    own_engines = ["prepacked", "prepacked-gelu", "compiled"]
    builders["siglip_port optimize, without extras"] = optimized_peer(own_engines, batch_size)
    builders["siglip_port optimize"] = optimized_peer(None, batch_size)
    if bench.is_float32_on_cpu:
        builders[INT8] = optimized_peer(None, batch_size, torch.int8)
    return builders


def build_peers(bench: Bench, batch_size: int, *, quick: bool) -> dict[str, Run]:
    """Build all peers and compare them with the port; record failures in `skipped`."""
    peers: dict[str, Run] = {}
    images = bench.images(batch_size)
    with torch.inference_mode():
        expected = bench.model.embed(images.cpu().float()).double()
        for name, build in peer_builders(bench, batch_size, quick=quick).items():
            try:
                run = build(bench)
                embeddings = run(images).cpu().double()
            except (ImportError, KeyError, OSError, ValueError, RuntimeError) as error:
                reason = (str(error).splitlines() or [""])[0]
                bench.skipped[name] = f"{type(error).__name__}: {reason}"
                continue
            difference = ((embeddings - expected).abs().max() / expected.abs().max()).item()
            cosine = torch.cosine_similarity(embeddings, expected, dim=-1).min().item()
            bench.agreement[name] = {"difference": difference, "cosine": cosine}
            if not difference <= MAX_DIFFERENCE[bench.dtype] and name != INT8:
                bench.skipped[name] = (
                    f"relative difference {difference:.1e}, bound {MAX_DIFFERENCE[bench.dtype]:.0e}"
                )
                continue
            peers[name] = run
    return peers
