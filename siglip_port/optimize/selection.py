"""The fast path: one call that turns a loaded tower into its fastest form on the machine at hand.

What can be tried is a list of engines. Each is built, compared with the tower itself and timed
beside it; the fastest whose results stay inside a bound is taken. What was found is kept, and so is
what was compiled: the next process starts with it at once. See docs/performance.md for what each
engine brought where.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import os
import platform
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from siglip_port import atomic, validation
from siglip_port.checkpoint import build_on_meta
from siglip_port.model import SigLipVisionModel, SigLipVisionTransformer
from siglip_port.optimize import onednn as native
from siglip_port.patches import Mask, Shapes

BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3, torch.int8: 0.2}
"""By how much the tokens and vectors of a form may differ from those of the tower in the same dtype (in float32, for
int8): the largest difference over the largest number."""

WORTH = 0.97
"""An engine must need less than this share of the tower's own time, or the tower stays as it is."""

ROUNDS = 5

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Choice:
    """What `optimize` chose, and why.

    Attributes:
        engine: a name of `ENGINES`.
        conditions: dtype, batch size, threads, and the machine, on which the times were measured.
        milliseconds: a picture, by engine; of those that were tried.
        difference: from the tower itself in the same dtype, as `BOUNDS` count it; 0.0 for the tower
            itself.
        bound: what `difference` may be at most.
        left_out: the engines that could not be tried or taken, each with the reason.
    """

    engine: str
    conditions: str
    milliseconds: Mapping[str, float] = field(default_factory=dict)
    difference: float = 0.0
    bound: float = 0.0
    left_out: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """All of it in a sentence or three."""
        times = ", ".join(
            f"{name} {ms:.1f}" for name, ms in sorted(self.milliseconds.items(), key=lambda i: i[1])
        )
        out = "".join(f"\n{name} is left out: {reason}" for name, reason in self.left_out.items())
        measured = f"; milliseconds a picture: {times}" if times else ""
        return (
            f"{self.engine} ({self.conditions}{measured}); results differ from the tower's own by "
            f"{self.difference:.1e}, bound {self.bound:.0e}{out}"
        )


class OptimizedModel(SigLipVisionModel):
    """A tower in its fastest form, for inference; made by `optimize`.

    Same methods, same shapes, no gradients.

    Attributes:
        choice: the form, and why it is this one: `print(model.choice)`.
    """

    choice: Choice


