"""Calls and backwards from several threads at once are what they are from one; and nothing stays of a step."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import memberwise
from memberwise.engine import tensor
from memberwise.testing.tolerance import assert_equal
from tests.parity.loops import numbers

pytestmark = [
    pytest.mark.usefixtures("composites"),
    pytest.mark.filterwarnings("ignore::memberwise.errors.StackWarning"),
]


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * torch.full((1,), 2.0, dtype=grads[0].dtype)


class Model(nn.Module):
    """Layers, statistics, a Function, a checkpoint, and a read in which members may differ."""

    def __init__(self, reads: bool = False) -> None:
        super().__init__()
        self.first, self.norm, self.last, self.reads = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2), reads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = Doubled.apply(self.norm(self.first(x)))
        if self.reads and hidden.detach()[0].sum() > 0:
            hidden = hidden * 2  # type: ignore[operator] # a tensor
        return checkpoint(lambda h: self.last(h.tanh()), hidden, use_reentrant=False)  # type: ignore[return-value] # one tensor


def models_of(seed: int, reads: bool) -> list[Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [Model(reads).double() for _ in range(3)]


def loss_of(stack: memberwise.Stack, x: torch.Tensor) -> torch.Tensor:
    return stack(x).square().sum()


def check(stack: memberwise.Stack, models: list[Any], x: torch.Tensor, times: int) -> None:
    for model in models:
        for _ in range(times):
            model(x).square().sum().backward()
    for name, p in stack.named_parameters():
        assert_equal(p.grad, torch.stack([model.get_parameter(name).grad for model in models]), name)
    for name, b in stack.named_buffers():
        assert_equal(b, torch.stack([model.get_buffer(name) for model in models]), name)


@pytest.mark.parametrize("reads", [False, True])
def test_stacks_called_from_threads(reads: bool) -> None:
    x = numbers(5, 3, grad=False)
    cases = [models_of(seed, reads) for seed in range(4)]
    stacks = [memberwise.stack(models) for models in cases]

    def train(stack: memberwise.Stack) -> None:
        for _ in range(5):
            loss_of(stack, x).backward()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(train, stacks))
    for stack, models in zip(stacks, cases, strict=True):
        check(stack, models, x, 5)


def test_one_stack_called_from_threads() -> None:
    """One call at a time shows members in the template."""
    x = numbers(5, 3, grad=False)
    models = models_of(0, reads=True)
    stack = memberwise.stack(models).eval()
    with ThreadPoolExecutor(4) as pool, torch.no_grad():
        outs = list(pool.map(lambda _: stack(x).detach(), range(12)))
    for out in outs:
        assert_equal(out, torch.stack([model.eval()(x).detach() for model in models]))


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("together", [False, True])
def test_backward_in_other_threads_than_forward(together: bool, reads: bool) -> None:
    """One loss a thread, one after the other or all at once, while this thread goes on."""
    x = numbers(5, 3, grad=False)
    cases = [models_of(seed, reads) for seed in range(3)]
    stacks = [memberwise.stack(models) for models in cases]
    losses = [loss_of(stack, x) for stack in stacks]
    with ThreadPoolExecutor(3 if together else 1) as pool:
        list(pool.map(lambda loss: torch.autograd.backward(loss), losses))
    for stack, models in zip(stacks, cases, strict=True):
        check(stack, models, x, 1)


# -- when a step's graph is gone, so are its member tensors


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """Every member tensor that is made meanwhile."""
    known: list[weakref.ref[Any]] = []
    wrapper = tensor.make_wrapper

    def noted(*args: Any, **kwargs: Any) -> Any:
        out = wrapper(*args, **kwargs)
        known.append(weakref.ref(out))
        return out

    monkeypatch.setattr(tensor, "make_wrapper", noted)
    return known


STEPS: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "forward and backward": lambda stack, x: loss_of(stack, x).backward(),
    "forward without a backward": lambda stack, x: loss_of(stack, x),
    "no gradients": lambda stack, x: torch.no_grad()(stack)(x),
    "second derivative": lambda stack, x: torch.autograd.grad(
        sum(g.square().sum() for g in torch.autograd.grad(loss_of(stack, x), [*stack.parameters()], create_graph=True)),
        [*stack.parameters()],
    ),
}


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_no_member_tensor_outlives_a_step(step: str, reads: bool, made: list[weakref.ref[Any]]) -> None:
    stack = memberwise.stack(models_of(0, reads))
    x = numbers(5, 3, grad=False)
    STEPS[step](stack, x)
    assert made, "none was seen"
    gc.collect()  # once: a cycle through a node of autograd would take several
    alive = [ref() for ref in made if ref() is not None]
    assert not alive, f"{len(alive)} of {len(made)}"
