"""Training and its tools.

Gradients against the reference's, copies, compilers, adapters, and several processes.

In float64, with random weights on which nothing is zero and nothing is one.
"""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from siglip_port import CheckpointError, SigLipVisionConfig, SigLipVisionModel
from siglip_port.checkpoint import layouts
from siglip_port.parity.metrics import relative_error
from siglip_port.parity.siglip import reference as references
from siglip_port.parity.stress_weights import randomise
from siglip_port.patches import interpolate_positions, pack
from tests.helpers import two_processes
from tests.helpers.checkpoints import ODD, SMALL, MakeCheckpoint, pixels

EXACT = 1e-12
# The deepest gradients; rounding reaches 2e-14 of their size, a mask that is left out moves them by
# more than 1e-2.
GRADIENTS = 1e-11

FIXED = replace(ODD, num_encoder_blocks=3)
NAFLEX = replace(FIXED, image_size=35, naflex=True)
RESIZED = replace(FIXED, interpolation="hf")
POSITIONS = "transformer.embeddings.position_embedding.weight"

Run = Callable[[Tensor], Tensor]


def load_pair(
    config: SigLipVisionConfig, checkpoint: MakeCheckpoint
) -> tuple[SigLipVisionModel, Any]:
    """Port and reference, in float64, each loaded by its own loader from one checkpoint."""
    folder = checkpoint(replace(config, interpolation=None), dtype=torch.float64)
    port = SigLipVisionModel.from_hf(folder, interpolation=config.interpolation)
    reference = references.load(
        folder, pooling_head=config.pooling_head, dtype=torch.float64, naflex=config.naflex
    ).model
    return port, reference


def tower(
    config: SigLipVisionConfig = SMALL, dtype: torch.dtype = torch.float64
) -> SigLipVisionModel:
    """With random weights, in `eval()` mode."""
    model = SigLipVisionModel(config).to(dtype).eval()
    randomise(model)
    return model


def pictures(config: SigLipVisionConfig, side: int | None = None, batch: int = 2) -> Tensor:
    return pixels(replace(config, image_size=side or config.image_size), batch=batch)


def packs() -> dict[str, Any]:
    """A picture of 2 x 6 patches, one of 5 x 3, and one on the tower's own grid, which leaves no padding."""
    sizes = [(14, 42), (35, 21), (35, 35)]
    shapes = [
        pixels(replace(NAFLEX, image_size=42), seed=i)[0, :, :h, :w]
        for i, (h, w) in enumerate(sizes)
    ]
    return {**pack(shapes, NAFLEX.patch_size)}


def backward(value: Tensor) -> None:
    value.backward()


