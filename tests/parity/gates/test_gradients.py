"""Every bug that the gate `gradients` must detect, in a toy model, and right models that pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (the name the field uses)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from siglip_port.parity import randomize
from siglip_port.parity.gates import check_gradients
from siglip_port.parity.gradients import ReferenceGradients, run_gradients
from siglip_port.parity.results import GateResult
from siglip_port.parity.sides import Side
from siglip_port.parity.taps import Tap
from tests.parity.toy_models import double_noise


class Block(nn.Module):
    """Residual MLP: [B, N, 6] -> [B, N, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.fc1 = nn.Linear(6, 10)
        self.fc2 = nn.Linear(10, 6)

    def branch(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.activation(self.fc1(self.norm(x))))
        return y

    def activation(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Model(nn.Module):
    """Two blocks, positions and a mean: [B, 4, 6] -> tokens [B, 4, 6] and pooled [B, 6]."""

    block = Block

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(4, 6))
        self.blocks = nn.ModuleList([self.block(), self.block()])
        self.head = nn.Linear(6, 6)
        randomize(self)
        self.eval()

    def encode(self, x: Tensor) -> Tensor:
        x = x + self.positions
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        tokens = self.encode(x)
        return {"tokens": tokens, "pooled": self.head(tokens.mean(1))}


POINTS = [
    "blocks.0.norm",
    "blocks.0.fc1",
    "blocks.0.fc2:input",
    "blocks.0.fc2",
    "blocks.0",
    "blocks.1.norm",
    "blocks.1.fc1",
    "blocks.1.fc2:input",
    "blocks.1.fc2",
    "blocks.1",
    "head",
]
TAPS = [Tap(point, point) for point in POINTS]


def inputs() -> Tensor:
    return double_noise(2, 4, 6)


@pytest.fixture(scope="module")
def gradients() -> ReferenceGradients:
    return run_gradients(Side(Model()), inputs(), POINTS, torch.float32)


def check(gradients: ReferenceGradients, model: nn.Module, taps: list[Tap] = TAPS) -> GateResult:
    return check_gradients(Side(model), gradients, taps)


def model_with(**methods: Callable[..., object]) -> Model:
    """Return a model whose blocks have other methods."""
    block = type("OtherBlock", (Block,), methods)
    model: Model = type("OtherModel", (Model,), {"block": block})()
    return model


def places(gate: GateResult) -> list[str]:
    return [finding.reference for finding in gate.findings]


# --- right models ---------------------------------------------------------------------------------


def in_parts(block: Block, x: Tensor) -> Tensor:
    return torch.cat([x_part + block.branch(x_part) for x_part in x.split(1)])


def in_place(block: Block, x: Tensor) -> Tensor:
    y = block.branch(x)
    y += x
    return y


def recomputed(block: Block, x: Tensor) -> Tensor:
    y: Tensor = checkpoint(block.branch, x, use_reentrant=False)
    return x + y


def with_float32_step(block: Block, x: Tensor) -> Tensor:
    hidden = F.layer_norm(
        x.float(), (6,), block.norm.weight.float(), block.norm.bias.float(), block.norm.eps
    )
    y: Tensor = block.fc2(block.activation(block.fc1(hidden.to(x.dtype))))
    return x + y


@pytest.mark.parametrize("forward", [Block.forward, in_parts, in_place, with_float32_step])
@pytest.mark.parametrize("taps", [TAPS, []], ids=["taps", "no taps"])
def test_right_models_pass(
    gradients: ReferenceGradients, forward: Callable[..., object], taps: list[Tap]
) -> None:
    gate = check(gradients, model_with(forward=forward), taps)
    assert gate.findings == ()
    assert gate.notes == ()
    assert gate.checked > 30


def test_checkpointing_passes(gradients: ReferenceGradients) -> None:
    assert check(gradients, model_with(forward=recomputed), []).passed


def test_nothing_is_left_behind(gradients: ReferenceGradients) -> None:
    model = Model()
    model.head.weight.grad = torch.ones(6, 6)
    model.head.bias.requires_grad_(False)
    check(gradients, model)
    assert torch.equal(model.head.weight.grad, torch.ones(6, 6))
    assert model.positions.grad is None
    assert not model.head.bias.requires_grad
    assert model.head.weight.dtype == torch.float32
    assert not model.training
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


# --- wrong steps ----------------------------------------------------------------------------------


class DoubledGradient(torch.autograd.Function):
    """Identity with a doubled gradient."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        return 2 * gradients[0]


class GeluWithOtherGradient(torch.autograd.Function):
    """Tanh GELU with the gradient of exact GELU."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.gelu(x, approximate="tanh")

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            gradient: Tensor = torch.autograd.grad(F.gelu(leaf), leaf, gradients[0])[0]
        return gradient


def detached_branch(block: Block, x: Tensor) -> Tensor:
    return x + block.branch(x).detach()


def detached_norm(block: Block, x: Tensor) -> Tensor:
    y: Tensor = block.fc2(block.activation(block.fc1(block.norm(x).detach())))
    return y


def branch_under_no_grad(block: Block, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = block.branch(x)
    return x + y


def doubled_branch(block: Block, x: Tensor) -> Tensor:
    y: Tensor = DoubledGradient.apply(block.branch(x))
    return x + y


def doubled_in_branch(block: Block, x: Tensor) -> Tensor:
    y: Tensor = block.fc2(block.activation(DoubledGradient.apply(block.fc1(block.norm(x)))))
    return y


def halved_fc2(block: Block, x: Tensor) -> Tensor:
    y = Block.branch(block, x)
    return 0.5 * y + 0.5 * y.detach()


def reversed_places(name: str) -> list[str]:
    return [f"blocks.1{name}", f"blocks.0{name}"]


@pytest.mark.parametrize(
    ("method", "function", "expected", "hint"),
    [
        ("forward", detached_branch, reversed_places(".fc2"), "detach(), no_grad() or .data"),
        ("forward", branch_under_no_grad, reversed_places(".fc2"), "detach(), no_grad() or .data"),
        ("branch", detached_norm, reversed_places(".norm"), "detach(), no_grad() or .data"),
        ("forward", doubled_branch, reversed_places(""), "2x the reference's gradient"),
        ("branch", doubled_in_branch, reversed_places(".fc2:input"), "2x the reference's gradient"),
        ("branch", halved_fc2, reversed_places(""), "0.5x the reference's gradient"),
        (
            "activation",
            lambda block, x: GeluWithOtherGradient.apply(x),
            reversed_places(".fc2:input"),
            "",
        ),
    ],
)
def test_wrong_step(
    gradients: ReferenceGradients,
    method: str,
    function: Callable[..., object],
    expected: list[str],
    hint: str,
) -> None:
    gate = check(gradients, model_with(**{method: function}))
    assert places(gate) == expected
    assert gate.findings[0].hint.startswith(hint)
    assert bool(hint) == bool(gate.findings[0].hint)


@pytest.mark.parametrize("function", [detached_branch, doubled_branch, branch_under_no_grad])
def test_wrong_step_without_taps(
    gradients: ReferenceGradients, function: Callable[..., object]
) -> None:
    (finding,) = check(gradients, model_with(forward=function), []).findings
    assert finding.reference == "blocks.1.fc2.bias"
    assert "and so do those of" in finding.message


def test_positions_without_gradient(gradients: ReferenceGradients) -> None:
    class Other(Model):
        def encode(self, x: Tensor) -> Tensor:
            x = x + self.positions.detach()
            for block in self.blocks:
                x = block(x)
            return x

    gate = check(gradients, Other())
    assert places(gate) == ["positions"]
    assert gate.findings[0].message == "has no gradient, expected one as in the reference"


def test_wrong_gradient_of_inputs(gradients: ReferenceGradients) -> None:
    class Other(Model):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return super().forward(DoubledGradient.apply(x))

    (finding,) = check(gradients, Other()).findings
    assert finding.reference == "inputs"
    assert finding.message == "the gradient of the inputs differs"


def test_missing_gradient_of_inputs(gradients: ReferenceGradients) -> None:
    class Other(Model):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return super().forward(x.detach())

    assert places(check(gradients, Other())) == ["inputs"]


# --- frozen parameters, matching ------------------------------------------------------------------


def test_untrained_parameter(gradients: ReferenceGradients) -> None:
    model = Model()
    model.positions.requires_grad_(False)
    (finding,) = check(gradients, model).findings
    assert finding.reference == "positions"
    assert finding.message == "requires_grad is False, expected True as in the reference"


def test_model_without_trainable_parameters_passes(gradients: ReferenceGradients) -> None:
    assert check(gradients, Model().requires_grad_(False)).passed


def test_untrained_parameter_of_the_reference() -> None:
    model = Model()
    model.positions.requires_grad_(False)
    gradients = run_gradients(Side(model), inputs(), POINTS, torch.float32)
    assert check(gradients, model).passed


class Fused(Model):
    """Both weights of the first block in one parameter, stored transposed."""

    def __init__(self) -> None:
        super().__init__()
        first = self.blocks[0]
        assert isinstance(first, Block)
        self.fused = nn.Parameter(torch.cat([first.fc1.weight.T, first.fc2.weight], 1).clone())
        del first.fc1.weight
        del first.fc2.weight
        self.factor = 1.0

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first = self.blocks[0]
        assert isinstance(first, Block)
        fc1, fc2 = self.fused.split(10, 1)
        if self.factor != 1:
            fc2 = self.factor * fc2 + (1 - self.factor) * fc2.detach()
        first.fc1.weight = fc1.T
        first.fc2.weight = fc2
        outputs = super().forward(x)
        del first.fc1.weight, first.fc2.weight
        return outputs


def fused_weights(port: nn.Module) -> Mapping[str, Tensor]:
    state = port.state_dict(keep_vars=True)
    fc1, fc2 = state.pop("fused").split(10, 1)
    return {**state, "blocks.0.fc1.weight": fc1.T, "blocks.0.fc2.weight": fc2}


def test_fused_parameter_has_joined_gradient(gradients: ReferenceGradients) -> None:
    gate = check_gradients(Side(Fused()), gradients, TAPS, fused_weights)
    assert gate.passed, gate.findings
    model = Fused()
    model.factor = 0.5
    gate = check_gradients(Side(model), gradients, TAPS, fused_weights)
    (finding,) = gate.findings
    assert finding.port == "fused"
    assert finding.reference in ("blocks.0.fc1.weight", "blocks.0.fc2.weight")


def test_detached_weights_are_matched_by_memory(gradients: ReferenceGradients) -> None:
    model = Model()
    model.positions.requires_grad_(False)
    gate = check_gradients(Side(model), gradients, TAPS, lambda port: port.state_dict())
    assert places(gate) == ["positions"]


# --- modes ----------------------------------------------------------------------------------------


def gelu_by_mode(block: Block, x: Tensor) -> Tensor:
    return F.gelu(x, approximate="none" if torch.is_grad_enabled() else "tanh")


def test_outputs_differ_with_gradients_enabled(gradients: ReferenceGradients) -> None:
    (finding,) = check(gradients, model_with(activation=gelu_by_mode)).findings
    assert finding.reference == "blocks.0.fc2:input"
    assert finding.message == "differs with gradients enabled only; bound 1e-10"
    (finding,) = check(gradients, model_with(activation=gelu_by_mode), []).findings
    assert finding.reference == "tokens"


def halved_in_training(block: Block, x: Tensor) -> Tensor:
    return halved_fc2(block, x) if block.training else Block.branch(block, x)


def test_training_mode(gradients: ReferenceGradients) -> None:
    gate = check(gradients, model_with(branch=halved_in_training))
    assert places(gate) == reversed_places("")
    assert gate.findings[0].message == "in training mode: its gradient differs in float64"


class Checkpointed(Model):
    """Recomputes blocks in the backward pass, if enabled; wrongly, if `detaches`."""

    is_gradient_checkpointing = False
    detaches = False

    def gradient_checkpointing_enable(self) -> None:
        self.is_gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        self.is_gradient_checkpointing = False

    def encode(self, x: Tensor) -> Tensor:
        x = x + self.positions
        for block in self.blocks:
            if self.is_gradient_checkpointing and self.training:
                x = checkpoint(block, x.detach() if self.detaches else x, use_reentrant=False)
            else:
                x = block(x)
        return x


def test_gradient_checkpointing(gradients: ReferenceGradients) -> None:
    model = Checkpointed()
    gate = check(gradients, model)
    assert gate.passed, gate.findings
    assert gate.checked > check(gradients, Model()).checked
    model.detaches = True
    (finding,) = check(gradients, model).findings
    assert finding.message.startswith("with gradient checkpointing: has no gradient")
    assert not model.is_gradient_checkpointing


# --- no gradients ---------------------------------------------------------------------------------


def test_port_without_gradients_is_noted(gradients: ReferenceGradients) -> None:
    class Other(Model):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            with torch.no_grad():
                return super().forward(x)

    gate = check(gradients, Other())
    assert gate.passed
    message = "gradients not judged: the port returns all outputs without gradients"
    assert gate.notes == (message,)


@pytest.mark.parametrize("detached", ["tokens", "pooled"])
def test_output_without_gradients_beside_others(
    detached: str, gradients: ReferenceGradients
) -> None:
    """The first output is computed without gradients, or the second one loses them."""

    class Other(Model):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            with torch.set_grad_enabled(detached != "tokens"):
                tokens = self.encode(x)
            with torch.set_grad_enabled(detached != "pooled"):
                pooled = self.head(tokens.mean(1))
            return {"tokens": tokens, "pooled": pooled}

    gate = check(gradients, Other())
    if detached == "tokens":
        assert gate.passed
        assert gate.notes == ("gradients not judged: the port returns tokens without gradients",)
    else:
        assert places(gate) == ["pooled"]
        assert gate.findings[0].message.startswith("has no gradients")


def in_place_on_saved_tensor(block: Block, x: Tensor) -> Tensor:
    x = x.clone()
    x += block.branch(x)
    return x


def test_in_place_operations_are_noted(gradients: ReferenceGradients) -> None:
    gate = check(gradients, model_with(forward=in_place_on_saved_tensor))
    assert gate.passed
    message = "gradients not judged: the port has no backward pass, as it works in place"
    assert gate.notes == (message,)


class Unbackpropagated(torch.autograd.Function):
    """Identity whose backward pass is not written."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        raise NotImplementedError


def test_error_in_backward_pass(gradients: ReferenceGradients) -> None:
    model = model_with(
        activation=lambda block, x: Unbackpropagated.apply(F.gelu(x, approximate="tanh"))
    )
    gate = check(gradients, model)
    expected = "raises an error in its backward pass; NotImplementedError"
    assert [finding.message for finding in gate.findings] == [expected]


def test_error_with_gradients_enabled(gradients: ReferenceGradients) -> None:
    def activation(block: Block, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise ValueError("no gradients")
        return F.gelu(x, approximate="tanh")

    (finding,) = check(gradients, model_with(activation=activation)).findings
    assert finding.message == "raises an error with gradients enabled; ValueError: no gradients"


class WithTable(Model):
    """Adds rows of a table; without gradient of the first one, if `padding`."""

    def __init__(self, padding: int | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 6, padding_idx=padding)
        self.factor = 1.0
        randomize(self)

    def encode(self, x: Tensor) -> Tensor:
        rows = self.table(torch.arange(4))
        return super().encode(x + self.factor * rows + (1 - self.factor) * rows.detach())


def test_rows_without_gradient_in_the_reference() -> None:
    gradients = run_gradients(Side(WithTable(0)), inputs(), POINTS, torch.float32)
    model = WithTable()
    assert check(gradients, model).findings == ()
    model.factor = 2.0
    assert places(check(gradients, model)) == ["table.weight"]


def test_outputs_that_differ_are_left_to_numerics(gradients: ReferenceGradients) -> None:
    model = Model()
    model.head.bias.data += 1
    gate = check(gradients, model)
    assert gate.findings == ()
    assert gate.notes == ("gradients not judged: the outputs differ",)


def test_reference_without_gradients() -> None:
    def call(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            outputs: dict[str, Tensor] = module(x)
            return outputs

    gradients = run_gradients(Side(Model(), call), inputs(), POINTS, torch.float32)
    gate = check(gradients, Model())
    assert gate.passed
    assert gate.notes == (
        "gradients not judged: the reference has none (it returns outputs without gradients)",
    )
