"""Distributed training in two processes on the CPU.

`python -m tests.helpers.two_processes FOLDER` writes the results of each rank to FOLDER/RANK.pt.
tests/test_distributed.py compares them with a single process and the whole batch.
"""

from __future__ import annotations

import os
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

from siglip_port import SigLipVisionModel
from tests.helpers.checkpoints import SMALL
from tests.helpers.models import random_float64_model

WORLD_SIZE = 2
LEARNING_RATE = 0.5
CONFIG = replace(SMALL, interpolation="hf")
NAFLEX = replace(SMALL, naflex=True)
# The methods besides `forward` whose parameters FSDP must gather.
METHODS = ("embed", "pool", "hidden_states", "pooling_attention")

Batch = dict[str, Any]  # tensors; `embed` also takes a bool
Results = dict[str, Any]


class Embedder(nn.Module):
    """Wraps `embed`, pooling head included, in `forward`: the only method that DDP supports."""

    def __init__(self, model: SigLipVisionModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Tensor:  # noqa: ANN401 (tensors, and pairs of ints)
        return self.model.embed(**inputs)


def images(rows: slice = slice(None), side: int = 16) -> Batch:
    """Return rows of a batch of four images."""
    generator = torch.Generator().manual_seed(side)
    noise = torch.randn(4, 3, side, side, generator=generator, dtype=torch.float64)
    return {"pixel_values": noise[rows]}


def packed_images(rows: slice = slice(None)) -> Batch:
    """Return rows of a batch of four images of different shapes, padded to eight patches."""
    shapes = torch.tensor([(2, 3), (4, 2), (1, 5), (3, 2)])
    generator = torch.Generator().manual_seed(7)
    patches = torch.randn(4, 8, 3 * 8 * 8, generator=generator, dtype=torch.float64)
    mask = (torch.arange(8) < shapes.prod(1, keepdim=True)).long()
    batch = {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    return {name: value[rows] for name, value in batch.items()}


def loss(vectors: Tensor) -> Tensor:
    """Return a mean over the batch, so that two ranks average to the loss of one process."""
    return vectors.square().sum(dim=1).mean()


def fsdp(model: SigLipVisionModel, methods: tuple[str, ...] = METHODS) -> SigLipVisionModel:
    """Shard a model by FSDP2, as a user does."""
    for block in model.transformer.encoder.encoder_blocks:
        fully_shard(block)
    fully_shard(model)
    for method in methods:
        register_fsdp_forward_method(model, method)
    return model


def full_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of the unsharded parameters."""
    gradients = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        name = name.removeprefix("module.model.")
        gradients[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad.clone()
    return gradients


def message_of(run: Callable[[], object]) -> str:
    """Return type and text of the exception; empty if there is none."""
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def run_ddp(rows: slice) -> Results:
    """Run DDP with `embed`, and bypassing DDP, which averages no gradients."""
    model = DistributedDataParallel(Embedder(random_float64_model(CONFIG)))
    loss(model(**images(rows))).backward()
    naflex = DistributedDataParallel(Embedder(random_float64_model(NAFLEX)))
    loss(naflex(**packed_images(rows))).backward()
    bypassed = DistributedDataParallel(Embedder(random_float64_model(CONFIG)))
    loss(bypassed.module.model.embed(**images(rows))).backward()
    return {
        "ddp": full_gradients(model),
        "ddp, naflex": full_gradients(naflex),
        "past ddp": full_gradients(bypassed),
    }


def run_fsdp(rows: slice, folder: Path) -> Results:
    """Run FSDP2: gradients, an optimizer step, images of another size, and saving."""
    model = fsdp(random_float64_model(CONFIG))
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    with torch.no_grad():
        before = model.embed(**images(side=32))
    loss(model.embed(**images(rows))).backward()
    results: Results = {"fsdp": full_gradients(model), "before": before}
    optimizer.step()
    with torch.no_grad():
        results["after"] = model.embed(**images(side=32))
        results["tokens"] = model(**images())
        results["pooled"] = model.pool(model(**images()))
    own_folder = folder / f"sharded-{dist.get_rank()}"
    results["saved while sharded"] = message_of(lambda: model.save_hf(own_folder))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:  # the other ranks get an empty state dict
        whole = SigLipVisionModel(CONFIG)
        whole.load_state_dict(state, assign=True)
        whole.save_hf(folder / "saved")
    return results


def run_fsdp_otherwise(rows: slice) -> Results:
    """Run FSDP2 with checkpointed blocks, unregistered methods, and attention maps."""
    naflex = fsdp(random_float64_model(NAFLEX)).train()
    naflex.gradient_checkpointing_enable()
    loss(naflex.embed(**packed_images(rows))).backward()
    # `embed` works unregistered: it calls the model, whose `forward` gathers.
    vectors = fsdp(random_float64_model(CONFIG), methods=()).embed(**images(rows))
    loss(vectors).backward()
    unregistered = fsdp(random_float64_model(CONFIG), methods=())
    tokens = torch.zeros(1, 4, CONFIG.embed_dim, dtype=torch.float64)
    message = message_of(lambda: unregistered.pool(tokens))
    maps = fsdp(random_float64_model(CONFIG), methods=("attention_maps",))
    sharded_message = message_of(lambda: maps.attention_maps(**images(), layers=[0, 2]))
    for block in maps.transformer.encoder.encoder_blocks:
        block.unshard()  # type: ignore[operator]
    return {
        "fsdp, naflex": full_gradients(naflex),
        "vectors, embed not registered": vectors.detach(),
        "pool, not registered": message,
        "maps, blocks sharded": sharded_message,
        "maps": maps.attention_maps(**images(), layers=[0, 2])[1].detach(),
    }


def run_rank(rank: int, folder: Path) -> None:
    """Run all cases as one rank."""
    torch.set_num_threads(1)
    # A file for the rendezvous: unlike a port, no other process can have taken it.
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD_SIZE
    )
    rows = slice(2 * rank, 2 * rank + 2)
    results = {**run_ddp(rows), **run_fsdp(rows, folder), **run_fsdp_otherwise(rows)}
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def main(folder: Path) -> int:
    """Fork one process per rank; return 0 if all succeed."""
    children = []
    for rank in range(WORLD_SIZE):
        child = os.fork()
        if child == 0:
            run_rank(rank, folder)
            return 0
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
