"""A stack's call against its models run alone: outputs, gradients of parameters and inputs, buffers."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import memberwise
from memberwise import each
from memberwise.engine.tensor import MemberTensor
from memberwise.testing.tolerance import assert_equal
from tests.parity.models import CASES, loss, targets
from tests.parity.stacks import assert_same_state, backward, inputs, nets, run_alone, twins


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("batch", [2, 5])
@pytest.mark.parametrize("train", [True, False])
def test_shared_input(size: int, batch: int, train: bool) -> None:
    models = nets(size)
    stack, x = memberwise.stack(models).train(train), inputs(batch, 3)
    alone, own = [model.train(train) for model in twins(models)], x.detach().clone().requires_grad_()
    expected = run_alone(alone, lambda model, i: model(own))
    out = stack(x)
    backward(out)
    assert_equal(out.detach(), expected, "output")
    assert_equal(x.grad, own.grad, "gradient of the shared input")
    assert_same_state(stack, alone)
    assert stack.calls.tolist() == [1] * size


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_own_input_of_each_member(dim: int) -> None:
    models, xs = nets(3), inputs(3, 5, 3)
    stack, own = memberwise.stack(models), xs.detach().clone().requires_grad_()
    alone = twins(models)
    expected = run_alone(alone, lambda model, i: model(own[i]))
    given = xs.detach().movedim(0, dim).contiguous().requires_grad_()
    out = stack(each(given, dim))
    backward(out)
    assert_equal(out.detach(), expected, "output")
    assert_equal(given.grad.movedim(dim, 0), own.grad, "gradient of the members' inputs")
    assert_same_state(stack, alone)


@pytest.mark.parametrize("batch", [0, 1])
def test_batches_of_none_and_one(batch: int) -> None:
    models = [model.eval() for model in nets(3)]
    stack, alone, x = memberwise.stack(models), twins(models), inputs(batch, 3)
    expected = run_alone(alone, lambda model, i: model(x))
    out = stack(x)
    backward(out)
    assert_equal(out.detach(), expected, "output")
    assert_same_state(stack, alone)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("size", "batch", "train"), [(1, 4, True), (3, 2, True), (3, 1, False), (8, 4, False), (3, 0, False)]
)
def test_every_kind_of_model(name: str, shared: bool, size: int, batch: int, train: bool) -> None:
    case = CASES[name]
    models = [model.train(train) for model in case.members(size, torch.float64, p=0.0)]
    stack, alone = memberwise.stack(models), twins(models)
    lead = (batch,) if shared else (size, batch)
    x = case.inputs(*lead, dtype=torch.float64).detach()
    expected = run_alone(alone, lambda model, i: model(x if shared else x[i]))
    out = stack(x if shared else each(x))
    backward(out)
    assert_equal(out.detach(), expected, "output")
    assert_same_state(stack, alone)


@pytest.mark.parametrize("name", CASES)
def test_a_loss_written_for_one_model(name: str) -> None:
    case = CASES[name]
    models = case.members(3, torch.float64, p=0.0)
    stack, alone = memberwise.stack(models), twins(models)
    x, labels = (
        case.inputs(4, dtype=torch.float64).detach(),
        targets(4, *case.shape) if name == "transformer" else targets(4),
    )

    def loss_fn(model: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return loss(model(x), labels)

    losses = memberwise.vmap(loss_fn, (0, None, None))(stack, x, labels)
    losses.sum().backward()
    own = []
    for model in alone:
        value = loss_fn(model, x, labels)
        value.backward()
        own.append(value.detach())
    assert_equal(losses.detach(), torch.stack(own), "losses")
    assert_same_state(stack, alone)


def test_two_steps_of_a_plain_optimizer() -> None:
    models = nets(3)
    stack, alone, x = memberwise.stack(models), twins(models), inputs(5, 3)
    ours = torch.optim.SGD(stack.parameters(), lr=0.1, momentum=0.9)
    theirs = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in alone]
    for _ in range(2):
        ours.zero_grad()
        backward(stack(x.detach()))
        ours.step()
        for optimizer in theirs:
            optimizer.zero_grad()
        run_alone(alone, lambda model, i: model(x.detach()))
        for optimizer in theirs:
            optimizer.step()
    assert_same_state(stack, alone)


class Talkative(nn.Module):
    """Takes and gives structures."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, batch: dict[str, torch.Tensor], *, gain: float = 1.0, offset: torch.Tensor | None = None):
        out = self.layer(batch["x"]) * gain
        return {"out": out if offset is None else out + offset, "rows": len(out), "none": None}


def test_structures_keywords_and_marks_inside_them() -> None:
    models = [Talkative().double() for _ in range(3)]
    stack, xs, offsets = memberwise.stack(models), inputs(3, 5, 3), inputs(2, 3, seed=1)
    out = stack({"x": each(xs)}, gain=2.0, offset=each(offsets, 1))
    assert out["rows"] == 5
    assert out["none"] is None
    expected = [model({"x": xs[i]}, gain=2.0, offset=offsets[:, i])["out"] for i, model in enumerate(models)]
    assert_equal(out["out"], torch.stack(expected), "output")