def loss_of(tokens: Tensor, pooled: Tensor, mask: Tensor | None = None) -> Tensor:
    """Everything that the tower gives takes part, but for padding, whose tokens mean nothing."""
    kept = tokens if mask is None else tokens * mask[:, :, None]
    return kept.square().mean() + kept.sin().mean() + pooled.square().mean() + pooled.sin().mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of all parameters."""
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == dict(model.named_parameters()).keys()
    model.zero_grad()
    return grads


def as_the_reference_names_them(
    model: SigLipVisionModel, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """In the names and forms of the reference.

    Q, k and v of the head in one, NaFlex's patch weights as a Linear's.
    """
    config = model.config
    layout = layouts.HUGGINGFACE_NAFLEX if config.naflex else layouts.HUGGINGFACE
    rows = layout.rules(config.pooling_head)
    return layout.to_stored(tensors, config.num_encoder_blocks, config.num_attention_heads, rows)


def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, str]:
    """The largest error of a gradient, relative to it, and whose.

    A bias of the keys moves all scores of a query alike, so that its gradient is zero but for
    rounding: its error is taken relative to the gradient of the weights.
    """
    assert ours.keys() == theirs.keys()
    errors = []
    for name, grad in theirs.items():
        size = theirs[name.replace("k_proj.bias", "k_proj.weight")].norm()
        assert size > 0, name
        errors.append((float((ours[name] - grad).norm() / size), name))
    return max(errors)


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [None, 31], ids=["its own size", "another size"])
def test_gradients(
    checkpoint: MakeCheckpoint, side: int | None
) -> None:
    port, reference = load_pair(FIXED if side is None else RESIZED, checkpoint)
    x, y = (pictures(FIXED, side).requires_grad_() for _ in range(2))
    tokens = port(x)
    backward(loss_of(tokens, port.pool(tokens)))
    theirs = reference(y, interpolate_pos_encoding=side is not None)
    backward(loss_of(theirs.last_hidden_state, theirs.pooler_output))
    assert x.grad is not None
    assert y.grad is not None
    assert relative_error(x.grad, y.grad) <= GRADIENTS
    ours, expected = as_the_reference_names_them(port, gradients(port)), gradients(reference)
    assert worst(ours, expected)[0] <= GRADIENTS, worst(ours, expected)
    ours["encoder.layers.1.mlp.fc1.weight"] *= 1 + 1e-9
    assert worst(ours, expected)[1] == "encoder.layers.1.mlp.fc1.weight"
    assert worst(ours, expected)[0] > GRADIENTS


def test_gradients_of_packed_patches(checkpoint: MakeCheckpoint) -> None:
    port, reference = load_pair(NAFLEX, checkpoint)
    ours, theirs = packs(), packs()
    mask = ours["pixel_attention_mask"]
    x, y = ours["pixel_values"].requires_grad_(), theirs["pixel_values"].requires_grad_()
    tokens = port(**ours)
    backward(loss_of(tokens, port.pool(tokens, mask), mask))
    output = reference(**theirs)
    backward(loss_of(output.last_hidden_state, output.pooler_output, mask))
    assert x.grad is not None
    assert y.grad is not None
    assert not x.grad[mask == 0].any()
    assert relative_error(x.grad, y.grad) <= GRADIENTS
    grads, expected = as_the_reference_names_them(port, gradients(port)), gradients(reference)
    assert grads["embeddings.patch_embedding.weight"].shape == (72, 3 * 7 * 7)  # a Linear's
    # On a CPU, both fit positions in float32, and sum the gradients of the pictures in different
    # dtypes.
    name = "embeddings.position_embedding.weight"
    assert relative_error(grads.pop(name), expected.pop(name)) <= 1e-6
    assert worst(grads, expected)[0] <= GRADIENTS, worst(grads, expected)

    tokens = port(**{**ours, "pixel_attention_mask": torch.ones_like(mask)})  # the mask left out
    backward(loss_of(tokens, port.pool(tokens, mask), mask))
    wrong = as_the_reference_names_them(port, gradients(port))
    assert worst({n: wrong[n] for n in expected}, expected)[0] > 1e-2


@pytest.mark.parametrize("config", [FIXED, NAFLEX], ids=["pictures", "packed patches"])
def test_gradients_of_mean_pooling(
    checkpoint: MakeCheckpoint, config: SigLipVisionConfig
) -> None:
    loaded, reference = load_pair(replace(config, pooling_head=False), checkpoint)
    port = SigLipVisionModel(replace(loaded.config, mean_pooling=True)).double().eval()
    port.load_state_dict(loaded.state_dict())
    batch: dict[str, Any] = packs() if config.naflex else {"pixel_values": pictures(config)}
    backward(port.embed(**batch).sin().mean())
    tokens = reference(**batch).last_hidden_state
    mask = batch.get("pixel_attention_mask", torch.ones(tokens.shape[:2]))[:, :, None]
    backward(((tokens * mask).sum(1) / mask.sum(1)).sin().mean())
    ours, expected = as_the_reference_names_them(port, gradients(port)), gradients(reference)
    if config.naflex:  # as above
        name = "embeddings.position_embedding.weight"
        assert relative_error(ours.pop(name), expected.pop(name)) <= 1e-6
    assert worst(ours, expected)[0] <= GRADIENTS, worst(ours, expected)


def test_dropout(
    checkpoint: MakeCheckpoint,
) -> None:
    port, reference = load_pair(replace(FIXED, attention_dropout=0.3), checkpoint)
    x = pictures(FIXED)

    def both() -> tuple[Tensor, Tensor]:
        """The tokens; and the gradients stay in the parameters."""
        torch.manual_seed(0)
        ours = port(x)
        backward(loss_of(ours, port.pool(ours)))
        torch.manual_seed(0)
        theirs = reference(x)
        backward(loss_of(theirs.last_hidden_state, theirs.pooler_output))
        return ours.detach(), theirs.last_hidden_state.detach()

    still, expected = both()
    assert relative_error(still, expected) <= EXACT
    assert torch.equal(still, port(x))
    without = gradients(port)
    gradients(reference)
    port.train()
    reference.train()
    dropped, expected = both()
    assert relative_error(dropped, still) > 1e-2
    assert relative_error(dropped, expected) <= EXACT
    assert not torch.equal(dropped, port(x))  # the next draw
    grads = gradients(port)
    assert worst(grads, without)[0] > 1e-2
    assert worst(as_the_reference_names_them(port, grads), gradients(reference))[0] <= GRADIENTS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_autocast(
    checkpoint: MakeCheckpoint, dtype: torch.dtype
) -> None:
    port, reference = load_pair(FIXED, checkpoint)
    x = pictures(FIXED)

    def vectors_and_gradients() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        vectors = [
            port.embed(x.to(port.pooling_head.probe.dtype)),  # type: ignore[union-attr]
            reference(x.to(reference.dtype)).pooler_output,
        ]
        for vector in vectors:
            backward(vector.square().sum())
        return [v.detach().double() for v in vectors], [
            as_the_reference_names_them(port, gradients(port)),
            gradients(reference),
        ]

    (truth, _), (true_gradients, _) = vectors_and_gradients()

    def check() -> None:
        (ours, theirs), grads = vectors_and_gradients()
        assert 0 < relative_error(ours, truth) <= 1.5 * relative_error(theirs, truth)
        for name in (
            "embeddings.patch_embedding.weight",
            "encoder.layers.1.mlp.fc1.weight",
            "head.probe",
        ):
            mine, other = (relative_error(g[name], true_gradients[name]) for g in grads)
            assert 0 < mine <= 1.5 * other, name

    port.half() if dtype == torch.float16 else port.to(dtype)
    reference.to(dtype)
    assert {p.dtype for p in port.parameters()} == {dtype}
    check()
    if dtype != torch.float32:
        port.float()
        reference.float()
        with torch.autocast("cpu", dtype):
            check()


def test_step_leaves_file_alone(
    checkpoint: MakeCheckpoint,
) -> None:
    folder = checkpoint(FIXED)
    before = (folder / "model.safetensors").read_bytes()
    model = SigLipVisionModel.from_hf(folder).train()
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    backward(model.embed(pictures(FIXED)).square().mean())
    optimizer.step()
    assert not [name for name, p in model.named_parameters() if torch.equal(p, old[name])]
    assert (folder / "model.safetensors").read_bytes() == before


# --- blocks computed twice ------------------------------------------------------------------------


def runs_of_blocks(model: SigLipVisionModel, run: Callable[[], object]) -> int:
    """How often a block is computed while `run` runs."""
    count = [0]

    def add(*_: object) -> None:
        count[0] += 1

    hooks = [
        block.register_forward_pre_hook(add) for block in model.transformer.encoder.encoder_blocks
    ]
    run()
    for hook in hooks:
        hook.remove()
    return count[0]


@pytest.mark.parametrize(
    "config", [replace(FIXED, attention_dropout=0.3), NAFLEX], ids=["dropout", "packed patches"]
)
def test_gradient_checkpointing(
    config: SigLipVisionConfig,
) -> None:
    model = tower(config).train()
    batch: dict[str, Any] = packs() if config.naflex else {"pixel_values": pictures(config)}

    def step() -> None:
        torch.manual_seed(0)  # of the dropout
        backward(model.embed(**batch).square().mean())

    assert runs_of_blocks(model, step) == 3
    plain = gradients(model)
    model.gradient_checkpointing_enable()
    assert runs_of_blocks(model, step) == 6
    twice = gradients(model)
    assert all(torch.equal(twice[name], grad) for name, grad in plain.items())
    assert (
        runs_of_blocks(model, lambda: model.hidden_states(**batch, layers=[-1])) == 3
    )  # no way back
    assert runs_of_blocks(model.eval(), step) == 3
    model.train().gradient_checkpointing_disable()
    assert runs_of_blocks(model, step) == 3


# --- copies and dtypes ----------------------------------------------------------------------------


def through_torch_save(model: SigLipVisionModel) -> SigLipVisionModel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded, SigLipVisionModel)
    return loaded


COPIES: dict[str, Callable[[SigLipVisionModel], SigLipVisionModel]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_torch_save,
}


@pytest.mark.parametrize("way", COPIES.values(), ids=COPIES.keys())
@torch.no_grad()
def test_copies(
    checkpoint: MakeCheckpoint, way: Callable[[SigLipVisionModel], SigLipVisionModel]
) -> None:
    folder = checkpoint(FIXED)
    processor = {"do_resize": True, "size": {"height": 45, "width": 45}, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    model = SigLipVisionModel.from_hf(folder, interpolation="hf")
    x = pictures(FIXED, 31).float()
    expected = model.embed(x)
    other = way(model)
    assert other.config == model.config
    assert other.provenance == model.provenance is not None
    assert other.preprocessor_config == model.preprocessor_config
    assert other.preprocessor_config["resample"] == 3
    assert not other.training
    assert torch.equal(other.embed(x), expected)
    for parameter in other.parameters():
        parameter.mul_(2)
    assert not torch.equal(other.embed(x), expected)
    assert torch.equal(model.embed(x), expected)


@torch.no_grad()
def test_state_dict(tmp_path: Path) -> None:
    model, fresh, assigned = tower(FIXED), SigLipVisionModel(FIXED), SigLipVisionModel(FIXED)
    x = pictures(FIXED)
    assert (
        model.state_dict().keys() == dict(model.named_parameters()).keys()
    )  # nothing is hidden in buffers
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    fresh.load_state_dict(state, strict=True)  # into float32: rounded
    assert torch.equal(fresh.eval().embed(x), copy.deepcopy(model).float().embed(x))
    for broken in (
        {n: t for n, t in state.items() if n != POSITIONS},
        {**state, "more": torch.zeros(1)},
    ):
        with pytest.raises(RuntimeError, match=r"Missing key|Unexpected key"):
            fresh.load_state_dict(broken, strict=True)
    assigned.load_state_dict(
        state, strict=True, assign=True
    )  # last: torch marks `state` by it for ever
    assert all(p.data_ptr() == state[name].data_ptr() for name, p in assigned.named_parameters())
    assert all(p.requires_grad for p in assigned.parameters())
    assert torch.equal(assigned.eval().embed(x), model.embed(x))


# --- positions of another grid --------------------------------------------------------------------


@torch.no_grad()
def test_fitted_positions_follow_weights() -> None:
    """However they are written to: nothing of a former forward is kept."""
    model = tower(RESIZED)
    embeddings = model.transformer.embeddings
    for _ in range(2):
        weight = embeddings.position_embedding.weight
        expected = interpolate_positions(weight, (3, 5), "hf")
        assert torch.equal(embeddings.positions(3, 5), expected)
        weight.data.mul_(2)
    assert embeddings.positions(6, 6) is weight  # its own grid


# --- compilers ------------------------------------------------------------------------------------


@pytest.fixture
def compiler() -> Iterator[None]:
    """Forgets what other tests compiled.

    Torch counts how often a function is compiled again, and gives up.
    """
    torch.compiler.reset()
    yield
    torch.compiler.reset()


SHAPES = [(2, 3), (4, 2), (1, 5)]


def shapes_as_ints() -> dict[str, Any]:
    """Packed patches, the shapes as pairs of ints: constants to a compiler."""
    shapes = torch.tensor(SHAPES)
    mask = (torch.arange(8) < shapes.prod(1, keepdim=True)).long()
    patches = torch.randn(
        3, 8, 3 * 7 * 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": SHAPES}


BATCHES: dict[str, tuple[SigLipVisionConfig, Callable[[], dict[str, Any]]]] = {
    "pictures": (FIXED, lambda: {"pixel_values": pictures(FIXED)}),
    "pictures of another size": (RESIZED, lambda: {"pixel_values": pictures(FIXED, 31)}),
    "packed patches": (NAFLEX, shapes_as_ints),
    "packed patches, no mask": (NAFLEX, lambda: {**shapes_as_ints(), "pixel_attention_mask": None}),
}


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("config", "make"), BATCHES.values(), ids=BATCHES.keys())
@torch.no_grad()
def test_compile(
    config: SigLipVisionConfig, make: Callable[[], dict[str, Any]]
) -> None:
    model, batch = tower(config), make()
    tokens = model(**batch)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(**batch), tokens) <= EXACT
    embed = torch.compile(model.embed, fullgraph=True, backend="aot_eager")
    assert relative_error(embed(**batch), model.embed(**batch)) <= EXACT
    mask = batch.get("pixel_attention_mask")
    pool = torch.compile(model.pool, fullgraph=True, backend="aot_eager")
    assert relative_error(pool(tokens, mask), model.pool(tokens, mask)) <= EXACT


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("name", ["pictures", "packed patches"])
def test_compiled_gradients(name: str) -> None:
    config, make = BATCHES[name]
    model, batch = tower(config).train(), make()
    backward(model.embed(**batch).square().mean())
    expected = gradients(model)
    model.gradient_checkpointing_enable()
    embed = torch.compile(model.embed, fullgraph=True, backend="aot_eager")
    backward(embed(**batch).square().mean())
    assert worst(gradients(model), expected)[0] <= GRADIENTS


@pytest.mark.usefixtures("compiler")
def test_compiled_once_for_all_steps() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    model = tower(RESIZED).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for _ in range(3):
        backward(compiled(pictures(FIXED, 31)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    assert len(graphs) == 1


@pytest.mark.usefixtures("compiler")
@torch.no_grad()
def test_compile_other_shapes() -> None:
    model = tower(replace(NAFLEX, num_encoder_blocks=1))
    embed = torch.compile(model.embed, fullgraph=True, backend="eager")
    for shapes in (SHAPES, [(3, 2), (2, 4), (5, 1)], [(5, 5)] * 3):
        patches = torch.ones(3, 25, 3 * 7 * 7).double()
        whole = model.embed(patches, spatial_shapes=shapes)
        assert relative_error(embed(patches, spatial_shapes=shapes), whole) <= EXACT
    resized = tower(replace(RESIZED, num_encoder_blocks=1))
    compiled = torch.compile(resized, fullgraph=True, backend="eager")
    for side, batch in (
        (31, 2),
        (38, 2),
        (45, 3),
        (66, 4),
    ):  # of which torch makes one graph for all sizes
        x = pictures(FIXED, side, batch)
        assert relative_error(compiled(x), resized(x)) <= EXACT


@pytest.mark.usefixtures("compiler")
@pytest.mark.skipif(
    not (shutil.which("c++") or shutil.which("g++")), reason="inductor needs a C++ compiler"
)
@torch.no_grad()
def test_inductor() -> None:
    model = tower(replace(SMALL, num_encoder_blocks=1, pooling_head=False, mean_pooling=True))
    x = pictures(SMALL)
    assert relative_error(torch.compile(model.embed, fullgraph=True)(x), model.embed(x)) <= EXACT


class Embed(nn.Module):
    """`torch.export` takes a module's `forward`, so that `embed` becomes one."""

    def __init__(self, tower: SigLipVisionModel) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.tower.embed(pixel_values)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("config", [FIXED, RESIZED], ids=["its own size", "another size"])
