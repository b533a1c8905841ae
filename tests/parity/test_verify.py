"""verify(): green on what is right, red on every kind of fault, and nothing is left changed."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import memberwise
from memberwise import each, verify
from memberwise.errors import ParityError
from memberwise.testing.tolerance import assert_equal
from tests.parity.models import CASES, loss, targets
from tests.parity.stacks import Net, backward, branches, inputs, nets, run_alone

# A custom operation whose rule can be made wrong. Alone it is `x * weight + bias`.

FAULT: list[str] = []


@torch.library.custom_op("memberwise_verify::affine", mutates_args=())
def affine(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return x * weight + bias


@torch.library.custom_op("memberwise_verify::affine_backward", mutates_args=())
def affine_backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    return [grad * weight, (grad * x).sum(0), grad.sum(0)]


affine.register_autograd(
    lambda ctx, grad: tuple(affine_backward(grad, *ctx.saved_tensors)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0], inputs[1]),
)
affine.register_fake(lambda x, weight, bias: torch.empty_like(x))


@memberwise.register_rule(affine)
def affine_rule(info, in_dims, x, weight, bias):
    out = x * weight[:, None] + (0 if "drops a bias" in FAULT else bias[:, None])
    if "permutes members" in FAULT:
        out = out.flip(0)
    if "mixes members" in FAULT:
        out = out + 1e-7 * out.mean(0)
    if "is wrong in float32" in FAULT and out.dtype is torch.float32:
        out = out * (1 + 1e-3)
    if "is wrong for the last member" in FAULT:
        out = torch.cat([out[:-1], out[-1:] + 1])
    return out.contiguous(), 0


@memberwise.register_rule(affine_backward)
def affine_backward_rule(info, in_dims, grad, x, weight):
    given, factors, weights = (
        value if dim is not None else value.expand(info.batch_size, *value.shape)
        for value, dim in zip((grad, x, weight), in_dims, strict=True)
    )
    grads = [given * weights[:, None], (given * factors).sum(1), given.sum(1)]
    if "cuts a gradient" in FAULT:
        grads[1] = torch.zeros_like(grads[1])
    if "rounds a gradient" in FAULT:
        grads[1] = grads[1].bfloat16().to(grads[1].dtype)
    if "cuts the gradient below" in FAULT:
        grads[0] = torch.zeros_like(grads[0])
    return grads, [0, 0, 0]


class Affine(nn.Module):
    """A layer below, and the operation above."""

    def __init__(self) -> None:
        super().__init__()
        self.below = nn.Linear(3, 4)
        self.weight, self.bias = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return affine(self.below(x), self.weight, self.bias)


@pytest.fixture(autouse=True)
def no_fault() -> Iterator[None]:
    FAULT.clear()
    yield
    FAULT.clear()


def affines(count: int = 3) -> memberwise.Stack:
    return memberwise.build(Affine, seeds=range(count))


@pytest.mark.parametrize("loss_fn", [None, lambda model, x: model(x).square().mean()])
def test_green_without_a_fault(loss_fn: object) -> None:
    report = verify(affines(), inputs(5, 3, dtype=torch.float32), loss_fn=loss_fn)
    assert report.wrong == []
    assert {row.dtype for row in report.rows} == {"float32", "float64"}
    assert {(row.kind, row.name) for row in report.rows} == {
        ("output", "0"),
        ("gradient", "below.weight"),
        ("gradient", "below.bias"),
        ("gradient", "weight"),
        ("gradient", "bias"),
        ("gradient", "input 0"),
    }


@pytest.mark.parametrize(
    ("fault", "wrong"),
    [
        ("drops a bias", "output '0'"),
        ("permutes members", "output '0'"),
        ("mixes members", "output '0'"),
        ("is wrong in float32", "output '0'"),
        ("is wrong for the last member", "output '0'"),
        ("cuts a gradient", "gradient 'weight'"),
        ("rounds a gradient", "gradient 'weight'"),
        ("cuts the gradient below", "gradient 'below.weight'"),
    ],
)
def test_red_on_a_fault(fault: str, wrong: str) -> None:
    FAULT.append(fault)
    with pytest.raises(ParityError, match=r"(?s)deviates.*MW601") as caught:
        verify(affines(), inputs(5, 3, dtype=torch.float32))
    assert wrong in str(caught.value)
    assert caught.value.code == "MW601"
    report = caught.value.report
    assert {f"{row.kind} '{row.name}'" for row in report.wrong} >= {wrong}
    assert "✗" in str(report)
    if fault == "is wrong for the last member":
        assert {row.member for row in report.wrong if row.kind == "output"} == {2}
    if fault == "is wrong in float32":
        assert {row.dtype for row in report.wrong} == {"float32"}
    if fault == "mixes members":
        assert {row.dtype for row in report.wrong} == {"float64"}


def test_a_gradient_that_is_cut_below_shows_in_the_inputs_too() -> None:
    FAULT.append("cuts the gradient below")
    with pytest.raises(ParityError, match="gradient 'input 0'"):
        verify(affines(), each(inputs(3, 5, 3, dtype=torch.float32)))


def test_red_on_members_that_share_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    stack, x = memberwise.build(Net, seeds=range(3)), inputs(6, 3, dtype=torch.float32)
    verify(stack, x)
    streams = memberwise.engine.boundary._run_chunk

    def shared(func, arguments, out_dims, randomness, generators):
        return streams(func, arguments, out_dims, randomness, [generators[0]] * len(generators))

    monkeypatch.setattr(memberwise.engine.boundary, "_run_chunk", shared)
    with pytest.raises(ParityError, match=r"(?s)its random stream stands elsewhere.*MW601"):
        verify(stack, x)


def test_red_on_buffers_that_are_not_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    stack, x = memberwise.stack(nets(3)), inputs(6, 3)
    leave = memberwise.engine.slots.Slots.leave
    monkeypatch.setattr(memberwise.engine.slots.Slots, "leave", lambda self, swap, region: self.restore(swap))
    with pytest.raises(ParityError, match="buffer 'calls'"):
        verify(stack, x)
    monkeypatch.setattr(memberwise.engine.slots.Slots, "leave", leave)
    assert verify(stack, x).wrong == []


def test_members_that_differ_outside_their_tensors() -> None:
    """Each runs with what is its own, in the stack and unstacked."""
    models = nets(3)
    for i, model in enumerate(models):
        model.norm.eps = 1e-5 * 1000**i
    stack, x = memberwise.stack(copy.deepcopy(models)), inputs(6, 3)
    assert verify(stack, x).wrong == []
    assert_equal(stack(x).detach(), run_alone(models, lambda model, i: model(x)).detach(), "output")


def test_red_where_the_stack_fails_and_members_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("no")

    stack = affines()
    monkeypatch.setattr(memberwise.module, "run", fails)
    with pytest.raises(ParityError, match=r"ZeroDivisionError: no.*MW602"):
        verify(stack, inputs(5, 3, dtype=torch.float32))


def test_what_fails_alone_fails_as_it_does_alone() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught:
        verify(affines(), inputs(5, 4, dtype=torch.float32))
    assert not isinstance(caught.value, ParityError)


class Single(nn.Module):
    """Cannot run in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) @ torch.eye(3, dtype=torch.float32)


