"""One of two processes that train a tower together, on CPUs.

`python -m tests.helpers.two_processes RANK FOLDER`.

What it finds goes to FOLDER/RANK.pt, for tests/test_training.py to compare with one process and the
whole batch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from siglip_port import SigLipVisionConfig, SigLipVisionModel
from siglip_port.parity.stress_weights import randomise

WORLD = 2
RATE = 0.5
CONFIG = SigLipVisionConfig(
    embed_dim=24,
    image_size=16,
    patch_size=8,
    num_attention_heads=2,
    num_encoder_blocks=3,
    mlp_hidden_dim=40,
    pooling_head=True,
    interpolation="hf",
)
# The methods that a user calls beside `forward`, and that have parameters to gather.
METHODS = ("embed", "pool", "hidden_states", "pooling_attention")

Batch = dict[str, Any]  # of tensors; but `embed` also takes a bool


class Embedder(nn.Module):
    """What DDP must wrap.

    It sees no method but `forward`, and `embed` is what uses the pooling head too.
    """

    def __init__(self, tower: SigLipVisionModel) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, **inputs: Any) -> Tensor:  # noqa: ANN401 (tensors, and pairs of ints)
        vectors: Tensor = self.tower.embed(**inputs)
        return vectors


def tower(config: SigLipVisionConfig = CONFIG) -> SigLipVisionModel:
    """The same parameters in every process."""
    model = SigLipVisionModel(config).double()
    randomise(model)
    return model


def naflex() -> SigLipVisionConfig:
    return replace(CONFIG, naflex=True, interpolation=None)


def pictures(rows: slice = slice(None), side: int = 16) -> Batch:
    """Of a batch of four; `rows` of it."""
    generator = torch.Generator().manual_seed(side)
    return {
        "pixel_values": torch.randn(4, 3, side, side, generator=generator, dtype=torch.float64)[
            rows
        ]
    }


def packed(rows: slice = slice(None)) -> Batch:
    """Four pictures of other shapes, the last patches of which are padding."""
    shapes = torch.tensor([(2, 3), (4, 2), (1, 5), (3, 2)])
    generator = torch.Generator().manual_seed(7)
    patches = torch.randn(4, 8, 3 * 8 * 8, generator=generator, dtype=torch.float64)
    mask = (torch.arange(8) < shapes.prod(1, keepdim=True)).long()
    batch = {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    return {name: value[rows] for name, value in batch.items()}


def sharded(model: SigLipVisionModel, methods: tuple[str, ...] = METHODS) -> SigLipVisionModel:
    """FSDP2, as a user writes it."""
    for block in model.transformer.encoder.encoder_blocks:
        fully_shard(block)
    fully_shard(model)
    for method in methods:
        register_fsdp_forward_method(model, method)
    return model


def loss(vectors: Tensor) -> Tensor:
    """A mean over the batch, so that what two processes find is averaged to what one finds."""
    return vectors.square().sum(dim=1).mean()


def backward(vectors: Tensor) -> None:
    loss(vectors).backward()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Those of the whole parameters, wherever they lie."""
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        found[name.removeprefix("module.tower.")] = (
            grad.full_tensor() if isinstance(grad, DTensor) else grad.clone()
        )
    return found


def message_of(run: Callable[[], object]) -> str:
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def with_ddp(rows: slice) -> dict[str, object]:
    """DDP, with `embed` as it must be called, and past DDP, where nothing is averaged."""
    model = DistributedDataParallel(Embedder(tower()))
    backward(model(**pictures(rows)))
    packs = DistributedDataParallel(Embedder(tower(naflex())))
    backward(packs(**packed(rows)))
    past = DistributedDataParallel(Embedder(tower()))
    backward(past.module.tower.embed(**pictures(rows)))
    return {"ddp": gradients(model), "ddp, naflex": gradients(packs), "past ddp": gradients(past)}


def with_fsdp(rows: slice, folder: Path) -> dict[str, object]:
    """FSDP2: gradients, a step in `eval()` mode between two looks at pictures of another size, and what is saved."""
    model = sharded(tower()).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    with torch.no_grad():
        before = model.embed(**pictures(side=32))
    backward(model.embed(**pictures(rows)))
    found: dict[str, object] = {"fsdp": gradients(model), "before": before}
    optimizer.step()
    with torch.no_grad():
        found["after"] = model.embed(**pictures(side=32))
        found["tokens"] = model(**pictures())
        found["pooled"] = model.pool(model(**pictures()))
    found["saved while sharded"] = message_of(
        lambda: model.save_hf(folder / f"sharded-{dist.get_rank()}")
    )
    state = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if dist.get_rank() == 0:  # the others get nothing
        whole = SigLipVisionModel(CONFIG)
        whole.load_state_dict(state, assign=True)
        whole.save_hf(folder / "saved")
    return found


def with_fsdp_otherwise(rows: slice) -> dict[str, object]:
    """FSDP2: packed patches with blocks computed twice; methods that are not registered.

    Maps of attention.
    """
    packs = sharded(tower(naflex())).train()
    packs.gradient_checkpointing_enable()
    backward(packs.embed(**packed(rows)))
    vectors = sharded(tower(), methods=()).embed(
        **pictures(rows)
    )  # `embed` calls the model, which gathers
    backward(vectors)
    alone = sharded(tower(), methods=())
    tokens = torch.zeros(1, 4, CONFIG.embed_dim, dtype=torch.float64)
    maps = sharded(tower(), methods=("attention_maps",))
    unregistered = message_of(lambda: alone.pool(tokens))
    closed = message_of(lambda: maps.attention_maps(**pictures(), layers=[0, 2]))
    for block in maps.transformer.encoder.encoder_blocks:
        block.unshard()  # type: ignore[operator]
    return {
        "fsdp, naflex": gradients(packs),
        "vectors, embed not registered": vectors.detach(),
        "pool, not registered": unregistered,
        "maps, blocks sharded": closed,
        "maps": maps.attention_maps(**pictures(), layers=[0, 2])[1].detach(),
    }


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    # A file to meet at: unlike a port, no other process can have taken it.
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD
    )
    half = slice(2 * rank, 2 * rank + 2)
    found = {**with_ddp(half), **with_fsdp(half, folder), **with_fsdp_otherwise(half)}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