@torch.no_grad()
def test_export(
    config: SigLipVisionConfig, strict: bool, tmp_path: Path
) -> None:
    model, side = tower(config), 45 if config is FIXED else 31
    for module in (model, Embed(model)):
        program = torch.export.export(
            module,
            (pictures(config, side),),
            dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
            strict=strict,
        )
        torch.export.save(program, tmp_path / "tower.pt2")
        loaded = torch.export.load(tmp_path / "tower.pt2").module()
        for batch in (1, 5):
            x = pictures(config, side, batch)
            assert relative_error(loaded(x), module(x)) <= EXACT


# --- adapters -------------------------------------------------------------------------------------

ENCODER = r".*(encoder_blocks|encoder\.layers)\.\d+\..*(_proj|fc1|fc2)"


def adapted(model: nn.Module, *, fresh: bool = True, targets: str = "all-linear") -> PeftModel:
    """With LoRA of rank 4; `fresh` as one begins, else with random values everywhere."""
    config = LoraConfig(r=4, lora_alpha=10, target_modules=targets, init_lora_weights=fresh)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(model, config)


def adapters(model: nn.Module) -> dict[str, Any]:
    prefix = "base_model.model."
    return {n.removeprefix(prefix): m for n, m in model.named_modules() if isinstance(m, LoraLayer)}


