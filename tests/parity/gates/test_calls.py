"""Every bug that the gate `calls` must detect, in a toy model, and right models that must pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from siglip_port.parity import calls as parity_calls
from siglip_port.parity.calls import ReferenceCalls, run_calls
from siglip_port.parity.gates import check_calls
from siglip_port.parity.results import Finding, GateResult
from siglip_port.parity.sides import Side
from siglip_port.parity.taps import Tap
from tests.parity.toy_models import ToyEncoder, toy_images

TAPS = [Tap("conv", "conv"), Tap("norm", "norm")]
Forward = Callable[[ToyEncoder, Tensor], Tensor]


@pytest.fixture(scope="module")
def calls() -> ReferenceCalls:
    return run_calls(Side(ToyEncoder()), toy_images(), torch.float32)


def check(calls: ReferenceCalls, model: nn.Module) -> GateResult:
    return check_calls(Side(model), calls, TAPS)


def findings_of(calls: ReferenceCalls, forward: Forward) -> tuple[Finding, ...]:
    """Findings for a toy model with another forward pass."""

    class Broken(ToyEncoder):
        def forward(self, x: Tensor) -> Tensor:
            return forward(self, x)

    model = Broken()
    state = copy.deepcopy(model.state_dict())
    threads = torch.get_num_threads()
    findings = check(calls, model).findings
    assert torch.get_num_threads() == threads
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    return findings


def run(model: ToyEncoder, x: Tensor) -> Tensor:
    return ToyEncoder.forward(model, x)


# --- right models ---------------------------------------------------------------------------------


def in_parts(model: ToyEncoder, x: Tensor) -> Tensor:
    return torch.cat([run(model, image) for image in x.split(1)])


def in_place_on_copy(model: ToyEncoder, x: Tensor) -> Tensor:
    x = x.clone()
    x.mul_(1)
    return run(model, x)


def without_gradients(model: ToyEncoder, x: Tensor) -> Tensor:
    with torch.no_grad():
        return run(model, x)


def in_float32(model: ToyEncoder, x: Tensor) -> Tensor:
    assert model.conv.bias is not None
    weight, bias = model.conv.weight.float(), model.conv.bias.float()
    conv = nn.functional.conv2d(x.float(), weight, bias, stride=2)
    tokens: Tensor = model.norm(conv.flatten(2).transpose(1, 2).to(x.dtype))
    return tokens


def cached_by_weights(model: ToyEncoder, x: Tensor) -> Tensor:
    """A cache that is right: it is only used for the same weights."""
    key = model.norm.weight.detach().clone()
    cache = model.__dict__.setdefault("cache", [])
    if not (cache and torch.equal(cache[0], key) and cache[0].dtype == key.dtype):
        cache[:] = [key]
    return run(model, x)


@pytest.mark.parametrize(
    "forward", [run, in_parts, in_place_on_copy, without_gradients, in_float32, cached_by_weights]
)
def test_right_models_pass(calls: ReferenceCalls, forward: Forward) -> None:
    assert findings_of(calls, forward) == ()


def test_number_of_checks(calls: ReferenceCalls) -> None:
    assert check(calls, ToyEncoder()).checked > 400


def test_output_that_is_not_contiguous_is_noted(calls: ReferenceCalls) -> None:
    model = ToyEncoder()
    model.register_forward_hook(lambda _, args, y: y.transpose(1, 2).contiguous().transpose(1, 2))
    gate = check(calls, model)
    assert gate.passed
    assert gate.notes == ("not contiguous, unlike the reference's: output",)


# --- batches and memory formats -------------------------------------------------------------------


def wrong_from_three(model: ToyEncoder, x: Tensor) -> Tensor:
    return run(model, x) + 1e-3 * (len(x) > 2)


def wrong_in_nine(model: ToyEncoder, x: Tensor) -> Tensor:
    return torch.cat([run(model, x[:8]), run(model, x[:1])]) if len(x) == 9 else run(model, x)


def wrong_alone(model: ToyEncoder, x: Tensor) -> Tensor:
    return run(model, x) * (1 + 1e-3 * (len(x) == 1))


def wrong_in_float32(model: ToyEncoder, x: Tensor) -> Tensor:
    return run(model, x) * (1 + 1e-3 * (len(x) == 5 and x.dtype == torch.float32))


def reads_memory(model: ToyEncoder, x: Tensor) -> Tensor:
    return run(model, x if x.is_contiguous() else x.flip(2))


def ignores_offset(model: ToyEncoder, x: Tensor) -> Tensor:
    if x.storage_offset():
        x = x.as_strided(x.shape, x.stride(), x.storage_offset() - 1)
    return run(model, x)


def ignores_stride_zero(model: ToyEncoder, x: Tensor) -> Tensor:
    return run(model, x) * (1 if x.stride(0) else 1.01)


def wrong_for_leaf(model: ToyEncoder, x: Tensor) -> Tensor:
    return run(model, x) * (1.01 if x.requires_grad and not torch.is_grad_enabled() else 1)


def wrong_under_no_grad(model: ToyEncoder, x: Tensor) -> Tensor:
    is_plain = not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    return run(model, x) * (1.01 if is_plain else 1)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (wrong_from_three, "differs from the reference in a batch of 3, also in a batch of 5"),
        (wrong_in_nine, "differs from the reference in a batch of 9"),
        (wrong_alone, "differs from the reference in a batch of 1"),
        (wrong_in_float32, "differs from the reference in a batch of 5 in float32"),
        (reads_memory, "differs from the reference for inputs transposed in memory, also for chan"),
        (ignores_offset, "differs from the reference for inputs sliced from a larger tensor"),
        (ignores_stride_zero, "differs from the reference for expanded inputs (stride 0)"),
        (wrong_for_leaf, "differs from the reference under no_grad for inputs that require grad"),
        (wrong_under_no_grad, "differs from the reference under no_grad"),
    ],
)
def test_situations(calls: ReferenceCalls, forward: Forward, message: str) -> None:
    finding = findings_of(calls, forward)[0]
    assert finding.message.startswith(message)
    assert finding.reference in ("output", "conv")


def test_place_is_first_tap_that_differs(calls: ReferenceCalls) -> None:
    model = ToyEncoder()
    model.conv.register_forward_hook(lambda _, args, y: y + 0.1 * y.square() * (len(y) > 2))
    (finding,) = check(calls, model).findings
    assert finding.reference == "conv"


# --- dtypes and other traits ----------------------------------------------------------------------


def always_float32(model: ToyEncoder, x: Tensor) -> Tensor:
    return run(model, x).float()


def as_parameter(model: ToyEncoder, x: Tensor) -> Tensor:
    return nn.Parameter(run(model, x), requires_grad=torch.is_grad_enabled())


def with_own_gradients(model: ToyEncoder, x: Tensor) -> Tensor:
    if torch.is_inference_mode_enabled():
        return run(model, x)
    with torch.enable_grad():
        return run(model, x)


def raises_in_bfloat16(model: ToyEncoder, x: Tensor) -> Tensor:
    if x.dtype == torch.bfloat16:
        raise TypeError("no bfloat16")
    return run(model, x)


def raises_for_view(model: ToyEncoder, x: Tensor) -> Tensor:
    return run(model, x.view(len(x), -1).view(x.shape))


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (always_float32, "has dtype float32; expected float64 as the reference's"),
        (as_parameter, "is a Parameter; expected a Tensor"),
        (with_own_gradients, "requires gradients under no_grad, also"),
        (raises_in_bfloat16, "raises an error in bfloat16; TypeError: no bfloat16"),
        (raises_for_view, "raises an error for inputs transposed in memory, also"),
    ],
)
def test_traits(calls: ReferenceCalls, forward: Forward, message: str) -> None:
    assert findings_of(calls, forward)[0].message.startswith(message)


class Casting(ToyEncoder):
    """Accepts inputs of another dtype than its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return run(self, x.to(self.conv.weight.dtype))