@dataclass
class Batch:
    """A structure that torch does not know."""

    x: object


class FromBatch(nn.Module):
    """Reads its input out of a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, batch: Batch) -> Batch:
        return Batch(self.layer(batch.x))


def test_a_mark_inside_a_dataclass() -> None:
    models, xs = [FromBatch().double() for _ in range(3)], inputs(3, 5, 3)
    out = memberwise.stack(models)(Batch(each(xs)))
    assert_equal(out.x, torch.stack([model(Batch(x)).x for model, x in zip(models, xs, strict=True)]), "output")


def test_marks_of_another_number_of_members_are_refused() -> None:
    stack = memberwise.stack(nets(3))
    with pytest.raises(memberwise.errors.ArgumentError, match="MW201"):
        stack(each(inputs(4, 5, 3)))
    with pytest.raises(memberwise.errors.ArgumentError, match=r"no such dimension.*MW201"):
        stack(each(inputs(3, 5, 3), 3))
    assert stack.calls.tolist() == [0, 0, 0]


class Pair(nn.Module):
    """A model that takes another model as an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, inner: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.layer(inner(x))


def test_a_stack_as_the_argument_of_a_stack() -> None:
    inner, outer, x = nets(3), [Pair().double() for _ in range(3)], inputs(5, 3)
    mine, ours = memberwise.stack(inner), memberwise.stack(outer)
    alone, others = twins(inner), twins(outer)
    backward(ours(mine, x))
    run_alone(others, lambda model, i: model(alone[i], x))
    assert_same_state(ours, others)
    assert_same_state(mine, alone)


def test_a_stack_of_models_without_parameters() -> None:
    stack = memberwise.stack([nn.ReLU() for _ in range(3)])
    x = inputs(4, 2)
    assert len(stack) == 3
    assert_equal(stack(x), x.relu().expand(3, 4, 2), "output")
    assert_equal(stack(each(inputs(3, 4, 2, seed=1))), inputs(3, 4, 2, seed=1).relu(), "output")


def test_no_grad_and_inference_mode() -> None:
    models = nets(3)
    stack, x = memberwise.stack(models).eval(), inputs(5, 3)
    expected = torch.stack([model.eval()(x).detach() for model in models])
    with torch.no_grad():
        out = stack(x)
    assert not out.requires_grad
    assert_equal(out, expected, "output under no_grad")
    with torch.inference_mode():
        assert_equal(stack(x), expected, "output in inference mode")
    backward(stack(x))
    assert stack.first.weight.grad.any()


def test_frozen_parameters_get_no_gradient() -> None:
    models = nets(3)
    stack = memberwise.stack(models)
    stack.first.requires_grad_(False)
    backward(stack(inputs(5, 3)))
    assert stack.first.weight.grad is None
    assert stack.last.weight.grad.any()


def test_gradients_by_autograd_grad_and_twice() -> None:
    models = nets(3)
    stack, alone, x = memberwise.stack(models), twins(models), inputs(5, 3).detach()
    (ours,) = torch.autograd.grad(stack(x).square().sum(), [stack.first.weight], create_graph=True)
    (ours_again,) = torch.autograd.grad(ours.square().sum(), [stack.last.weight])
    for i, model in enumerate(alone):
        (own,) = torch.autograd.grad(model(x).square().sum(), [model.first.weight], create_graph=True)
        (again,) = torch.autograd.grad(own.square().sum(), [model.last.weight])
        assert_equal(ours[i].detach(), own.detach(), "first derivative")
        assert_equal(ours_again[i], again, "second derivative")


def test_hooks_on_the_stack_and_on_its_parts() -> None:
    models = nets(3)
    stack, x, seen = memberwise.stack(models), inputs(5, 3), []
    stack.register_forward_pre_hook(lambda module, args: seen.append(("before", type(module), args[0].shape)))
    stack.register_forward_hook(lambda module, args, out: seen.append(("after", type(module), out.shape)))
    stack.first.register_forward_hook(lambda module, args, out: seen.append(("part", type(module), out.shape)))
    stack.last.register_full_backward_hook(lambda module, before, after: seen.append(("back", None, after[0].shape)))
    backward(stack(x))
    assert seen == [
        ("before", memberwise.Stack, (5, 3)),
        ("part", nn.Linear, (5, 4)),
        ("after", memberwise.Stack, (3, 5, 2)),
        ("back", None, (5, 2)),
    ]


def test_a_hook_that_changes_a_part_s_output_has_its_gradient() -> None:
    models = nets(3)
    for model in models:
        model.first.register_forward_hook(lambda module, args, out: out * out)
    stack, alone, x = memberwise.stack(models), twins(models), inputs(5, 3)
    expected = run_alone(alone, lambda model, i: model(x))
    out = stack(x)
    backward(out)
    assert_equal(out.detach(), expected, "output")
    assert_same_state(stack, alone)