def test_lora_initial_output() -> None:
    model = tower(FIXED)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert len(linears) == 6 * (3 + 1)  # of three blocks and of the head
    x = pictures(FIXED)
    tokens, vectors = model(x), model.embed(x)
    wrapped = adapted(model)
    assert adapters(wrapped).keys() == linears
    assert {name.split(".")[-3] for name, p in wrapped.named_parameters() if p.requires_grad} == {
        "lora_A",
        "lora_B",
    }
    assert torch.equal(wrapped(x), tokens)
    assert torch.equal(wrapped.embed(x), vectors)


def test_lora_train_merge_save(tmp_path: Path) -> None:
    model = tower(FIXED)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = pictures(FIXED)
    wrapped = adapted(model).train()
    old = wrapped.embed(x).detach()
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    backward(wrapped.embed(x).square().mean())
    optimizer.step()
    new = wrapped.eval().embed(x).detach()
    assert relative_error(new, old) > 1e-3
    with pytest.raises(CheckpointError, match="the model to be saved does not hold the tower"):
        model.save_hf(tmp_path / "wrapped")
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(tower(FIXED), tmp_path / "adapter")
    assert relative_error(again.embed(x).detach(), new) <= 1e-6  # peft loads adapters in float32
    merged = wrapped.merge_and_unload()
    assert isinstance(merged, SigLipVisionModel)
    assert relative_error(merged.embed(x).detach(), new) <= EXACT
    unchanged = {name for name, p in merged.named_parameters() if torch.equal(p, before[name])}
    linears = {
        f"{name}.weight" for name, module in merged.named_modules() if isinstance(module, nn.Linear)
    }
    assert unchanged == before.keys() - linears
    merged.save_hf(tmp_path / "merged")
    assert (
        relative_error(SigLipVisionModel.from_hf(tmp_path / "merged").embed(x).detach(), new)
        <= EXACT
    )


