"""A stack goes through any sequence of what modules go through, next to a list of models that does the same."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import memberwise
from memberwise import each
from memberwise.testing.tolerance import assert_equal

Pair = tuple[memberwise.Stack, list[Any]]


class Model(nn.Module):
    """Parameters, statistics, a buffer that is assigned, an attribute that is carried, a child put in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 3), nn.Linear(3, 2)])
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.kept = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.layers[0](x)).tanh()
        self.calls = self.calls + 1
        self.kept = hidden.detach() if self.kept is None else 0.5 * self.kept.to(x.dtype) + hidden.detach()
        return self.layers[1](hidden + self.kept)


def made(count: int) -> list[Model]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(count)
        return [Model().double() for _ in range(count)]


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dtype_of(models: list[Any]) -> torch.dtype:
    return models[0].layers[0].weight.dtype


# -- what may happen to both


def call(pair: Pair, seed: int) -> Pair:
    """Forward and backward on a shared input."""
    stack, models = pair
    x = numbers(seed, 4, 2).to(dtype_of(models))
    out = stack(x)
    out.square().sum().backward()
    for i, model in enumerate(models):
        own = model(x)
        own.square().sum().backward()
        assert_equal(out[i].detach(), own.detach(), "output")
    return pair


def call_each(pair: Pair, seed: int) -> Pair:
    """Forward alone, on an input of each member's own."""
    stack, models = pair
    x = numbers(seed, len(models), 4, 2).to(dtype_of(models))
    with torch.no_grad():
        out = stack(each(x))
        for i, model in enumerate(models):
            assert_equal(out[i], model(x[i]), "output")
    return pair


def step(pair: Pair, seed: int) -> Pair:
    """A step along the gradients."""
    stack, models = pair
    for module in (stack, *models):
        torch.optim.SGD(module.parameters(), lr=0.01).step()
    return pair


def clear(pair: Pair, seed: int) -> Pair:
    stack, models = pair
    for module in (stack, *models):
        module.zero_grad()
    return pair


def select(pair: Pair, seed: int) -> Pair:
    """Some members, some of them twice."""
    stack, models = pair
    chosen = torch.randint(len(models), (3,), generator=torch.Generator().manual_seed(seed)).tolist()
    twins = []
    for i in chosen:
        twins.append(copy.deepcopy(models[i]))
        for p, q in zip(twins[-1].parameters(), models[i].parameters(), strict=True):
            p.grad = None if q.grad is None else q.grad.clone()
    return stack.select(chosen), twins


def modes(pair: Pair, seed: int) -> Pair:
    """Training or evaluation mode of all members, or of some."""
    stack, models = pair
    mode, some = bool(seed & 1), [i for i in range(len(models)) if seed >> (i + 2) & 1]
    if seed & 2 or not some:
        stack.train(mode)
        some = range(len(models))
    else:
        stack.train(mode, members=some)
    for i in some:
        models[i].train(mode)
    return pair


def cast(pair: Pair, seed: int) -> Pair:
    """To float32, and never back: what was rounded would be compared as if it were exact."""
    stack, models = pair
    for module in (stack, *models):
        module.to(torch.float32 if seed & 1 else dtype_of(models))
    return pair


def load(pair: Pair, seed: int) -> Pair:
    """The state of other members, by load_state_dict."""
    stack, models = pair
    others = made(len(models))
    stack.load_state_dict(memberwise.stack(others).state_dict(), assign=False)
    for model, other in zip(models, others, strict=True):
        model.load_state_dict(other.state_dict())
    return pair


def copied(pair: Pair, seed: int) -> Pair:
    """A deep copy (in which gradients are not), or a pickle (in which they are not either)."""
    stack, models = pair
    clear(pair, seed)
    return (copy.deepcopy(stack) if seed & 1 else pickle.loads(pickle.dumps(stack))), models


def restacked(pair: Pair, seed: int) -> Pair:
    """Taken apart and stacked again; members in different modes cannot be."""
    stack, models = pair
    if len({model.training for model in models}) > 1:
        return pair
    clear(pair, seed)
    return memberwise.stack(stack.unstack()), models


def member_call(pair: Pair, seed: int) -> Pair:
    """One live member runs, and is changed; it forgets what it leaves in attributes."""
    stack, models = pair
    i, x = seed % len(models), numbers(seed, 4, 2).to(dtype_of(models))
    kept = models[i].kept
    stack[i](x).square().sum().backward()
    models[i](x).square().sum().backward()
    models[i].kept = kept
    return pair


ACTIONS = [call, call_each, step, clear, select, modes, cast, load, copied, restacked, member_call]


def same(pair: Pair) -> None:
    """Parameters, gradients, buffers, modes and carried attributes are the models'."""
    stack, models = pair
    assert len(stack) == len(models)
    for name, p in stack.named_parameters():
        own = [model.get_parameter(name) for model in models]
        assert_equal(p.detach(), torch.stack([q.detach() for q in own]), name)
        grads = [torch.zeros_like(q) if q.grad is None else q.grad for q in own]
        assert_equal(torch.zeros_like(p) if p.grad is None else p.grad, torch.stack(grads), f"gradient of {name}")
    for name, buffer in stack.named_buffers():
        assert_equal(buffer, torch.stack([model.get_buffer(name) for model in models]), name)
    assert [member.training for member in stack] == [model.training for model in models]
    if models[0].kept is not None:
        assert_equal(stack.kept, torch.stack([model.kept for model in models]), "attribute")


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 4),
    actions=st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 63)), min_size=1, max_size=8),
)
def test_any_sequence(size: int, actions: list[tuple[Any, int]]) -> None:
    models = made(size)
    pair: Pair = memberwise.stack(models), models
    for action, seed in actions:
        pair = action(pair, seed)
        same(pair)
    pair = call(pair, 1)
    same(pair)
    assert any(p.grad.abs().sum() > 0 for p in pair[0].parameters())