class EngineTransformer(SigLipVisionTransformer):
    """Sends pictures of the tower's own size through an engine, and all else through its own modules.

    A copy, a pickle, and a tower that was moved or cast afterwards go through its own modules
    alone: an engine holds weights of its own, in one dtype, on one machine.

    Attributes:
        run: [B, C, S, S] -> [B, N, D], in the tower's dtype; None for no engine.
    """

    run: Callable[[Tensor], Tensor] | None

    def __init__(self, tower: SigLipVisionTransformer, run: Callable[[Tensor], Tensor]) -> None:
        nn.Module.__init__(self)
        self.embeddings, self.encoder, self.post_layernorm = (
            tower.embeddings,
            tower.encoder,
            tower.post_layernorm,
        )
        self.run = run

    def forward(
        self,
        pixel_values: Tensor,
        pixel_attention_mask: Mask = None,
        spatial_shapes: Shapes = None,
    ) -> Tensor:
        """[B, C, S, S] -> [B, N, D]; or packed patches."""
        size, home = self.embeddings.config.image_size, self.post_layernorm.weight
        packed = pixel_attention_mask is not None or spatial_shapes is not None
        own = (
            isinstance(pixel_values, Tensor)
            and pixel_values.shape[2:] == (size, size)
            and len(pixel_values) > 0
        )
        if (
            self.run is None
            or packed
            or not own
            or (torch.is_grad_enabled() and pixel_values.requires_grad)
        ):
            return super().forward(pixel_values, pixel_attention_mask, spatial_shapes)
        validation.validate_images(pixel_values, self.embeddings.config)
        return self.run(pixel_values.detach().to(home.device, home.dtype).contiguous())

    def _apply(self, *args: Any, **kwargs: Any) -> Self:  # noqa: ANN401 (torch's own signature)
        before = [(p.data_ptr(), p.dtype) for p in self.parameters()]
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        if before != [(p.data_ptr(), p.dtype) for p in self.parameters()]:
            self.run = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: all but the engine."""
        return {**self.__dict__, "run": None}


class EngineError(Exception):
    """An engine cannot be used here; the message says why."""


def _eager(model: OptimizedModel, kept: Path) -> None:
    """The tower as it is."""


def _packed(model: OptimizedModel, kept: Path) -> None:
    _pack(model, fuse=False)


def _packed_fused(model: OptimizedModel, kept: Path) -> None:
    _pack(model, fuse=True)


def _pack(model: OptimizedModel, *, fuse: bool) -> None:
    if _home(model).device.type != "cpu":
        raise EngineError("it is for CPUs")
    if reason := native.why_not_packed(_home(model).dtype):
        raise EngineError(reason)
    native.pack(model, fuse=fuse)


def _compiled(model: OptimizedModel, kept: Path) -> None:
    if _home(model).device.type != "cuda":
        raise EngineError(
            "it is for GPUs; on a CPU it takes minutes for nothing: docs/performance.md"
        )
    compiled = torch.compile(model.transformer, mode="max-autotune", dynamic=False)

    def run(pixel_values: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return cast("Tensor", compiled(pixel_values)).clone()  # the next run writes over it

    model.transformer = EngineTransformer(model.transformer, run)


def _int8(model: OptimizedModel, kept: Path) -> None:
    if _home(model).device.type != "cpu":
        raise EngineError("it is for CPUs")
    if reason := native.quantise(model):
        raise EngineError(reason)


def export_any_batch(module: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """Exports a module of one input for every batch size.

    `example` is its input, of a batch of more than one.
    """
    batch = torch.export.Dim("batch", min=1, max=65536)
    with torch.no_grad():
        return torch.export.export(module, (example,), dynamic_shapes=({0: batch},))


def write_onnx(
    module: nn.Module, example: Tensor, outputs: Sequence[str], path: Path, *, one_file: bool
) -> None:
    """Writes a module of one input as ONNX, for every batch size.

    `one_file` for weights within it, below 2 GB.
    """
    program = torch.onnx.export(
        export_any_batch(module, example),
        input_names=["pixel_values"],
        output_names=list(outputs),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.save(path, external_data=not one_file)


def _onnxruntime(model: OptimizedModel, kept: Path) -> None:
    home = _home(model)
    if home.device.type != "cpu" or home.dtype != torch.float32:
        raise EngineError("it is for float32 on CPUs")
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError("it is not installed: pip install 'siglip-port[onnx]'") from error

    def write(path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter, about itself
            write_onnx(model.transformer, pictures(model, 2), ["tokens"], path, one_file=False)

    def load(path: Path) -> Any:  # noqa: ANN401 (untyped)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    session = _kept_file("ONNX Runtime", kept, ["tower.onnx.data", "tower.onnx"], write, load)

    def run(pixel_values: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"pixel_values": pixel_values.numpy()})[0])

    model.transformer = EngineTransformer(model.transformer, run)


def _openvino(model: OptimizedModel, kept: Path) -> None:
    home = _home(model)
    precisions = {torch.float32: "f32", torch.bfloat16: "bf16"}
    if home.device.type != "cpu" or home.dtype not in precisions:
        raise EngineError("it is for float32 and bfloat16 on CPUs")
    try:
        import openvino
    except ImportError as error:
        raise EngineError("it is not installed: pip install 'siglip-port[openvino]'") from error

    def write(path: Path) -> None:
        tower = copy.deepcopy(model.transformer).float()
        exported = export_any_batch(tower, pictures(model, 2).float())
        openvino.save_model(openvino.convert_model(exported), path, compress_to_fp16=False)

    def load(path: Path) -> Any:  # noqa: ANN401 (untyped)
        settings = {
            "INFERENCE_PRECISION_HINT": precisions[home.dtype],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "CACHE_DIR": str(kept),
        }
        return openvino.Core().compile_model(path, "CPU", settings)

    name = f"tower-{precisions[home.dtype]}"
    compiled = _kept_file("OpenVINO", kept, [f"{name}.bin", f"{name}.xml"], write, load)
    one_at_a_time, dtype = threading.Lock(), home.dtype  # OpenVINO refuses a second thread

    def run(pixel_values: Tensor) -> Tensor:
        with one_at_a_time:
            output = compiled(pixel_values.float().numpy(), share_inputs=True)[0].copy()
        return torch.from_numpy(output).to(dtype)

    model.transformer = EngineTransformer(model.transformer, run)


def _kept_file(
    program: str,
    kept: Path,
    names: Sequence[str],
    write: Callable[[Path], None],
    load: Callable[[Path], T],
) -> T:
    """Loads what another program makes of a tower: the last of `names`.

    Written first, with the others, if need be.
    """
    path = kept / names[-1]
    try:
        if not path.exists():
            with atomic.staging_dir(kept) as place:
                write(place / path.name)
                atomic.commit_files([place / name for name in names], kept)
        return load(path)
    except Exception as error:  # of many kinds, none of them documented
        where = f"; if it could before, delete {path}" if path.exists() else ""
        raise EngineError(f"{program} cannot take the tower: {_last_line(error)}{where}") from error


Engine = Callable[[OptimizedModel, Path], None]
ENGINES: dict[str, Engine] = {
    "eager": _eager,
    "packed": _packed,
    "packed-gelu": _packed_fused,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "compiled": _compiled,
    "int8": _int8,
}
"""What can be tried, the simplest first: the tower as it is.