@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # peft asks transformers
def test_lora_gradients_in_blocks(
    checkpoint: MakeCheckpoint,
) -> None:
    port, reference = load_pair(FIXED, checkpoint)
    ours, theirs = (adapted(model, fresh=False, targets=ENCODER) for model in (port, reference))
    pairs = {
        name.replace("transformer.encoder.encoder_blocks", "encoder.layers"): a
        for name, a in adapters(ours).items()
    }
    others = adapters(theirs)
    assert pairs.keys() == others.keys()
    assert len(pairs) == 6 * 3
    for name, adapter in pairs.items():
        others[name].load_state_dict(adapter.state_dict())
    x = pictures(FIXED)
    backward(ours.embed(x).sin().mean())
    backward(theirs(x).pooler_output.sin().mean())
    for name, adapter in pairs.items():
        for part in ("lora_A", "lora_B"):
            mine, other = (getattr(a, part)["default"].weight.grad for a in (adapter, others[name]))
            assert relative_error(mine, other) <= GRADIENTS, (name, part)


def test_lora_gradients(
    checkpoint: MakeCheckpoint,
) -> None:
    """W + s B A has the gradient G in the reference; then A has s B^T G, and B has s G A^T."""
    port, reference = load_pair(FIXED, checkpoint)
    shapes = {name: p.shape for name, p in port.named_parameters()}
    wrapped = adapted(port, fresh=False)
    x = pictures(FIXED)
    backward(wrapped.embed(x).sin().mean())
    found = {
        name: (a.scaling["default"], a.lora_A["default"].weight, a.lora_B["default"].weight)
        for name, a in adapters(wrapped).items()
    }
    merged = copy.deepcopy(wrapped).merge_and_unload()
    reference.load_state_dict(as_the_reference_names_them(merged, dict(merged.state_dict())))
    backward(reference(x).pooler_output.sin().mean())
    grads = gradients(reference)
    claims = layouts.HUGGINGFACE.mappings(
        FIXED.num_encoder_blocks, layouts.HUGGINGFACE.rules(pooling_head=True)
    )
    whole = {
        name: grad
        for stored, claim in claims.items()
        for name, grad in zip(
            claim.port,
            claim.from_stored(grads[stored], [shapes[n] for n in claim.port]),
            strict=True,
        )
    }
    assert len(found) == 6 * (3 + 1)
    for name, (scale, a, b) in found.items():
        grad = whole[f"{name}.weight"]
        assert a.grad is not None
        assert b.grad is not None
        assert scale == 10 / 4
        assert relative_error(a.grad, scale * b.detach().T @ grad) <= GRADIENTS, name
        assert relative_error(b.grad, scale * grad @ a.detach().T) <= GRADIENTS, name


