"""Results that others are computed from: gradients by them, hooks on them and what they retain, as alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import memberwise
from memberwise.engine.tensor import MemberTensor
from memberwise.testing.tolerance import assert_equal

pytestmark = pytest.mark.usefixtures("composites")
MEMBERS = 3


class Net(nn.Module):
    """Returns what it goes on with; `way` says how that is made."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.calls = way, 0
        self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.first, self.second, self.head = nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> Any:
        self.calls += 1
        maps = self.norm(self.conv(x)).relu()
        if self.way == "maps":
            return maps, self.head(self.first(maps.flatten(1)))
        flat = maps.flatten(1)
        if self.way == "a view":
            return {"flat": flat, "out": self.head(self.first(flat).tanh())}
        h = self.first(flat)
        if self.way == "written":
            h = h * 2
            h += 1
            return h, self.head(h)
        if self.way == "a draw before":
            h = F.dropout(h.exp(), 0.5)
            return self.head(h), h
        if self.way == "in a row":
            second = self.second(h).tanh() + h
            return h, second, self.head(second)
        if self.way == "values and places":
            values, places = h.topk(4, 1)
            return values, places, self.head(torch.cat([values, values.exp()], 1))
        if self.way == "side by side":
            return self.head(h), self.second(h)
        if self.way == "a residual":
            return h, self.second(h.relu()) + h
        return h.exp(), self.head(h)


def values_of(out: Any) -> list[torch.Tensor]:
    return [*out.values()] if isinstance(out, dict) else [*out]


def asked_of(out: Any, how: str) -> list[torch.Tensor | None]:
    """What a user asks of the results of a call."""
    outs = [one for one in values_of(out) if one.is_floating_point()]
    last = sum(one.square().sum() for one in outs)
    if how == "gradient":
        return [*torch.autograd.grad(last, outs, allow_unused=True)]
    if how == "double":
        grads = torch.autograd.grad(last, outs, create_graph=True)
        sum(grad.square().sum() for grad in grads).backward()  # type: ignore[union-attr] # a tensor
        return [*grads]
    if how == "hook":
        seen: list[torch.Tensor] = []
        for one in outs:
            one.register_hook(lambda grad: seen.append(grad.clone()) or grad * 2)
        last.backward()  # type: ignore[union-attr] # a tensor
        return [*seen]
    for one in outs:
        one.retain_grad()
    last.backward()  # type: ignore[union-attr] # a tensor
    return [one.grad for one in outs]


WAYS = [
    *("maps", "a view", "written", "a draw before", "in a row", "values and places", "side by side", "a residual"),
    "apart",
]


@pytest.mark.parametrize("how", ["gradient", "retained", "hook", "double"])
@pytest.mark.parametrize("way", WAYS)
def test_a_gradient_by_a_result(way: str, how: str) -> None:
    models = [Net(way).double() for _ in range(MEMBERS)]
    stack = memberwise.stack(copy.deepcopy(models))
    stack.generators = [torch.Generator().manual_seed(i) for i in range(MEMBERS)]
    x = torch.randn(5, 2, 6, 6, dtype=torch.float64)
    streams = [torch.Generator().manual_seed(i) for i in range(MEMBERS)]
    for call in range(2):
        out = stack(x)
        found = asked_of(out, how)
        for i, model in enumerate(models):
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(streams[i].get_state())
                theirs = model(x)
                streams[i].set_state(torch.get_rng_state())
            expected = asked_of(theirs, how)
            for k, (ours, own) in enumerate(zip(values_of(out), values_of(theirs), strict=True)):
                assert_equal(ours[i].detach(), own.detach(), f"call {call}, member {i}: result {k}")
            assert len(found) == len(expected)
            for k, (ours, own) in enumerate(zip(found, expected, strict=True)):
                assert (ours is None) == (own is None), f"call {call}, member {i}: {k}"
                if ours is not None:
                    assert not isinstance(ours, MemberTensor)
                    assert_equal(ours[i], own, f"call {call}, member {i}: asked of result {k}")
    for i, model in enumerate(models):
        for name, parameter in model.named_parameters():
            ours = stack.get_parameter(name).grad
            assert (ours is None) == (parameter.grad is None), name
            if ours is not None:
                assert_equal(ours[i], parameter.grad, f"member {i}: gradient of {name}")
        for name, buffer in model.named_buffers():
            assert_equal(stack.get_buffer(name)[i], buffer, f"member {i}: {name}")


def test_the_way_is_known_at_the_second_call() -> None:
    calls: list[int] = []

    def features(w: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(1)
        h = (x * w).exp()
        return h, h.sin()

    w, x = torch.randn(3, 4, requires_grad=True), torch.randn(4)
    mapped = memberwise.vmap(features, (0, None))
    counts = []
    for _ in range(3):
        h, out = mapped(w, x)
        assert_equal(torch.autograd.grad(out.sum(), h)[0], h.cos().detach(), "gradient")
        counts.append(len(calls))
    assert counts[2] == counts[1] + 1 == counts[0] + 2


def test_a_part_that_is_a_view_among_several_is_left_as_it_is() -> None:
    """A view that others of one operation lie beside: alone an in-place write to one reaches the others' graph."""

    def halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        left, right = (x * 2).chunk(2)
        return left, left * right

    x = torch.randn(3, 4, requires_grad=True)
    for _ in range(2):
        left, out = memberwise.vmap(halves)(x)
        (found,) = torch.autograd.grad((left + out).sum(), x)
        own = [row.detach().requires_grad_() for row in x]
        for i, row in enumerate(own):
            a, b = halves(row)
            (a + b).sum().backward()
            assert_equal(found[i], row.grad, "gradient of x")


@pytest.mark.parametrize("later", ["the view", "its base"])
def test_a_waypoint_that_is_a_view_and_written_later(later: str) -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        base = x.sin()
        view = base.view(2, 2)
        out = view * 3
        (view if later == "the view" else base).mul_(2)
        return view, out.sin() + base.sum()

    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    for _ in range(3):
        view, out = memberwise.vmap(function)(x)
        (found,) = torch.autograd.grad(view.square().sum() + out.square().sum(), x)
        for i in range(3):
            row = x[i].detach().requires_grad_()
            a, b = function(row)
            (a.square().sum() + b.square().sum()).backward()
            assert_equal(found[i], row.grad, "gradient of x")


def test_captured() -> None:
    models = [Net("a residual").double() for _ in range(MEMBERS)]
    stacks = [memberwise.stack(copy.deepcopy(models)) for _ in range(2)]
    x = torch.randn(5, 2, 6, 6, dtype=torch.float64)

    def stepping(stack: memberwise.Stack) -> Callable[[torch.Tensor], torch.Tensor]:
        optimizer = memberwise.optim.SGD(stack.parameters(), lr=0.1)

        def step(x: torch.Tensor) -> torch.Tensor:
            optimizer.zero_grad()
            h, out = stack(x)
            (slope,) = torch.autograd.grad(out.sum(), h, create_graph=True)
            loss = out.square().mean((1, 2)) + slope.square().mean((1, 2))
            loss.sum().backward()
            optimizer.step()
            return loss.detach()

        return step

    eager, captured = stepping(stacks[0]), memberwise.compile(stepping(stacks[1]), backend="fx")
    for _ in range(4):
        assert_equal(captured(x), eager(x), "loss")