Its Linears packed for oneDNN, without and with GELU in
the same kernel; run by ONNX Runtime, or by OpenVINO; compiled by Inductor into CUDA graphs; and,
for int8, Linears of 8 bits.
"""


def optimize(
    model: SigLipVisionModel,
    *,
    dtype: torch.dtype | None = None,
    engines: Sequence[str] | None = None,
    batch_size: int = 1,
    cache_dir: str | os.PathLike[str] | None = None,
) -> OptimizedModel:
    """Turns a loaded tower into its fastest form for inference on the machine at hand.

    Every engine is built, compared with the tower itself and timed beside it. The fastest that
    stays inside `BOUNDS` is taken; the tower itself, if none is faster. What was found for these
    weights is kept, and what was compiled, so that the next process starts with it.

    Args:
        model: the tower; not changed. Its parameters are shared, so let them be.
        dtype: float32, bfloat16 or float16; None for the model's own. Results change by rounding
            where it is another. int8 for Linears of 8 bits around results of float32: what that
            costs stands in docs/performance.md.
        engines: which of `ENGINES` may be taken, besides the tower itself; None for all of the
            dtype. `[]` for none.
        batch_size: for how many pictures at a time to choose.
        cache_dir: where to keep what was compiled and found; None for `siglip_port` in the user's
            cache folder. What is in there is trusted: let it be a folder that nobody else writes
            to.

    Returns:
        The same model in another form, in `eval()` mode: `print(fast.choice)` says in which, and
        why.

    Raises:
        ValueError: an argument is none that there is, or the model is no longer a tower of its
            configuration.
    """
    names = _checked(model, dtype, engines, batch_size, cache_dir)
    tower = frozen(model, torch.float32 if dtype == torch.int8 else dtype)
    home = _home(tower)
    kept = _folder(tower, cache_dir)
    form = dtype or home.dtype
    conditions = f"{str(form).removeprefix('torch.')}, batch {batch_size}, {_machine(home.device)}"
    found = kept / f"{_hash(conditions, *names)}.json"
    if (choice := _read(found)) is not None:
        try:
            ENGINES[choice.engine](tower, kept)
        except EngineError:
            tower = frozen(tower, None)  # it was there and is not any more: look again
        else:
            tower.choice = choice
            return tower
    tower = _choose(tower, names, batch_size, kept, conditions, BOUNDS[form])
    _write(found, tower.choice)
    return tower


def in_form(
    model: SigLipVisionModel,
    engine: str,
    *,
    dtype: torch.dtype | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> OptimizedModel:
    """The tower in the form of one engine, whether that is fast here or not, and not yet compared with anything.

    Args:
        model: as for `optimize`.
        engine: a name of `ENGINES`.
        dtype: as for `optimize`.
        cache_dir: as for `optimize`.

    Raises:
        ValueError: as for `optimize`.
        EngineError: the engine cannot be used here.
    """
    _checked(model, dtype, [engine], 1, cache_dir)
    tower = frozen(model, torch.float32 if dtype == torch.int8 else dtype)
    ENGINES[engine](tower, _folder(tower, cache_dir))
    return tower


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Runs with another number of threads.

    Small towers are fastest with one, by far where the machine is busy.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _checked(
    model: SigLipVisionModel,
    dtype: torch.dtype | None,
    engines: Sequence[str] | None,
    batch_size: int,
    cache_dir: str | os.PathLike[str] | None,
) -> list[str]:
    if not isinstance(model, SigLipVisionModel):
        raise ValueError(f"model must be a SigLipVisionModel, got a {type(model).__name__}")
    if isinstance(model, OptimizedModel):
        raise ValueError("the model is optimized already; pass the one that it was made of")
    if dtype is not None and dtype not in BOUNDS:
        raise ValueError(f"dtype must be one of {', '.join(map(str, BOUNDS))}, got {dtype!r}")
    if cache_dir is not None and not isinstance(cache_dir, (str, os.PathLike)):
        raise ValueError(f"cache_dir must be a path, got {cache_dir!r}")
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number from 1 on, got {batch_size!r}")
    fitting = [
        name for name in ENGINES if name == "eager" or (name == "int8") == (dtype == torch.int8)
    ]
    if engines is None:
        return fitting
    if not isinstance(engines, (list, tuple)) or not all(name in list(ENGINES) for name in engines):
        raise ValueError(f"engines must be a list of some of {', '.join(ENGINES)}, got {engines!r}")
    if wrong := [name for name in engines if name not in fitting]:
        raise ValueError(
            f"engine {wrong[0]} does not go with dtype {dtype}: int8 goes with torch.int8, and "
            "nothing else"
        )
    return [name for name in fitting if name == "eager" or name in engines]


def frozen(model: SigLipVisionModel, dtype: torch.dtype | None) -> OptimizedModel:
    """A tower of its own around the same parameters, or around parameters of another dtype."""
    fast, _ = build_on_meta(model.config, "the configuration", OptimizedModel)
    state = {
        name: tensor.detach().to(dtype or tensor.dtype)
        for name, tensor in model.state_dict().items()
    }
    try:
        fast.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(
            "the parameters are not those of a SigLIP tower (it was wrapped, quantised, or given "
            "adapters); merge or "
            "remove what was added first"
        ) from error
    if len(dtypes := {parameter.dtype for parameter in fast.parameters()}) > 1 or not dtypes <= set(
        BOUNDS
    ) - {torch.int8}:
        raise ValueError(
            f"the parameters are of {', '.join(map(str, dtypes))}: name one dtype with dtype="
        )
    fast.provenance, fast.preprocessor_config = model.provenance, model.preprocessor_config
    return fast.requires_grad_(False).eval()


@torch.inference_mode()
def _choose(
    tower: OptimizedModel,
    names: Sequence[str],
    batch_size: int,
    kept: Path,
    conditions: str,
    bound: float,
) -> OptimizedModel:
    """Builds what can be built, compares it with the tower, and times all of it in turns, so that drift cancels."""
    built, left_out, differences = {"eager": tower}, {}, {"eager": 0.0}
    noise = pictures(tower, batch_size)
    truth = Outputs(tower)(noise)
    for name in [name for name in names if name != "eager"]:
        candidate = frozen(tower, None)
        try:
            ENGINES[name](candidate, kept)
            far = difference(Outputs(candidate)(noise), truth)
        except (EngineError, OSError, RuntimeError) as error:
            left_out[name] = _last_line(error)
            continue
        if not far <= bound:
            left_out[name] = (
                f"its results differ from the tower's own by {far:.1e}, bound {bound:.0e}"
            )
            continue
        built[name], differences[name] = candidate, far
    times: dict[str, list[float]] = {name: [] for name in built}
    for _ in range(ROUNDS if len(built) > 1 else 0):
        for name, candidate in built.items():
            times[name].append(_seconds(candidate, noise))
    middle = {name: statistics.median(seconds) for name, seconds in times.items() if seconds}
    best = min(middle, key=lambda name: middle[name], default="eager")
    if best != "eager" and middle[best] > WORTH * middle["eager"]:
        best = "eager"
    fast = built[best]
    fast.choice = Choice(
        engine=best,
        conditions=conditions,
        milliseconds={name: 1000 * seconds / batch_size for name, seconds in middle.items()},
        difference=differences[best],
        bound=bound,
        left_out=left_out,
    )
    return fast


def pictures(model: SigLipVisionModel, batch_size: int) -> Tensor:
    """Noise, always the same: [B, C, S, S] in [-1, 1]."""
    shape, home = (
        (batch_size, model.config.num_channels, *2 * [model.config.image_size]),
        _home(model),
    )
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return noise.to(home.device, home.dtype)


class Outputs(nn.Module):
    """A model as one function.

    [B, C, S, S] -> tokens [B, N, D] and, if it has one vector a picture, pooled [B, D].
    """

    def __init__(self, model: SigLipVisionModel) -> None:
        super().__init__()
        self.model = model
        self.names = (
            ["tokens", "pooled"]
            if model.pooling_head is not None or model.config.mean_pooling
            else ["tokens"]
        )

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Runs `forward` and `pool`."""
        tokens = self.model(pixel_values)
        return (tokens, self.model.pool(tokens)) if len(self.names) > 1 else (tokens,)


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest difference over the largest number.

    What is not a number is infinitely far away.
    """
    far = [
        ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()
        for a, b in zip(ours, theirs, strict=True)
    ]
    return max(d if d == d else float("inf") for d in far)


def _seconds(model: SigLipVisionModel, pixel_values: Tensor) -> float:
    started = time.perf_counter()
    Outputs(model)(pixel_values)
    if pixel_values.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _home(model: SigLipVisionModel) -> Tensor:
    """A parameter: where the model is, and in which dtype."""
    return model.transformer.post_layernorm.weight


def _last_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def _folder(model: SigLipVisionModel, cache_dir: str | os.PathLike[str] | None) -> Path:
    """Where to keep what belongs to a model."""
    if cache_dir is None:
        cache_dir = (
            Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            / "siglip_port"
            / "engines"
        )
    return Path(cache_dir) / _fingerprint(model)


def _machine(device: torch.device) -> str:
    """What the times depend on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return (
        f"{torch.get_num_threads()} threads, {_processor().get('model name', platform.machine())}"
    )