# --- several processes ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """What both processes of tests/helpers/two_processes.py found, and their folder."""
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-m", "tests.helpers.two_processes"]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(folder)],
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(two_processes.WORLD)
    ]
    try:
        said = [process.communicate(timeout=120)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * two_processes.WORLD, "\n".join(said)
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(two_processes.WORLD)]


Processes = tuple[Path, list[dict[str, Any]]]


def of_one_process(
    config: SigLipVisionConfig, batch: dict[str, Any]
) -> tuple[SigLipVisionModel, dict[str, Tensor]]:
    """The tower, and its gradients for the whole batch."""
    model = two_processes.tower(config)
    two_processes.backward(model.embed(**batch))
    return model, two_processes.gradients(model)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("batch", ["", ", naflex"])
def test_ddp_and_fsdp_gradients(
    processes: Processes, how: str, batch: str
) -> None:
    config = two_processes.naflex() if batch else two_processes.CONFIG
    _, expected = of_one_process(
        config, two_processes.packed() if batch else two_processes.pictures()
    )
    for found in processes[1]:
        assert worst(found[how + batch], expected)[0] <= GRADIENTS


def test_bypassing_ddp(processes: Processes) -> None:
    _, expected = of_one_process(two_processes.CONFIG, two_processes.pictures())
    first, second = (found["past ddp"] for found in processes[1])
    assert worst(first, expected)[0] > 1e-2
    assert (
        worst({name: (grad + second[name]) / 2 for name, grad in first.items()}, expected)[0]
        <= GRADIENTS
    )


