"""Checkpoints for the comparison, and the gates that run on each."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from siglip_port.checkpoint import LoadOptions, layouts
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
from siglip_port.parity.sides import Call, Inputs, Side, cast_inputs, dtype_name
from siglip_port.parity.siglip import interface, reference, regimes, taps
from siglip_port.parity.siglip.reference import ReferenceHandle
from siglip_port.parity.siglip.reference_process import IN_THIS_PROCESS, References
from siglip_port.parity.siglip.regimes import Regime
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
# For input regimes: a grid of 5 x 5 and a head_dim of 18.
COMPACT = replace(
    ODD,
    embed_dim=72,
    image_size=38,
    patch_size=7,
    num_attention_heads=4,
    num_encoder_blocks=2,
    mlp_hidden_dim=101,
)
PACKED = replace(COMPACT, image_size=20, patch_size=4, naflex=True)
# 1,089 patches.
LONG = replace(
    COMPACT,
    embed_dim=24,
    image_size=66,
    patch_size=2,
    num_attention_heads=2,
    num_encoder_blocks=1,
    mlp_hidden_dim=31,
)
# One of everything.
SINGLE = replace(COMPACT, num_channels=1, embed_dim=32, num_attention_heads=1, num_encoder_blocks=1)

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


def port_outputs(port: SigLipVisionModel, inputs: Tensor | Mapping[str, Any]) -> dict[str, Tensor]:
    """Run the port with `forward` and `pool`.

    Args:
        port: Port.
        inputs: Images [B, C, H, W], or packed patches with a mask, by argument.

    Returns:
        `tokens` [B, N, D], 0 at padding, and, with a pooling head, `pooled` [B, D].
    """
    arguments = as_arguments(inputs)
    tokens = port(**arguments)
    outputs = {"tokens": reference.hide_padding(tokens, reference.find_defined(inputs))}
    if port.pooling_head is not None:
        outputs["pooled"] = port.pool(tokens, arguments.get("pixel_attention_mask"))
    return outputs


def embed_outputs(port: SigLipVisionModel, inputs: Tensor | Mapping[str, Any]) -> dict[str, Tensor]:
    """Run the port with `forward` and `embed`: see `port_outputs`; the mask may be missing."""
    arguments = as_arguments(inputs)
    tokens = port(**arguments)
    outputs = {"tokens": reference.hide_padding(tokens, reference.find_defined(inputs))}
    if port.pooling_head is not None:
        outputs["pooled"] = port.embed(**arguments)
    return outputs


def as_arguments(inputs: Tensor | Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the port's methods by name."""
    if isinstance(inputs, Tensor):
        return {"pixel_values": inputs}
    return dict(inputs)


def call_arranged(
    arrange: Callable[[Tensor], Tensor], port: SigLipVisionModel, images: Tensor
) -> dict[str, Tensor]:
    """Run the port on images in another memory layout."""
    return port_outputs(port, arrange(images))


