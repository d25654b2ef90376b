"""Checkpoints for the comparison, and the gates that run on each."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from siglip_port.checkpoint import layouts
from siglip_port.config import SigLipVisionConfig
from siglip_port.extras import MissingExtraError
from siglip_port.model import SigLipVisionModel
from siglip_port.parity import gates
from siglip_port.parity.calls import ReferenceCalls, run_calls
from siglip_port.parity.gates.environment import isolated
from siglip_port.parity.gradients import ReferenceGradients, run_gradients
from siglip_port.parity.guard import Guard, guard_with_taps
from siglip_port.parity.observe import ReferenceRun, run_reference
from siglip_port.parity.results import GateResult
from siglip_port.parity.sides import Call, Side, dtype_name
from siglip_port.parity.siglip import interface, reference, taps
from siglip_port.parity.siglip.reference import Reference
from siglip_port.parity.taps import Tap, expand

# Sizes that hide no bug: head_dim 18 differs from the number of heads and has an inexact square
# root, the image size is no multiple of the patch size, and 11 blocks sort differently as numbers
# and as text.
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

LOW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALL_GATES = (
    "environment",
    "config",
    "weights",
    "sensitivity",
    "numerics",
    "gradients",
    "calls",
    "interface",
    "rounding",
)
LARGE_MODEL_GATES = tuple(gate for gate in ALL_GATES if gate not in ("gradients", "calls"))
"""Gates of a checkpoint at full size; the others need many runs, and find the same on a small one.
"""


def port_outputs(port: SigLipVisionModel, pixel_values: Tensor) -> dict[str, Tensor]:
    """Return `tokens` [B, N, D] and, with a pooling head, `pooled` [B, D]."""
    tokens = port(pixel_values)
    if port.pooling_head is None:
        return {"tokens": tokens}
    return {"tokens": tokens, "pooled": port.pool(tokens)}


def tensors_by_reference_name(port: SigLipVisionModel) -> dict[str, Tensor]:
    """Return the port's tensors under the reference's names, computed from its parameters.

    Gradients reach the parameters through them.
    """
    layout = layouts.HUGGINGFACE_NAFLEX if port.config.naflex else layouts.HUGGINGFACE
    rules = layout.rules(port.config.pooling_head)
    state = port.state_dict(keep_vars=True)
    tensors = {}
    for name, mapping in layout.mappings(port.config.num_encoder_blocks, rules).items():
        if set(mapping.port) <= state.keys():
            parts = [state[part] for part in mapping.port]
            tensors[name] = mapping.to_stored(parts, port.config.num_attention_heads)
    return tensors


@dataclass
class Case:
    """A checkpoint with the reference loaded from it.

    Attributes:
        name: Name in reports.
        weights: Kind of weights: a recipe with its seed, or `checkpoint weights`.
        source: Hub id, folder or file of the checkpoint.
        reference: Reference, loaded from `source`.
        inputs: Images, [B, C, S, S], B > 1.
        gates: Names of the gates to run.
        dtypes: Dtypes in which rounding is checked; the first is the dtype of the weights.
        attentions: Attention implementations of the reference for the rounding bounds.
        reference_runs: Cached runs of the reference, by dtype.
    """

    name: str
    weights: str
    source: str
    reference: Reference
    inputs: Tensor
    gates: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    attentions: tuple[str, ...] = ("sdpa", "eager")
    reference_runs: dict[torch.dtype, ReferenceRun] = field(default_factory=dict)
    _calls: ReferenceCalls | None = field(default=None, init=False, repr=False)
    _gradients: ReferenceGradients | None = field(default=None, init=False, repr=False)

    def reference_run(self, dtype: torch.dtype) -> ReferenceRun:
        """Run the reference in `dtype`; cached."""
        if dtype not in self.reference_runs:
            model = self.reference.model
            points = expand({point: point for point in self._points()}, model, model)
            self.reference_runs[dtype] = run_reference(
                self.reference.side(),
                self.inputs,
                [tap.reference for tap in points],
                dtype,
                self.attentions,
            )
        return self.reference_runs[dtype]

    def reference_calls(self) -> ReferenceCalls:
        """Call the reference in all situations of the gate `calls`; cached."""
        if self._calls is None:
            host = self.reference.side()
            self._calls = run_calls(host, self.inputs, self.dtypes[0], mixed_dtypes=True)
        return self._calls

    def reference_gradients(self) -> ReferenceGradients:
        """Compute the gradients of the reference; cached."""
        if self._gradients is None:
            host = self.reference.side()
            points = list(self.reference_run(self.dtypes[0]).exact.taps)
            self._gradients = run_gradients(host, self.inputs, points, self.dtypes[0])
        return self._gradients

    def taps(self, port: nn.Module) -> list[Tap]:
        """Return the taps that pair a port with the reference."""
        return expand(self._points(), self.reference.model, port)

    def _points(self) -> dict[str, str]:
        points = taps.siglip_taps(hasattr(self.reference.model, "head"))
        if reference.is_naflex(self.reference.model):
            # A Linear over patches in the reference, a convolution in the port.
            points.pop("embeddings.patch_embedding", None)
        return points

    def check(
        self,
        port: SigLipVisionModel,
        call: Call = port_outputs,
        *,
        with_hints: bool = True,
    ) -> Iterator[GateResult]:
        """Run the gates on a port.

        Args:
            port: Port, loaded from `source`.
            call: Function (port, pixel_values) -> outputs by name.
            with_hints: Whether to look for known bugs that explain differences.

        Yields:
            The result of each gate; one per dtype for `rounding`.
        """
        guard = self.guard(port)
        side = isolated(Side(port, call))
        inputs = self.inputs.to(self.dtypes[0])
        reference = self.reference.side()
        if "environment" in self.gates:
            yield self.check_environment(Side(port, call))
        if "config" in self.gates:
            yield gates.check_config(vars(port.config), self.reference.config())
        if "weights" in self.gates:
            yield guard.run("weights", lambda: self.check_weights(port))
        if "sensitivity" in self.gates:
            yield guard.run("sensitivity", lambda: gates.check_sensitivity(side, reference, inputs))
        if "numerics" in self.gates:
            yield guard.run("numerics", lambda: self.check_numerics(side, with_hints=with_hints))
        if "gradients" in self.gates:
            yield guard.run("gradients", lambda: self.check_gradients(side))
        if "calls" in self.gates:
            yield guard.run("calls", lambda: self.check_calls(side))
        if "interface" in self.gates:
            yield guard.run("interface", lambda: interface.check_interface(port, inputs))
        if "rounding" in self.gates:
            for dtype in self.dtypes:
                if dtype != torch.float64:
                    check = functools.partial(self.check_rounding, side, dtype)
                    yield guard.run(f"rounding {dtype_name(dtype)}", check)

    def check_environment(self, side: Side) -> GateResult:
        """Run the gate `environment`, of which the last part runs the port."""
        reference = self.reference.side()
        modules = {"port": side.module, "reference": reference.module}
        return self.guard(side.module).run(
            "environment",
            lambda: gates.check_environment(modules),
            lambda: gates.check_shared_modules(side, reference, self.taps(side.module)),
            lambda: gates.check_switches(side, self.inputs.to(self.dtypes[0])),
        )

    def check_weights(self, port: SigLipVisionModel) -> GateResult:
        """Run the gate `weights`."""
        expected = self.reference.model.state_dict()
        return gates.check_weights(tensors_by_reference_name(port), expected)

    def check_numerics(self, side: Side, *, with_hints: bool) -> GateResult:
        """Run the gate `numerics` in the first dtype."""
        run = self.reference_run(self.dtypes[0])
        return gates.check_numerics(side, run, self.taps(side.module), with_hints=with_hints)

    def check_gradients(self, side: Side) -> GateResult:
        """Run the gate `gradients`."""
        gradients = self.reference_gradients()
        return gates.check_gradients(
            side, gradients, self.taps(side.module), tensors_by_reference_name
        )

    def check_calls(self, side: Side) -> GateResult:
        """Run the gate `calls`."""
        return gates.check_calls(side, self.reference_calls(), self.taps(side.module))

    def check_rounding(self, side: Side, dtype: torch.dtype) -> GateResult:
        """Run the gate `rounding` in a dtype."""
        run = self.reference_run(dtype)
        return gates.check_rounding(side, run, self.taps(side.module))

    def guard(self, port: nn.Module) -> Guard:
        """Return the guard that turns errors of the port into findings."""
        try:
            taps = self.taps(port)
        except ValueError:  # the port lacks a module: the gate `numerics` reports it
            taps = []
        return guard_with_taps(port, taps)


def engine_gates(
    case: Case, port: SigLipVisionModel, engine: str, cache_dir: Path
) -> Iterator[GateResult]:
    """Check the rounding of an engine of `siglip_port.optimize` at its outputs; it has no taps.

    Args:
        case: Checkpoint with its reference.
        port: Port, loaded from its source.
        engine: Name in `siglip_port.optimize.ENGINES`.
        cache_dir: Folder for compiled artifacts.

    Yields:
        A result for each dtype of the case that the engine supports.

    Raises:
        siglip_port.optimize.EngineError: The engine supports none of the dtypes.
    """
    from siglip_port.optimize import EngineError, with_engine  # parity works without it

    first_error = None
    is_checked = False
    for dtype in case.dtypes:
        try:
            model = with_engine(port, engine, dtype=dtype, cache_dir=cache_dir)
        except (EngineError, MissingExtraError) as error:
            first_error = first_error or error
            continue
        is_checked = True
        result = gates.check_rounding(Side(model, port_outputs), case.reference_run(dtype), [])
        yield replace(result, name=f"{result.name}, {engine}")
    if first_error is not None and not is_checked:
        raise first_error


def noise_images(config: SigLipVisionConfig, batch: int = 2, seed: int = 0) -> Tensor:
    """Return images of uniform noise in [-1, 1]: [batch, C, S, S].

    For NaFlex models, images that are not square.
    """
    height = width = config.image_size
    if config.naflex:
        height -= config.patch_size
        width += 2 * config.patch_size
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, config.num_channels, height, width, generator=generator) * 2 - 1


@contextmanager
def random_case(
    config: SigLipVisionConfig,
    recipe: str,
    seed: int = 1234,
    *,
    gates: tuple[str, ...] = ALL_GATES,
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
    attentions: tuple[str, ...] = ("sdpa", "eager"),
    device: str = "cpu",
    name: str = "odd encoder",
) -> Iterator[Case]:
    """Write a checkpoint with the weights of a recipe, and load the reference from it.

    Args:
        config: Architecture.
        recipe: Name in `siglip_port.parity.siglip.recipes.RECIPES`.
        seed: Seed of weights and inputs.
        gates: Names of the gates to run.
        dtypes: Dtypes in which rounding is checked.
        attentions: Attention implementations of the reference for the rounding bounds.
        device: Device of the reference and the inputs.
        name: Name in reports.
    """
    with tempfile.TemporaryDirectory(prefix="siglip_port-") as folder:
        reference.write_random_checkpoint(Path(folder), config, seed, recipe)
        loaded = reference.load(
            folder,
            dtype=torch.float32,
            pooling_head=config.pooling_head,
            naflex=config.naflex,
            device=device,
        )
        inputs = noise_images(config, seed=seed).to(device)
        weights = f"{recipe}, seed {seed}"
        yield Case(name, weights, folder, loaded, inputs, gates, dtypes, attentions)


def small_cases(
    config: SigLipVisionConfig, device: str, attentions: tuple[str, ...], *, full: bool = False
) -> Iterator[AbstractContextManager[Case]]:
    """Yield small models with stress weights and the activation, eps and head of `config`.

    Args:
        config: Configuration of the checkpoint.
        device: Device of the models.
        attentions: Attention implementations of the reference for the rounding bounds.
        full: Whether to run all gates on all recipes, with two seeds and all dtypes, instead of
            each recipe with its own gates only.
    """
    odd = compute_as(ODD, config)
    mini = compute_as(MINI, config)
    case = functools.partial(random_case, device=device, attentions=attentions)
    if full:
        for seed in (1234, 4321):
            for recipe in ("default", "N1", "S1"):
                yield case(odd, recipe, seed, dtypes=LOW_DTYPES)
            for recipe in ("L7", "L8"):
                yield case(odd, recipe, seed)
            yield case(mini, "N1", seed, dtypes=LOW_DTYPES, name="small so400m")
        return
    yield case(odd, "N1", gates=ALL_GATES[:-1])
    yield case(mini, "N1", gates=("weights", "numerics"), name="small so400m")
    yield case(odd, "L7", gates=("rounding",))
    yield case(odd, "S1", gates=("rounding",), dtypes=LOW_DTYPES[1:])


def compute_as(architecture: SigLipVisionConfig, config: SigLipVisionConfig) -> SigLipVisionConfig:
    """Return the sizes of `architecture` with the activation, eps and head of `config`."""
    return replace(
        architecture,
        hidden_act=config.hidden_act,
        layer_norm_eps=config.layer_norm_eps,
        pooling_head=config.pooling_head,
        naflex=config.naflex,
    )