@torch.no_grad()
def test_fsdp_step_and_save(processes: Processes) -> None:
    folder, found = processes
    with torch.enable_grad():
        model, _ = of_one_process(two_processes.CONFIG, two_processes.pictures())
    larger = two_processes.pictures(side=32)
    before = model.eval().embed(**larger)
    torch.optim.SGD(model.parameters(), lr=two_processes.RATE).step()
    after = model.embed(**larger)
    assert relative_error(after, before) > 1e-3
    for process in found:
        assert relative_error(process["before"], before) <= GRADIENTS
        assert relative_error(process["after"], after) <= GRADIENTS
        assert relative_error(process["tokens"], model(**two_processes.pictures())) <= GRADIENTS
        assert (
            relative_error(process["pooled"], model.embed(**two_processes.pictures())) <= GRADIENTS
        )
    saved = SigLipVisionModel.from_hf(folder / "saved").state_dict()
    assert saved.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == saved[name].dtype
        assert relative_error(saved[name], tensor) <= GRADIENTS, name
    reference = references.load(folder / "saved", pooling_head=True, dtype=torch.float64).model
    x = two_processes.pictures()["pixel_values"]
    assert relative_error(reference(x).pooler_output, model.embed(x)) <= GRADIENTS


@torch.no_grad()
def test_fsdp_unregistered_methods(processes: Processes) -> None:
    model = two_processes.tower()
    batch = two_processes.pictures()
    maps = model.attention_maps(**batch, layers=[0, 2])[1]
    for rank, found in enumerate(processes[1]):
        half = {"pixel_values": batch["pixel_values"][2 * rank : 2 * rank + 2]}
        # `embed` calls the model itself, which gathers what `pool` needs; nothing does so for
        # `pool` alone.
        assert relative_error(found["vectors, embed not registered"], model.embed(**half)) <= EXACT
        assert found["pool, not registered"].startswith("RuntimeError: ")
        # Maps are made of parts of the blocks, not by calling them: they must be gathered by hand.
        assert "mixed torch.Tensor and DTensor" in found["maps, blocks sharded"]
        assert relative_error(found["maps"], maps) <= EXACT


def test_sharded_model_not_saved(processes: Processes) -> None:
    folder, found = processes
    for rank, process in enumerate(found):
        message = process["saved while sharded"]
        assert message.startswith("CheckpointError: the model to be saved does not hold the tower")
        assert "sharded or quantised; to be gathered or dequantised first (" in message
        assert not (folder / f"sharded-{rank}").exists()