def test_inputs_of_another_dtype() -> None:
    calls = run_calls(Side(Casting()), toy_images(), torch.float32)
    assert check(calls, ToyEncoder()).passed  # refuses other dtypes, which is not checked here
    calls = run_calls(Side(Casting()), toy_images(), torch.float32, mixed_dtypes=True)
    assert check(calls, Casting()).passed
    (finding,) = check(calls, ToyEncoder()).findings
    assert finding.message.startswith(
        "raises an error for bfloat16 inputs of a float32 model, also for float16 inputs"
    )
    assert finding.port == "conv"  # the innermost module


def test_function_passes(calls: ReferenceCalls) -> None:
    weights = ToyEncoder()

    def function(x: Tensor) -> Tensor:
        tokens: Tensor = weights(x.float())
        return tokens.to(x.dtype)

    gate = check_calls(Side(function), calls, [])
    assert gate.passed, gate.findings


def test_model_without_parameters_has_its_own_dtype(calls: ReferenceCalls) -> None:
    weights = ToyEncoder()

    class Engine(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            tokens: Tensor = weights(x.float())
            return tokens

    gate = check_calls(Side(Engine()), calls, [])
    assert gate.passed, gate.findings


# --- writes and settings --------------------------------------------------------------------------


def writes_to_input(model: ToyEncoder, x: Tensor) -> Tensor:
    if not x.is_inference() and x.stride(0) and not (x.requires_grad and x.is_leaf):
        x.mul_(1)
    return run(model, x)


def writes_through_data(model: ToyEncoder, x: Tensor) -> Tensor:
    y = run(model, x)
    if x.stride(0):
        x.data.mul_(2)
    return y


def writes_to_weight(model: ToyEncoder, x: Tensor) -> Tensor:
    with torch.no_grad():
        model.norm.weight.mul_(1)
    return run(model, x)


@pytest.mark.parametrize("forward", [writes_to_input, writes_through_data])
def test_writes_to_inputs(calls: ReferenceCalls, forward: Forward) -> None:
    messages = {finding.message: finding.reference for finding in findings_of(calls, forward)}
    message = "a call writes to input 0; copy it before the first operation in place"
    assert messages[message] == "inputs"


def test_writes_to_weights(calls: ReferenceCalls) -> None:
    finding = findings_of(calls, writes_to_weight)[0]
    assert (finding.port, finding.message) == ("norm.weight", "a call writes to it")


def test_changed_buffer(calls: ReferenceCalls) -> None:
    model = ToyEncoder()
    model.register_buffer("count", torch.zeros(()))
    model.register_forward_pre_hook(lambda module, args: module.count.add_(1) and None)
    (finding,) = check(calls, model).findings
    assert (finding.port, finding.message) == ("count", "is changed by calls of the port")


def draws(model: ToyEncoder, x: Tensor) -> Tensor:
    torch.rand(1)
    return run(model, x)


def sets_seed(model: ToyEncoder, x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return run(model, x)


def enables_gradients(model: ToyEncoder, x: Tensor) -> Tensor:
    torch.set_grad_enabled(not torch.is_grad_enabled())
    return run(model, x)


def sets_threads(model: ToyEncoder, x: Tensor) -> Tensor:
    torch.set_num_threads(torch.get_num_threads() + 1)
    return run(model, x)


def sets_default_dtype(model: ToyEncoder, x: Tensor) -> Tensor:
    torch.set_default_dtype(torch.float64)
    return run(model, x)


@pytest.mark.parametrize(
    ("forward", "setting"),
    [
        (sets_seed, "the random number generator"),
        (enables_gradients, "the gradient mode"),
        (sets_threads, "the number of threads"),
        (sets_default_dtype, "the default dtype"),
    ],
)
def test_settings(calls: ReferenceCalls, forward: Forward, setting: str) -> None:
    messages = [finding.message for finding in findings_of(calls, forward)]
    assert f"a call changes {setting} of torch; restore it before the call returns" in messages
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()


def test_random_numbers_may_be_drawn(calls: ReferenceCalls) -> None:
    """As by sums in a random order."""
    assert not findings_of(calls, draws)


# --- training mode --------------------------------------------------------------------------------


class Dropout(ToyEncoder):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(run(self, x), 0.2, self.training)


def scaled_in_training(model: ToyEncoder, x: Tensor) -> Tensor:
    return run(model, x) * (1.01 if model.training else 1)


def test_training_mode(calls: ReferenceCalls) -> None:
    (finding,) = findings_of(calls, scaled_in_training)
    assert finding.message.startswith("differs from the reference in training mode; bound")
    (finding,) = check(calls, Dropout()).findings
    assert finding.message.startswith("differs between two calls in training mode; the reference's")


def test_dropout_of_the_reference() -> None:
    calls = run_calls(Side(Dropout()), toy_images(), torch.float32)
    text = "training mode not judged: the reference has dropout"
    gate = check(calls, Dropout())
    assert (gate.passed, gate.notes) == (True, (text,))
    gate = check(calls, ToyEncoder())
    assert (gate.passed, gate.notes) == (True, (f"{text}, the port has none",))


class WithBatchNorm(ToyEncoder):
    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm2d(3).eval()

    def forward(self, x: Tensor) -> Tensor:
        return run(self, self.batch_norm(x))


def test_statistics_of_batches_are_restored() -> None:
    model = WithBatchNorm()
    calls = run_calls(Side(model), toy_images(), torch.float32)
    assert check(calls, WithBatchNorm()).passed
    assert not model.training
    state = model.batch_norm.state_dict()
    assert state["num_batches_tracked"] == 0
    assert torch.equal(state["running_mean"], torch.zeros(3))


# --- earlier calls --------------------------------------------------------------------------------


class Cached(ToyEncoder):
    """Returns the result of an earlier call with the same key."""

    def __init__(self, key: Callable[[Cached, Tensor], Any], limit: int = 1000) -> None:
        super().__init__()
        self.key = key
        self.limit = limit
        self.results: dict[Any, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        key = (self.key(self, x), x.dtype, self.conv.weight.dtype, torch.is_grad_enabled())
        if key not in self.results:
            self.results[key] = run(self, x).detach()
        return self.results[key].clone()


def weights_version(model: Cached) -> tuple[int, ...]:
    return tuple(parameter._version for parameter in model.parameters())


def by_shape(model: Cached, x: Tensor) -> object:
    return x.shape


def by_identity(model: Cached, x: Tensor) -> object:
    model.__dict__.setdefault("seen", []).append(x)  # keeps the identity unique
    return id(x)


def by_address(model: Cached, x: Tensor) -> object:
    model.__dict__.setdefault("seen", []).append(x)
    return x.data_ptr()


def by_version(model: Cached, x: Tensor) -> object:
    model.__dict__.setdefault("seen", []).append(x)
    return id(x), 0 if x.is_inference() else x._version


def by_contents(model: Cached, x: Tensor) -> object:
    return tuple(x.flatten().tolist())


def by_contents_and_writes(model: Cached, x: Tensor) -> object:
    return by_contents(model, x), weights_version(model)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (by_identity, "differs from a first call after the tensor of the inputs was modified in"),
        (by_address, "differs from a first call after the tensor of the inputs was modified in"),
        (by_version, "differs from a first call after the tensor of the inputs was modified thr"),
        (by_contents, "differs from the reference with other weights"),
        (by_contents_and_writes, "differs from the reference with other weights"),
    ],
)
def test_stale_results(
    calls: ReferenceCalls, key: Callable[[Cached, Tensor], object], message: str
) -> None:
    messages = [finding.message for finding in check(calls, Cached(key)).findings]
    assert any(text.startswith(message) for text in messages), messages


def test_results_by_shape(calls: ReferenceCalls) -> None:
    assert not check(calls, Cached(by_shape)).passed


class CachedWeight(ToyEncoder):
    """Keeps a copy of a weight, as of the first call or after each `to()`."""

    def __init__(self, key: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.key = key
        self.copies: dict[object, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        bias = self.norm.bias
        copied = self.copies.setdefault((self.key(bias), bias.dtype), bias.detach().clone())
        tokens = self.conv(x).flatten(2).transpose(1, 2)
        return nn.functional.layer_norm(tokens, (8,), self.norm.weight, copied)


@pytest.mark.parametrize("key", [id, Tensor.data_ptr, lambda bias: None])
def test_stale_weights(calls: ReferenceCalls, key: Callable[[Tensor], object]) -> None:
    findings = check(calls, CachedWeight(key)).findings
    assert findings
    assert any("weights" in finding.message for finding in findings), findings


def test_folded_weights_pass(calls: ReferenceCalls) -> None:
    """Folded weights do not change as the reference's do; the results still follow them."""

    class Folded(ToyEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.norm.bias.data += 2

        def forward(self, x: Tensor) -> Tensor:
            return run(self, x) - 2

    assert check(calls, Folded()).passed


def test_stale_folded_weights(calls: ReferenceCalls) -> None:
    class Folded(ToyEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.original = copy.deepcopy(ToyEncoder())
            self.norm.bias.data += 2

        def forward(self, x: Tensor) -> Tensor:
            copies = self.__dict__.setdefault("copies", {})
            if x.dtype not in copies:
                copies[x.dtype] = copy.deepcopy(self.original)
            tokens: Tensor = copies[x.dtype](x)
            return tokens

    messages = [finding.message for finding in check(calls, Folded()).findings]
    assert "is the same as before with other weights; a cache is stale" in messages


class StaticOutput(ToyEncoder):
    """Returns the same memory in every call."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = run(self, x)
        if torch.is_grad_enabled():
            return tokens
        key = (tokens.shape, tokens.dtype)
        outputs = self.__dict__.setdefault("outputs", {})
        with torch.inference_mode():
            output: Tensor = outputs.setdefault(key, torch.empty_like(tokens))
            return output.copy_(tokens)


def test_outputs_of_two_calls_share_memory(calls: ReferenceCalls) -> None:
    findings = check(calls, StaticOutput()).findings
    assert findings[0].message.startswith("two calls return the same memory, so the second")


class KeptOutput(ToyEncoder):
    """Computes the next result from the output that it returned before."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = run(self, x)
        if torch.is_grad_enabled():
            return tokens
        outputs: dict[object, Tensor] = self.__dict__.setdefault("outputs", {})
        key = (tokens.shape, tokens.dtype)
        tokens = tokens + 1e-3 * (outputs.get(key, tokens) == 0).to(tokens)
        outputs[key] = tokens
        return tokens


def test_overwritten_output(calls: ReferenceCalls) -> None:
    messages = [finding.message for finding in check(calls, KeptOutput()).findings]
    message = "differs from a first call after the outputs of an earlier call were overwritten"
    assert any(text.startswith(message) for text in messages), messages


def adds_input(model: ToyEncoder, x: Tensor) -> Tensor:
    return x.flatten()[: len(x) * 32].view(len(x), 4, 8) if x.is_contiguous() else x


def test_output_shares_memory_with_input(calls: ReferenceCalls) -> None:
    messages = [finding.message for finding in findings_of(calls, adds_input)]
    assert "shares memory with an input; return a copy" in messages


class Counting(ToyEncoder):
    """Wrong from a number of calls on."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return run(self, x) * (1.01 if self.count > self.limit else 1)


def test_long_run(calls: ReferenceCalls) -> None:
    model = Counting(10**9)
    assert check(calls, model).passed
    findings = check(calls, Counting(model.count - 20)).findings
    assert findings[0].message.startswith("differs from a first call in call ")


class AfterTraining(ToyEncoder):
    """Wrong after a call in training mode."""

    has_trained = False

    def forward(self, x: Tensor) -> Tensor:
        self.has_trained = self.has_trained or self.training
        return run(self, x) * (1.01 if self.has_trained and not self.training else 1)


def test_training_and_back(calls: ReferenceCalls) -> None:
    (finding,) = check(calls, AfterTraining()).findings
    assert finding.message.startswith("differs from a first call after calls with other inputs")


# --- consequences ---------------------------------------------------------------------------------


def test_model_that_is_wrong_everywhere_is_left_to_numerics(calls: ReferenceCalls) -> None:
    model = ToyEncoder()
    model.norm.eps = 1e-2
    assert check(calls, model).findings == ()


def test_references_errors_are_not_expected_of_the_port() -> None:
    class Strict(ToyEncoder):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 3:
                raise ValueError("at most 3")
            return run(self, x)

    calls = run_calls(Side(Strict()), toy_images(), torch.float32)
    assert check(calls, ToyEncoder()).passed
    assert check(calls, Strict()).passed


def test_situations_are_named_once() -> None:
    situations = parity_calls.list_situations(toy_images(), torch.bfloat16)
    names = [situation.name for situation in situations]
    assert len(set(names)) == len(names)
    assert replace(situations[0]) == situations[0]
