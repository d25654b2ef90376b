"""The proof of this port: which checkpoints it is tested on, and by which gates."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import siglip_port
from siglip_port import SigLipVisionConfig
from siglip_port.checkpoint import layouts as key_map
from siglip_port.optimize import selection as inference
from siglip_port.parity import gates, taps
from siglip_port.parity.gates import HINTS, Finding, Gate, Side, Truth
from siglip_port.parity.metrics import bits, relative_error
from siglip_port.parity.siglip import reference as references
from siglip_port.parity.siglip.reference import Reference

# Widths, heads and sizes that no mistake survives by luck: head_dim 18 is not the number of heads
# and its root is inexact, the picture is no multiple of the patch, and 11 blocks sort differently
# as numbers and as text.
ODD = SigLipVisionConfig(
    embed_dim=144,
    image_size=96,
    patch_size=14,
    num_attention_heads=8,
    num_encoder_blocks=11,
    mlp_hidden_dim=538,
    pooling_head=True,
)
# A small siglip-so400m: its head_dim of 72 and its patches of 14.
MINI = replace(
    ODD,
    embed_dim=216,
    image_size=70,
    num_attention_heads=3,
    num_encoder_blocks=3,
    mlp_hidden_dim=301,
)


@dataclass
class Case:
    """One checkpoint, the reference loaded from it, and what the reference computes.

    Attributes:
        name: for reports.
        weights: what kind of weights they are: a recipe with its seed, or `checkpoint`.
        source: where the port loads it from.
        reference: loaded from the same place.
        inputs: [B, C, S, S], B > 1.
        gates: names of the gates to run.
        dtypes: in which rounding is judged; the first is that of the weights.
        attentions: of the reference, whose rounding counts.
    """

    name: str
    weights: str
    source: str
    reference: Reference
    inputs: Tensor
    gates: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    attentions: tuple[str, ...] = ("sdpa", "eager")
    truths: dict[torch.dtype, Truth] = field(default_factory=dict)

    def truth(self, dtype: torch.dtype) -> Truth:
        """What the reference computes, worked out once."""
        if dtype not in self.truths:
            points = [tap.reference for tap in self._taps(self.reference.model)]
            self.truths[dtype] = gates.observe(
                self.reference.side(), self.inputs, points, dtype, self.attentions
            )
        return self.truths[dtype]

    def _taps(self, port: nn.Module, table: ModuleType = key_map) -> list[taps.Tap]:
        has_head = hasattr(self.reference.model, "head")
        pairs = taps.siglip_taps(has_head, table)
        if references.is_naflex(self.reference.model):
            del pairs[
                "embeddings.patch_embedding"
            ]  # a Linear over patches there, a convolution of pictures here
        if port is self.reference.model:
            return taps.expand({theirs: theirs for theirs in pairs}, port, port)
        return taps.expand(pairs, self.reference.model, port)

    def check(
        self,
        port: Any,  # noqa: ANN401 (a class of the package, perhaps imported a second time)
        run: Callable[[nn.Module, Tensor], Mapping[str, Tensor]] | None = None,
        table: ModuleType = key_map,
        only: tuple[str, ...] | None = None,
        explained: int = HINTS,
    ) -> Iterator[Gate]:
        """Runs the gates on a port, one after the other.

        Args:
            port: loaded from `source`.
            run: how it is called, if not as `outputs` does.
            table: the key map it was loaded with.
            only: names of the gates to run, of those of this case.
            explained: how many of the taps that differ get a hint.
        """
        side, reference = Side(port, run or outputs), self.reference.side()
        wanted = [gate for gate in self.gates if only is None or gate in only]
        if "environment" in wanted:
            yield gates.environment({"port": port, "reference": self.reference.model})
        if "config" in wanted:
            yield gates.config(vars(port.config), self.reference.config())
        if "weights" in wanted:
            yield gates.weights(stored(port, table), self.reference.model.state_dict())
        if "liveness" in wanted:
            yield gates.liveness(side, reference, self.inputs.to(self.dtypes[0]))
        if "semantics" in wanted:
            pairs = self._taps(port, table)
            yield gates.semantics(
                side, reference, self.truth(self.dtypes[0]), pairs, explained=explained
            )
        if "interface" in wanted:
            yield interface(port, self.inputs.to(self.dtypes[0]))
        if "rounding" in wanted:
            for dtype in self.dtypes:
                if dtype != torch.float64:
                    yield gates.rounding(side, self.truth(dtype), self._taps(port, table))


def outputs(port: Any, pixel_values: Tensor) -> dict[str, Tensor]:  # noqa: ANN401
    """`tokens` [B, N, D] and, where the port has a head, `pooled` [B, D]."""
    tokens = port(pixel_values)
    return (
        {"tokens": tokens}
        if port.pooling_head is None
        else {"tokens": tokens, "pooled": port.pool(tokens)}
    )


def interface(port: Any, pixel_values: Tensor) -> Gate:  # noqa: ANN401
    """The other entrances of the port, by those that are proven."""
    findings = []
    with torch.inference_mode():
        tokens = port(pixel_values)
        rows, columns = (side // port.config.patch_size for side in pixel_values.shape[2:])
        expected = (len(pixel_values), rows * columns, port.config.embed_dim)
        if tokens.shape != expected:
            findings.append(
                Finding(
                    f"shape {list(tokens.shape)}, expected {list(expected)}", "tokens", "forward"
                )
            )
        if port.pooling_head is not None:
            pooled, embedded = port.pool(tokens), port.embed(pixel_values)
            if embedded.shape != pooled.shape or not torch.equal(bits(embedded), bits(pooled)):
                findings.append(Finding("embed() is not pool() of the tokens", "pooled", "embed"))
            unit, size = (
                port.embed(pixel_values, normalize=True),
                pooled.double().norm(dim=-1, keepdim=True),
            )
            allowed = 4 * torch.finfo(unit.dtype).eps
            if (
                unit.shape != pooled.shape
                or not relative_error(unit, pooled.double() / size) <= allowed
            ):
                findings.append(
                    Finding("embed(normalize=True) is not pooled / ||pooled||", "pooled", "embed")
                )
        if port.config.naflex:
            findings += [
                Finding(what, "tokens", "forward") for what in _packed_differs(port, pixel_values)
            ]
    checked = 1 + 2 * (port.pooling_head is not None) + port.config.naflex
    return Gate("interface", checked, gates.MEANING["interface"][1], tuple(findings))


def _packed_differs(port: Any, pixel_values: Tensor) -> list[str]:  # noqa: ANN401
    """Whether packed patches, beside those of a smaller picture and padding, give other tokens than the picture."""
    patch, (height, width) = port.config.patch_size, pixel_values.shape[2:]
    small = pixel_values[0, :, : height - patch, : width - patch]
    with gates.cast(port, pixel_values.dtype, torch.float64):
        wide = [picture.double() for picture in (*pixel_values, small)]
        packed = port(**siglip_port.pack(wide, patch))
        for tokens, picture in zip(packed, wide, strict=True):
            alone = port(picture[None])[0]
            if not relative_error(tokens[: len(alone)], alone) <= gates.FLOAT64_BOUND:
                return [
                    f"packed patches of {list(picture.shape[1:])} pixels give other tokens than "
                    "the picture"
                ]
    return []


def stored(port: Any, table: ModuleType = key_map) -> dict[str, Tensor]:  # noqa: ANN401
    """The port's tensors under the reference's names, those that it has."""
    layout = table.HUGGINGFACE_NAFLEX if port.config.naflex else table.HUGGINGFACE
    tensors, claims = (
        port.state_dict(),
        layout.mappings(port.config.num_encoder_blocks, layout.rules(port.config.pooling_head)),
    )
    return {
        name: claim.to_stored([tensors[our] for our in claim.port], port.config.num_attention_heads)
        for name, claim in claims.items()
        if set(claim.port) <= set(tensors)
    }


def noise(config: SigLipVisionConfig, batch: int = 2, seed: int = 0) -> Tensor:
    """Pictures of uniform noise in [-1, 1]: [batch, C, S, S].

    For NaFlex towers of another shape than their own.
    """
    size, patch = config.image_size, config.patch_size
    sides = (size - patch, size + 2 * patch) if config.naflex else (size, size)
    shape = (batch, config.num_channels, *sides)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def form_gates(
    case: Case, port: siglip_port.SigLipVisionModel, engine: str, cache_dir: Path
) -> Iterator[Gate]:
    """Judges the rounding of a port in a form of `siglip_port.optimize`, by what comes out.

    It may have no inside.

    Args:
        case: what to judge it on.
        port: loaded from its source.
        engine: a name of `siglip_port.optimize.selection.ENGINES`.
        cache_dir: where to keep what is compiled.

    Yields:
        A gate for each dtype of the case that the form can compute in.

    Raises:
        siglip_port.optimize.selection.EngineError: it can compute in none of them.
    """
    reasons, judged = [], 0
    for dtype in case.dtypes:
        try:
            form = inference.in_form(port, engine, dtype=dtype, cache_dir=cache_dir)
        except inference.EngineError as error:
            reasons.append(error)
            continue
        judged += 1
        gate = gates.rounding(Side(form, outputs), case.truth(dtype), [])
        yield replace(gate, name=f"{gate.name}, {engine}")
    if not judged:
        raise reasons[0]


LOW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALL_GATES = ("environment", "config", "weights", "liveness", "semantics", "interface", "rounding")


@contextmanager
def made(
    config: SigLipVisionConfig,
    recipe: str,
    seed: int = 1234,
    *,
    gates: tuple[str, ...] = ALL_GATES,
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
    attentions: tuple[str, ...] = ("sdpa", "eager"),
    device: str = "cpu",
    name: str = "odd tower",
) -> Iterator[Case]:
    """A checkpoint with the weights of a recipe, written by the reference, and read by both sides as any other is."""
    with tempfile.TemporaryDirectory(prefix="siglip_port-") as folder:
        references.write_random_checkpoint(Path(folder), config, seed, recipe)
        kind: dict[str, Any] = {
            "pooling_head": config.pooling_head,
            "naflex": config.naflex,
            "device": device,
        }
        reference = references.load(folder, dtype=torch.float32, **kind)
        inputs = noise(config, seed=seed).to(device)
        yield Case(
            name, f"{recipe}, seed {seed}", folder, reference, inputs, gates, dtypes, attentions
        )


def small_cases(
    config: SigLipVisionConfig, device: str, attentions: tuple[str, ...], *, full: bool = False
) -> Iterator[AbstractContextManager[Case]]:
    """Small towers that compute as `config` says, with the weights on which mistakes are loud.

    Args:
        config: of the tower that is to be proven; activation, eps and head are taken from it.
        device: where to.
        attentions: of the reference, whose rounding counts.
        full: all gates on all recipes, with two seeds and all dtypes, instead of what each recipe
            is best for.
    """
    code = {
        name: getattr(config, name)
        for name in ("hidden_act", "layer_norm_eps", "pooling_head", "naflex")
    }
    odd, mini = replace(ODD, **code), replace(MINI, **code)
    how: dict[str, Any] = {"device": device, "attentions": attentions}
    if full:
        for seed in (1234, 4321):
            for recipe in ("default", "N1", "S1", "L7", "L8"):
                dtypes = (torch.float32,) if recipe in ("L7", "L8") else LOW_DTYPES
                yield made(odd, recipe, seed, dtypes=dtypes, **how)
            yield made(mini, "N1", seed, dtypes=LOW_DTYPES, name="small so400m", **how)
        return
    yield made(odd, "N1", gates=ALL_GATES[:-1], **how)
    yield made(mini, "N1", gates=("weights", "semantics"), name="small so400m", **how)
    yield made(odd, "L7", gates=("rounding",), **how)
    yield made(odd, "S1", gates=("rounding",), dtypes=LOW_DTYPES[1:], **how)


def load_port(source: str, **how: Any) -> siglip_port.SigLipVisionModel:  # noqa: ANN401
    """Loads the port as a user does."""
    return siglip_port.SigLipVisionModel.from_hf(source, **how)