def test_what_cannot_run_in_float64_is_said() -> None:
    report = verify(memberwise.build(Single, seeds=range(3)), inputs(5, 3, dtype=torch.float32))
    assert {row.dtype for row in report.rows} == {"float32"}
    assert "not compared in float64" in report.notes[0]
    assert "not compared in float64" in str(report)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("train", [True, False])
def test_green_on_every_kind_of_model(name: str, train: bool) -> None:
    case = CASES[name]
    stack = memberwise.build(case.make, seeds=range(3)).train(train)
    x = case.inputs(4, dtype=torch.float32)
    labels = targets(4, *case.shape) if name == "transformer" else targets(4)
    report = verify(stack, x, labels, loss_fn=lambda model, x, labels: loss(model(x), labels))
    assert report.wrong == []
    assert any(row.kind == "gradient" and row.deviation >= 0 for row in report.rows)
    assert any(row.kind == "stream" for row in report.rows) == train


def test_green_on_modes_shared_trunks_and_attributes() -> None:
    stack = memberwise.stack(nets(3, p=0.5))
    stack.eval(members=[1])
    assert verify(stack, inputs(6, 3)).wrong == []
    assert verify(memberwise.stack(branches(3), shared="trunk.*"), inputs(6, 3)).wrong == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_measured_against_float64(dtype: torch.dtype) -> None:
    stack = memberwise.build(Affine, seeds=range(3), dtype=dtype)
    report = verify(stack, inputs(5, 3, dtype=dtype))
    rows = [row for row in report.rows if row.dtype != "float64"]
    assert rows
    assert all(row.error is not None and row.lone_error is not None for row in rows)