def _processor() -> dict[str, str]:
    """What Linux says of the first processor; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _versions() -> list[str]:
    """What makes compiled code useless when it changes.

    Torch, the engines, and what the processor can do.
    """
    flags = _processor().get("flags", platform.processor())
    return [torch.__version__, *map(_installed, ("onnxruntime", "openvino", "siglip-port")), flags]


def _installed(package: str) -> str:
    """Its version; empty where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _fingerprint(model: SigLipVisionModel) -> str:
    """Names the folder of what holds for these very weights, on this processor, with these versions."""
    return _hash(repr(model.config), *_versions(), weights_hash(model))


def weights_hash(model: SigLipVisionModel) -> str:
    """A hash of every bit of every parameter, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _read(path: Path) -> Choice | None:
    """What was found earlier; None where nothing was, or nothing that can be read."""
    try:
        choice = Choice(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return choice if choice.engine in ENGINES else None


def _write(path: Path, choice: Choice) -> None:
    """Keeps what was found. Where it cannot be kept, the next process looks again."""
    try:
        with atomic.staging_dir(path.parent) as place:
            file = place / path.name
            file.write_text(json.dumps(asdict(choice), indent=1), encoding="utf-8")
            atomic.commit_files([file], path.parent)
    except OSError as error:
        log.warning("what was found is not kept: %s", error)