def port_call(regime: Regime) -> Call:
    """Return the function that runs the port in a regime."""
    if regime.arrange is not None:
        return functools.partial(call_arranged, regime.arrange)
    if regime.uses_embed:
        return embed_outputs
    return port_outputs


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
        inputs: Images, [B, C, S, S]; in some regimes, packed patches by argument.
        gates: Names of the gates to run.
        dtypes: Dtypes in which rounding is checked; the first is the dtype of the weights.
        attentions: Attention implementations of the reference for the rounding bounds.
        call: Function (port, inputs) -> outputs by name.
        load_options: Options of `from_hf` for the port.
        reference_runs: Cached runs of the reference, by dtype.
    """

    name: str
    weights: str
    source: str
    reference: ReferenceHandle
    inputs: Any
    gates: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    attentions: tuple[str, ...] = ("sdpa", "eager")
    call: Call = port_outputs
    load_options: LoadOptions = field(default_factory=LoadOptions)
    reference_runs: dict[torch.dtype, ReferenceRun] = field(default_factory=dict)
    _calls: ReferenceCalls | None = field(default=None, init=False, repr=False)
    _gradients: ReferenceGradients | None = field(default=None, init=False, repr=False)

    def reference_run(self, dtype: torch.dtype) -> ReferenceRun:
        """Run the reference in `dtype`; cached."""
        if dtype not in self.reference_runs:
            modules = self.reference.module_types()
            points = expand({point: point for point in self._points()}, modules, modules)
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
        return expand(self._points(), self.reference.module_types(), port, is_strict=False)

    def _points(self) -> dict[str, str]:
        points = taps.siglip_taps("head" in self.reference.module_types())
        if self.reference.config().get("naflex"):
            # A Linear over patches in the reference, a convolution in the port.
            points.pop("embeddings.patch_embedding", None)
        return points

    def check(
        self,
        port: SigLipVisionModel,
        call: Call | None = None,
        *,
        with_hints: bool = True,
    ) -> Iterator[GateResult]:
        """Run the gates on a port.

        Args:
            port: Port, loaded from `source`.
            call: Function (port, inputs) -> outputs by name; None for that of the case.
            with_hints: Whether to look for known bugs that explain differences.

        Yields:
            The result of each gate; one per dtype for `rounding`.
        """
        guard = self.guard(port)
        call = call or self.call
        side = isolated(Side(port, call))
        inputs: Any = cast_inputs(self.inputs, self.dtypes[0])
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
        """Run the gate `environment` on both sides, each in its own process.

        The last part runs the port.
        """
        host = self.reference.side()
        own = self.guard(side.module).run(
            "environment",
            lambda: gates.check_environment({"port": side.module}),
            lambda: gates.check_shared_modules(side, host, self.taps(side.module)),
            lambda: gates.check_switches(side, cast_inputs(self.inputs, self.dtypes[0])),
        )
        other = self.reference.check_environment()
        # In one process, both sides have the same switches of torch.
        others = [finding for finding in other.findings if finding not in own.findings]
        return replace(own, checked=own.checked + other.checked, findings=(*own.findings, *others))

    def check_weights(self, port: SigLipVisionModel) -> GateResult:
        """Run the gate `weights`."""
        expected = self.reference.state_dict()
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
        return guard_with_taps(port, self.taps(port))


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
    dtypes: tuple[torch.dtype, ...] = LOW_DTYPES[:1],
    attentions: tuple[str, ...] = ("sdpa", "eager"),
    device: str = "cpu",
    name: str = "odd encoder",
    references: References = IN_THIS_PROCESS,
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
        references: Place of the reference.
    """
    noise = Regime("", noise_images(config, seed=seed), gates, dtypes)
    model = SmallModel(name, config, recipe, [noise], seed)
    with model.load(device, attentions, references) as (case,):
        yield case


@dataclass(frozen=True)
class SmallModel:
    """Random model, and the regimes that it is compared in.

    Attributes:
        name: Name in reports.
        config: Architecture.
        recipe: Name in `siglip_port.parity.siglip.recipes.RECIPES`.
        regimes: Inputs.
        seed: Seed of the weights.
        load_options: Options of `from_hf` for the port.
    """

    name: str
    config: SigLipVisionConfig
    recipe: str
    regimes: Sequence[Regime]
    seed: int = 1234
    load_options: LoadOptions = field(default_factory=LoadOptions)

    @contextmanager
    def load(
        self, device: str, attentions: tuple[str, ...], references: References = IN_THIS_PROCESS
    ) -> Iterator[list[Case]]:
        """Write the checkpoint, load the reference, and yield a case for each regime.

        Args:
            device: Device of the models and the inputs.
            attentions: Attention implementations of the reference for the rounding bounds.
            references: Place of the reference.
        """
        has_head = self.config.pooling_head and self.load_options.get("pooling_head") is not False
        dtype = self.load_options.get("dtype") or torch.float32
        assert isinstance(dtype, torch.dtype)
        with tempfile.TemporaryDirectory(prefix="siglip_port-") as folder:
            config = reference.fields_of(self.config)
            references.call(
                reference.write_random_checkpoint, Path(folder), config, self.seed, self.recipe
            )
            loaded = references.load(
                folder,
                dtype=dtype,
                pooling_head=has_head,
                naflex=self.config.naflex,
                device=device,
            )
            yield [self.case(regime, folder, loaded, device, attentions) for regime in self.regimes]

    def case(
        self,
        regime: Regime,
        folder: str,
        loaded: ReferenceHandle,
        device: str,
        attentions: tuple[str, ...],
    ) -> Case:
        """Return the case of one regime."""
        return Case(
            name=", ".join(filter(None, [self.name, regime.name])),
            weights=f"{self.recipe}, seed {self.seed}",
            source=folder,
            reference=loaded,
            inputs=move_inputs(regime.inputs, device),
            gates=regime.gates,
            dtypes=regime.dtypes,
            attentions=attentions,
            call=port_call(regime),
            load_options={"device": device, **self.load_options},
        )


