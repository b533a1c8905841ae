"""`.grad` and other state that a step leaves behind is what the eager step leaves, in whatever order it works."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from memberwise.capture import compile
from tests.parity.twins import Twins


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def _x() -> torch.Tensor:
    return torch.randn(5, 3, dtype=torch.float64)


ORDERS: dict[str, Callable[[Any, Any, torch.Tensor], torch.Tensor]] = {}


def order(function: Any) -> Any:
    ORDERS[function.__name__] = function
    return function


def _loss(net: Any, x: torch.Tensor) -> torch.Tensor:
    return net(x).pow(2).mean()


@order
def zero_at_the_start(net: Any, opt: Any, x: torch.Tensor) -> torch.Tensor:
    opt.zero_grad()
    loss = _loss(net, x)
    loss.backward()
    opt.step()
    return loss


@order
def zero_at_the_end(net: Any, opt: Any, x: torch.Tensor) -> torch.Tensor:
    loss = _loss(net, x)
    loss.backward()
    opt.step()
    opt.zero_grad()
    return loss


@order
def zero_in_place(net: Any, opt: Any, x: torch.Tensor) -> torch.Tensor:
    opt.zero_grad(set_to_none=False)
    loss = _loss(net, x)
    loss.backward()
    opt.step()
    return loss


@order
def zero_before_step(net: Any, opt: Any, x: torch.Tensor) -> torch.Tensor:
    loss = _loss(net, x)
    opt.zero_grad()
    loss.backward()
    opt.step()
    return loss


@order
def accumulate(net: Any, opt: Any, x: torch.Tensor) -> torch.Tensor:
    loss = _loss(net, x)
    loss.backward()
    return loss


@order
def two_backwards(net: Any, opt: Any, x: torch.Tensor) -> torch.Tensor:
    opt.zero_grad()
    _loss(net, x).backward()
    loss = _loss(net, x * 2)
    loss.backward()
    opt.step()
    return loss


@order
def retained_graph(net: Any, opt: Any, x: torch.Tensor) -> torch.Tensor:
    opt.zero_grad()
    loss = _loss(net, x)
    loss.backward(retain_graph=True)
    loss.backward()
    opt.step()
    return loss


@order
def gradients_by_name(net: Any, opt: Any, x: torch.Tensor) -> torch.Tensor:
    loss = _loss(net, x)
    grads = torch.autograd.grad(loss, list(net.parameters()))
    with torch.no_grad():
        for parameter, grad in zip(net.parameters(), grads, strict=True):
            parameter.sub_(grad, alpha=0.1)
    return loss


@order
def gradients_set_by_hand(net: Any, opt: Any, x: torch.Tensor) -> torch.Tensor:
    loss = _loss(net, x)
    grads = torch.autograd.grad(loss, list(net.parameters()))
    for parameter, grad in zip(net.parameters(), grads, strict=True):
        parameter.grad = grad * 2
    opt.step()
    return loss


@order
def clipped(net: Any, opt: Any, x: torch.Tensor) -> torch.Tensor:
    opt.zero_grad()
    loss = _loss(net, x)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(net.parameters(), 0.1)
    opt.step()
    return norm


@order
def gradient_penalty(net: Any, opt: Any, x: torch.Tensor) -> torch.Tensor:
    opt.zero_grad()
    x = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    loss = _loss(net, x) + grad.pow(2).mean()
    loss.backward()
    opt.step()
    return loss


@order
def part_of_the_parameters(net: Any, opt: Any, x: torch.Tensor) -> torch.Tensor:
    opt.zero_grad()
    loss = net[0](x).pow(2).mean()
    loss.backward()
    opt.step()
    return loss


@order
def with_closure(net: Any, opt: Any, x: torch.Tensor) -> torch.Tensor:
    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = _loss(net, x)
        loss.backward()
        return loss

    return opt.step(closure)


@order
def checkpointed(net: Any, opt: Any, x: torch.Tensor) -> torch.Tensor:
    opt.zero_grad()
    loss = checkpoint(net, x, use_reentrant=False).pow(2).mean()
    loss.backward()
    opt.step()
    return loss


@order
def tensor_hook_inside(net: Any, opt: Any, x: torch.Tensor) -> torch.Tensor:
    opt.zero_grad()
    hidden = net[0](x)
    hidden.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
    loss = net[2](net[1](hidden)).pow(2).mean()
    loss.backward()
    opt.step()
    return loss


OUTSIDE: dict[str, Callable[[SimpleNamespace], Any]] = {
    "nothing": lambda world: None,
    "zero to None": lambda world: world.net.zero_grad(),
    "zero in place": lambda world: world.net.zero_grad(set_to_none=False),
    "own gradients": lambda world: [setattr(p, "grad", torch.ones_like(p)) for p in world.net.parameters()],
}


@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("name", ORDERS)
def test_orders(name: str, outside: str) -> None:
    def make() -> SimpleNamespace:
        net = _net()
        opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        return SimpleNamespace(step=lambda x: ORDERS[name](net, opt, x), net=net, opt=opt)

    twins = Twins(make)
    for _ in range(7):
        twins.call(_x())
        twins.both(OUTSIDE[outside])
    assert twins.captured.replayed >= 3, [refusal.sentence() for refusal in twins.captured.refusals]


def test_gradients_are_kept_apart_from_those_of_the_call_before() -> None:
    weight = torch.ones(3, requires_grad=True)

    def step(x: torch.Tensor) -> None:
        weight.grad = None
        (weight * x).sum().backward()

    captured = compile(step, backend="fx")
    kept = []
    for k in range(5):
        captured(torch.full((3,), float(k)))
        kept.append(weight.grad)
    assert [grad[0].item() for grad in kept] == [0, 1, 2, 3, 4]


def test_the_gradient_of_an_argument() -> None:
    def step(x: torch.Tensor) -> None:
        (x * x).sum().backward()

    captured = compile(step, backend="fx")
    for k in range(5):
        x = torch.full((3,), float(k), requires_grad=True)
        captured(x)
        assert torch.equal(x.grad, 2 * x)
    assert captured.captured.replayed == 4


def test_arguments_written_in_place() -> None:
    twins = Twins(lambda: SimpleNamespace(step=lambda x, y: (x.add_(1).t().mul_(y.t()), y[0].zero_())[0].sum()))
    for _ in range(4):
        x = torch.randn(2, 3)
        twins.call(x.clone(), torch.randn(2, 3))
    assert twins.captured.replayed == 3


@pytest.mark.parametrize("kind", ["attribute", "buffer", "dict", "list", "swap"])
def test_state_that_the_step_replaces(kind: str) -> None:
    """An average kept as `self.mean = 0.9 * self.mean + ...` is a new tensor in each call."""

    def make() -> SimpleNamespace:
        box = nn.Module()
        box.register_buffer("mean", torch.zeros(3))
        box.plain = torch.zeros(3)
        box.table = {"a": torch.zeros(3), "b": torch.ones(3)}
        box.rows = [torch.zeros(3), torch.ones(3)]

        def step(x: torch.Tensor) -> torch.Tensor:
            if kind == "attribute":
                box.plain = 0.9 * box.plain + x
            elif kind == "buffer":
                box.mean = 0.9 * box.mean + x
            elif kind == "dict":
                box.table["a"] = 0.9 * box.table["a"] + box.table["b"] * x
            elif kind == "list":
                box.rows[0] = 0.9 * box.rows[0] + box.rows[1] * x
            else:
                box.rows[0], box.rows[1] = box.rows[1] + x, box.rows[0] * 2
            return box.plain + box.mean + box.table["a"] + box.rows[0]

        return SimpleNamespace(step=step, box=box, table=box.table, rows=box.rows, plain=lambda: box.plain)

    twins = Twins(make)
    for _ in range(6):
        twins.call(torch.randn(3))
    assert twins.captured.replayed >= 4


def test_a_swap_of_state_itself_is_not_replayed_wrongly() -> None:
    def make() -> SimpleNamespace:
        rows = [torch.zeros(3), torch.ones(3)]

        def step(x: torch.Tensor) -> torch.Tensor:
            rows.reverse()
            rows[0].add_(x)
            return rows[1] * 2

        return SimpleNamespace(step=step, rows=rows)

    twins = Twins(make)
    with pytest.warns(UserWarning, match="MW501"):
        for _ in range(6):
            twins.call(torch.ones(3))


@pytest.mark.parametrize("kind", ["dict", "dataclass", "nested", "none", "number", "state", "view of state", "twice"])
def test_what_is_returned(kind: str) -> None:
    import dataclasses

    @dataclasses.dataclass
    class Answer:
        loss: torch.Tensor
        name: str

    weight = torch.arange(3.0)

    def step(x: torch.Tensor) -> Any:
        out = x * weight
        return {
            "dict": {"a": out, "b": [out + 1]},
            "dataclass": Answer(out, "mine"),
            "nested": ((out,), [out, {"x": None}]),
            "none": None,
            "number": (3, 2.5, "text"),
            "state": weight,
            "view of state": weight[1:],
            "twice": (out, out),
        }[kind]

    captured = compile(step, backend="fx")
    for _ in range(4):
        x = torch.randn(3)
        ours, theirs = captured(x), step(x)
        assert str(ours) == str(theirs)
        assert type(ours) is type(theirs)
    assert captured.captured.replayed == 3
    if kind == "state":
        assert ours is weight
    if kind == "view of state":
        ours.zero_()
        assert torch.equal(weight, torch.tensor([0.0, 0.0, 0.0]))
    if kind == "twice":
        assert ours[0] is ours[1]


def test_returned_tensors_carry_no_graph_from_the_first_call_on() -> None:
    weight = torch.ones(3, requires_grad=True)

    def step(x: torch.Tensor) -> torch.Tensor:
        weight.grad = None
        loss = (weight * x).pow(2).sum()
        loss.backward()
        return loss

    captured = compile(step, backend="fx")
    assert not any(captured(torch.ones(3)).requires_grad for _ in range(4))


@pytest.mark.parametrize("spent", [True, False])
def test_a_graph_that_is_not_spent_is_never_cut(spent: bool) -> None:
    """The worst fault: a loss returned for the caller's backward, with its graph gone in silence."""
    weight = torch.ones(3, requires_grad=True)
    other = torch.ones(3, requires_grad=True)

    def step(x: torch.Tensor) -> torch.Tensor:
        loss = (weight * x).pow(2).sum()
        if spent:
            (other * x).pow(2).sum().backward()
        return loss

    captured = compile(step, backend="fx")
    with pytest.warns(UserWarning, match="gradient graph"):
        for k in range(1, 6):
            weight.grad = None
            captured(torch.ones(3) * k).backward()
            assert torch.equal(weight.grad, torch.full((3,), 2.0 * k * k))
    assert captured.captured.replayed == 0


def test_statistics_are_kept_though_the_output_is_not_used() -> None:
    """BatchNorm's operation writes to arguments that its schema calls untouched."""

    def make() -> SimpleNamespace:
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))

        def step(x: torch.Tensor) -> None:
            with torch.no_grad():
                net(x)

        return SimpleNamespace(step=step, net=net)

    twins = Twins(make)
    for _ in range(4):
        twins.call(torch.randn(5, 3))
    assert twins.captured.replayed == 3