class Keeps(nn.Module):
    """Keeps its last hidden state in a plain attribute, and uses it in the next call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.hidden = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._inputs = x
        self.hidden = self.layer(x if self.hidden is None else x + self.hidden)
        return self.hidden


def test_what_a_call_leaves_in_attributes_is_each_member_s_own_in_the_next() -> None:
    models, x = [Keeps().double() for _ in range(3)], inputs(5, 3)
    stack, alone = memberwise.stack(models), twins(models)
    for _ in range(3):
        out = stack(x)
    expected = run_alone(alone, lambda model, i: [model(x) for _ in range(3)][-1])
    backward(out)
    assert_equal(out.detach(), expected, "output of the third call")
    assert_equal(stack.hidden.detach(), expected, "the attribute, outside")
    assert type(stack._template._inputs) is torch.Tensor
    assert_same_state(stack, alone)


class Reader(nn.Module):
    """Reads a value on the host, in which members may differ; keeps statistics and an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.layer = nn.Linear(3, 3)
        self.seen = torch.zeros(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x) + self.seen
        self.seen = self.seen + x.detach().mean() + self.layer.bias.detach().sum()
        return self.layer(x) * (2 if self.layer.weight.sum() > 0 else 3)


class Outer(nn.Module):
    """Has a part that reads."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.BatchNorm1d(3)
        self.reader = Reader()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.reader(self.before(x)) + 1


@pytest.mark.filterwarnings("ignore::memberwise.errors.StackWarning")
@pytest.mark.parametrize("kind", [Reader, Outer])
def test_members_that_part_ways_keep_their_own_attributes(kind: type[nn.Module]) -> None:
    """Whether the whole model runs by members, or a part of it: twice, as what the first call left counts."""
    models = [kind().double() for _ in range(4)]
    for i, model in enumerate(models):
        weight = (model if kind is Reader else model.reader).layer.weight
        weight.data = weight.data.abs() * (-1) ** i
    stack, alone, x = memberwise.stack(models), twins(models), inputs(5, 3).detach()
    for _ in range(2):
        expected = run_alone(alone, lambda model, i: model(x))
        out = stack(x)
        backward(out)
        assert_equal(out.detach(), expected, "output")
    assert_same_state(stack, alone)
    reader = stack if kind is Reader else stack.reader
    own = [model if kind is Reader else model.reader for model in alone]
    assert_equal(reader.seen, torch.stack([one.seen for one in own]), "the attribute")


def test_a_stack_compiles_with_a_break() -> None:
    models = nets(2, dtype=torch.float32)
    stack, alone, x = memberwise.stack(models), twins(models), inputs(5, 3, dtype=torch.float32).detach()

    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = stack

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.stack(x * 2) + 1

    expected = run_alone(alone, lambda model, i: model(x * 2) + 1)
    out = torch.compile(Parent(), backend="eager")(x)
    backward(out)
    assert_equal(out.detach(), expected, "output")
    assert_same_state(stack, alone)
    out = torch.compile(stack, backend="eager")(x * 2)
    run_alone(alone, lambda model, i: model(x * 2))
    backward(out)
    assert_same_state(stack, alone)


def test_a_stack_inside_another_module() -> None:
    models, head = nets(3), nn.Linear(2, 1).double()

    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ensemble, self.head = memberwise.stack(models), head

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.ensemble(x)).mean(0)

    parent, alone, x = Parent(), twins(models), inputs(5, 3).detach()
    out = parent(x)
    out.sum().backward()
    theirs = nn.Linear(2, 1).double()
    theirs.load_state_dict(head.state_dict())
    expected = torch.stack([theirs(model(x)) for model in alone]).mean(0)
    expected.sum().backward()
    assert_equal(out.detach(), expected.detach(), "output")
    assert_equal(head.weight.grad, theirs.weight.grad, "gradient of the parent's own layer")
    assert_same_state(parent.ensemble, alone)
    assert {name for name, _ in parent.named_parameters()} >= {"ensemble.first.weight", "head.bias"}
    assert parent.eval().ensemble.training is False
    assert parent.ensemble.norm.training is False
    assert parent.float().ensemble.first.weight.dtype is torch.float32


def test_functional_losses_of_distilled_members() -> None:
    """A live member is a teacher of the others, inside one call."""
    models, x = nets(3), inputs(5, 3).detach()
    stack = memberwise.stack(models).eval()
    teacher = stack[0]
    out = memberwise.vmap(lambda model, x: F.mse_loss(model(x), teacher(x).detach()), (0, None))(stack, x)
    assert_equal(out[0].detach(), torch.zeros((), dtype=torch.float64), "distance to itself")
    assert bool((out[1:] > 0).all())


@pytest.mark.parametrize("name", CASES)
def test_no_member_tensor_outlives_its_call(name: str) -> None:
    """Neither in the stack nor in a cycle that only the collector would find: memory is free at once."""
    case = CASES[name]
    stack, x = memberwise.build(case.make, seeds=range(3)), case.inputs(4, dtype=torch.float32)
    gc.collect()
    before = {id(one) for one in gc.get_objects() if isinstance(one, MemberTensor)}
    gc.disable()
    try:
        stack(x).square().sum().backward()
        left = [one for one in gc.get_objects() if isinstance(one, MemberTensor) and id(one) not in before]
    finally:
        gc.enable()
    assert left == []