def move_inputs(inputs: Inputs, device: str) -> Inputs:
    """Move all tensors of some inputs to a device."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    assert isinstance(inputs, Mapping)
    moved = {}
    for name, value in inputs.items():
        moved[name] = value.to(device) if isinstance(value, Tensor) else value
    return moved


def small_cases(
    config: SigLipVisionConfig,
    device: str,
    attentions: tuple[str, ...],
    *,
    full: bool = False,
    references: References = IN_THIS_PROCESS,
) -> Iterator[AbstractContextManager[list[Case]]]:
    """Yield small models with stress weights, each with the cases that share its port.

    Most have the activation, eps and head of `config`.

    Args:
        config: Configuration of the checkpoint.
        device: Device of the models.
        attentions: Attention implementations of the reference for the rounding bounds.
        full: Whether to run all gates on each recipe, with two seeds, instead of its own gates
            only. The input regimes are the same.
        references: Place of the references.
    """
    models = weight_models(config)
    if full:
        models = full_weight_models(config)
    for model in [*models, *regime_models(config)]:
        yield model.load(device, attentions, references)


def weight_models(
    config: SigLipVisionConfig, seed: int = 1234, *, odd: SigLipVisionConfig | None = None
) -> list[SmallModel]:
    """Return models with odd sizes and weights on which different bugs show.

    Args:
        config: Configuration of the checkpoint.
        seed: Seed of weights and inputs.
        odd: Architecture of most of them; None for `ODD`.
    """
    odd = compute_as(odd or ODD, config)
    mini = compute_as(MINI, config)
    low = LOW_DTYPES[1:]
    most = tuple(gate for gate in ALL_GATES if gate not in ("calls", "rounding"))
    return [
        noise_model("odd encoder", odd, "N1", most, seed=seed),
        # With fewer blocks, for many runs.
        noise_model("small so400m", mini, "N1", ("weights", "numerics", "calls"), seed=seed),
        noise_model("odd encoder", odd, "L7", ("rounding",), seed=seed),
        noise_model("odd encoder", odd, "S1", ("rounding",), low, seed),
        noise_model("odd encoder", odd, "L8", ("rounding",), seed=seed),
    ]


def full_weight_models(config: SigLipVisionConfig) -> list[SmallModel]:
    """Return models of odd sizes with all recipes, for all gates."""
    odd = compute_as(ODD, config)
    mini = compute_as(MINI, config)
    models = []
    for seed in (1234, 4321):
        for recipe in ("default", "N1", "S1"):
            models.append(noise_model("odd encoder", odd, recipe, ALL_GATES, LOW_DTYPES, seed))
        for recipe in ("L7", "L8"):
            models.append(noise_model("odd encoder", odd, recipe, ALL_GATES, seed=seed))
        models.append(noise_model("small so400m", mini, "N1", ALL_GATES, LOW_DTYPES, seed))
    return models


def noise_model(
    name: str,
    config: SigLipVisionConfig,
    recipe: str,
    gates: tuple[str, ...],
    dtypes: tuple[torch.dtype, ...] = LOW_DTYPES[:1],
    seed: int = 1234,
) -> SmallModel:
    """Return a model for two noise images of its own size."""
    noise = Regime("", noise_images(config, seed=seed), gates, dtypes)
    return SmallModel(name, config, recipe, [noise], seed)


def regime_models(config: SigLipVisionConfig, seed: int = 1234) -> list[SmallModel]:
    """Return the models for input regimes, of fixed size and NaFlex whatever `config` is."""
    fixed = compute_as(COMPACT, replace(config, naflex=False))
    packed = compute_as(PACKED, replace(config, naflex=True))
    long = compute_as(LONG, replace(config, naflex=False))
    interpolating = LoadOptions(interpolation="hf")
    two = regimes.image_noise(regimes.own_shape(fixed, 2), seed)
    longer = [Regime("1089 patches", noise_images(long, seed=seed))]
    resized = [Regime("324 patches", regimes.image_noise((2, long.num_channels, 36, 36), seed))]
    packed_noise = regimes.pack_noise(packed, regimes.MANY_SHAPES, seed)
    outliers = Regime("", two, ("numerics", "rounding"), regimes.ROUNDED)
    float16 = Regime("", two, ("rounding",), (torch.float16,))
    return [
        SmallModel("small encoder", fixed, "N1", regimes.image_regimes(fixed, seed), seed),
        SmallModel(
            "resized encoder", fixed, "N1", regimes.grid_regimes(fixed, seed), seed, interpolating
        ),
        SmallModel("NaFlex encoder", packed, "N1", regimes.packed_regimes(packed, seed), seed),
        SmallModel("outliers", fixed, "O1", [outliers], seed),
        SmallModel("float16 outliers", fixed, "O2", [float16], seed),
        SmallModel("NaFlex outliers", packed, "O1", [Regime("", packed_noise)], seed),
        SmallModel("long encoder", long, "N1", longer, seed),
        SmallModel("long resized encoder", long, "N1", resized, seed, interpolating),
        *variant_models(config, seed),
    ]


def variant_models(config: SigLipVisionConfig, seed: int) -> list[SmallModel]:
    """Return models of other configurations than the checkpoint's, and with options of loading."""
    fixed = replace(COMPACT, hidden_act=config.hidden_act, layer_norm_eps=config.layer_norm_eps)
    single = replace(SINGLE, **other_computation(config))
    single_packed = replace(single, naflex=True, image_size=20, patch_size=4)
    gates = ("environment", "config", "weights", "numerics")
    noise = regimes.pack_noise(single_packed, regimes.MANY_SHAPES, seed)
    packed = Regime("", noise, gates)
    bfloat16 = (torch.bfloat16,)
    return [
        noise_model("single-channel encoder", single, "S1", gates),
        SmallModel("single-channel NaFlex encoder", single_packed, "S1", [packed], seed),
        noise_model("headless encoder", replace(fixed, pooling_head=False), "N1", gates),
        replace(
            noise_model("encoder without its head", fixed, "N1", gates),
            load_options=LoadOptions(pooling_head=False),
        ),
        replace(
            noise_model("bfloat16 encoder", fixed, "N1", (*gates, "rounding"), bfloat16),
            load_options=LoadOptions(dtype=torch.bfloat16),
        ),
    ]


def other_computation(config: SigLipVisionConfig) -> dict[str, Any]:
    """Return another activation and eps than those of `config`."""
    hidden_act = "gelu"
    if config.hidden_act == "gelu":
        hidden_act = "gelu_pytorch_tanh"
    return {"hidden_act": hidden_act, "layer_norm_eps": 10 * config.layer_norm_eps}


def compute_as(architecture: SigLipVisionConfig, config: SigLipVisionConfig) -> SigLipVisionConfig:
    """Return the sizes of `architecture`, computed as by `config`, of whose kind it is."""
    return replace(
        architecture,
        hidden_act=config.hidden_act,
        layer_norm_eps=config.layer_norm_eps,
        pooling_head=config.pooling_head,
        naflex=config.naflex,
    )