def test_an_error_no_larger_than_twice_the_lone_one_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rounding is beyond the table, the lone members' own error is the measure; a larger one is wrong."""
    monkeypatch.setattr(memberwise.parity, "tolerance", lambda dtype: (0.0, 0.0 if dtype is torch.float32 else 1e-9))
    stack, x = affines(), inputs(5, 3, dtype=torch.float32)
    assert verify(stack, x).wrong == []
    FAULT.append("is wrong in float32")
    with pytest.raises(ParityError, match="output '0'"):
        verify(stack, x)


def test_draws_that_depend_on_the_dtype_do_not_excuse_a_fault() -> None:
    """normal_ draws other numbers in float64: so wide an error is no measure."""

    class Noisy(Affine):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + torch.randn_like(x[:, :1])

    stack, x = memberwise.build(Noisy, seeds=range(3)), inputs(5, 3, dtype=torch.float32)
    report = verify(stack, x)
    assert all(row.error is None for row in report.rows)
    FAULT.append("is wrong in float32")
    with pytest.raises(ParityError, match="output '0'"):
        verify(stack, x)


def test_outputs_of_any_structure() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> dict[str, object]:
            out = self.layer(x)
            return {"out": out, "rows": len(x), "none": None, "also": (out.detach(), "text")}

    report = verify(memberwise.build(Several, seeds=range(3)), inputs(5, 3, dtype=torch.float32))
    assert len([row for row in report.rows if row.kind == "output"]) == 2 * 5


@pytest.mark.parametrize(
    ("size", "members", "chosen"),
    [(3, 8, [0, 1, 2]), (10, 4, [0, 3, 6, 9]), (10, 1, [0]), (10, 2, [0, 9]), (9, 8, [0, 1, 2, 3, 5, 6, 7, 8])],
)
def test_at_most_so_many_members(size: int, members: int, chosen: list[int]) -> None:
    report = verify(affines(size), each(inputs(size, 5, 3, dtype=torch.float32)), members=members)
    assert report.members == chosen


def test_nothing_is_left_changed() -> None:
    """Not the stack, its gradients, streams, modes or attributes; not the inputs; not the global generators."""
    stack, x = memberwise.build(Net, seeds=range(3)), inputs(6, 3, dtype=torch.float32)
    outside = torch.ones((), requires_grad=True)
    stack.eval(members=[1])
    backward(stack(x))
    x.grad = None
    before = {name: tensor.clone() for name, tensor in [*stack.named_parameters(), *stack.named_buffers()]}
    grads = {name: p.grad.clone() for name, p in stack.named_parameters()}
    streams = [generator.get_state() for generator in stack.generators]
    attributes, state = dict(vars(stack._template)), random.getstate()
    xs = inputs(3, 6, 3, seed=1, dtype=torch.float32).detach()
    torch_state, given = torch.get_rng_state(), xs.clone()

    def loss_fn(model: nn.Module, x: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        random.random(), torch.rand(1)
        out = model(x * outside + own)
        own.zero_()
        return out.sum()

    verify(stack, x, each(xs), loss_fn=loss_fn)
    for name, tensor in [*stack.named_parameters(), *stack.named_buffers()]:
        assert torch.equal(tensor, before[name]), name
    assert all(torch.equal(p.grad, grads[name]) for name, p in stack.named_parameters())
    assert all(g.get_state().equal(s) for g, s in zip(stack.generators, streams, strict=True))
    assert {name: id(value) for name, value in vars(stack._template).items()} == {
        name: id(value) for name, value in attributes.items()
    }
    assert random.getstate() == state
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert torch.equal(xs, given)
    assert x.grad is None
    assert outside.grad is None
    assert [member.training for member in stack] == [True, False, True]


def test_the_report_reads_and_saves() -> None:
    report = verify(affines(), inputs(5, 3, dtype=torch.float32))
    text = str(report)
    assert text.splitlines()[0] == "3 members against their lone runs: 0 of 12 tensors wrong"
    assert "below.weight" in text
    assert repr(report) == text
    saved = json.loads(json.dumps(report.to_dict()))
    assert saved["members"] == [0, 1, 2]
    assert saved["rows"][0]["kind"] == "output"


def test_autocast_is_verified_and_its_reference_is_not_cast() -> None:
    stack, x = affines(), inputs(5, 3, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = verify(stack, x, loss_fn=lambda model, x: F.linear(model.below(x), model.below(x)))
    assert {row.dtype for row in report.rows if row.kind == "output"} == {"bfloat16", "float64"}
