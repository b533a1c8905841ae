"""Random mixtures of architectures, settings and modes: a group, and a stack of each kind, equal the loop."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import memberwise
from memberwise.errors import StackWarning
from memberwise.testing.tolerance import assert_equal

RATES = st.sampled_from((0.0, 0.1, 0.5, 1.0))
NUMBERS = st.sampled_from((0.01, 0.1, 0.5, 2.0))
ACTIVATIONS = st.sampled_from(("relu", "tanh", "leaky", "elu", "softplus"))


class Net(nn.Module):
    """A few layers with settings of every kind: rates, eps, a factor, a count, a flag, a text, a function."""

    def __init__(self, width: int, act: str, rate: float, eps: float, factor: float, repeats: int, kind: str) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, width), nn.Linear(width, 2)
        self.norm = {"batch": nn.BatchNorm1d(width, eps=eps, momentum=factor / 4), "layer": nn.LayerNorm(width, eps)}[
            kind if kind in ("batch", "layer") else "layer"
        ]
        self.drop = nn.Dropout(rate)
        self.act: Any = {
            "relu": nn.ReLU(),
            "tanh": nn.Tanh(),
            "leaky": nn.LeakyReLU(factor),
            "elu": nn.ELU(factor),
            "softplus": nn.Softplus(factor),
        }[act]
        self.factor, self.repeats, self.text = factor, repeats, kind
        self.flag = factor > 0.2
        self.limit = None if factor > 1 else factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.drop(self.norm(self.first(x)))
        for _ in range(self.repeats):
            hidden = self.act(hidden) * self.factor
        if self.flag:
            hidden = hidden + self.factor
        if self.limit is not None:
            hidden = hidden / (1 + self.limit)
        return self.last(hidden)


@st.composite
def members(draw: Any, shared: bool) -> list[Net]:
    """Two to five models; `shared`: of one architecture."""
    fixed = {"width": draw(st.integers(2, 3)), "kind": draw(st.sampled_from(("batch", "layer")))} if shared else {}
    made = []
    for seed in range(draw(st.integers(2, 5))):
        options = {
            "width": st.integers(2, 3),
            "act": ACTIVATIONS,
            "rate": RATES,
            "eps": NUMBERS,
            "factor": NUMBERS,
            "repeats": st.integers(1, 2),
            "kind": st.sampled_from(("batch", "layer", "other")),
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Net(**{name: draw(choice) for name, choice in options.items()} | fixed).double()
        made.append(model.train(draw(st.booleans())))
    return made


def check(made: Any, models: list[Net]) -> None:
    """Outputs, gradients, buffers and streams, over two calls."""
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    made.generators, own = ([torch.Generator().manual_seed(i) for i in range(len(models))] for _ in range(2))
    for _ in range(2):
        out = made(x)
        out.sin().sum().backward()
        expected = []
        for model, stream in zip(models, own, strict=True):
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(stream.get_state())
                expected.append(model(x))
                stream.set_state(torch.get_rng_state())
            expected[-1].sin().sum().backward()
        assert_equal(out.detach(), torch.stack(expected).detach(), "output")
    for mine, theirs in zip(made.unstack(), models, strict=True):
        for name, p in mine.named_parameters():
            assert_equal(p.grad, theirs.get_parameter(name).grad, f"gradient of {name}")
        for name, buffer in mine.named_buffers():
            assert_equal(buffer, theirs.get_buffer(name), name)
        assert (mine.drop.p, mine.factor, mine.text, mine.limit) == (
            theirs.drop.p,
            theirs.factor,
            theirs.text,
            theirs.limit,
        )
    for mine, theirs in zip(made.generators, own, strict=True):
        assert torch.equal(mine.get_state(), theirs.get_state())


@settings(max_examples=8, deadline=None)
@given(members(shared=False))
def test_any_group_equals_its_members(models: list[Net]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StackWarning)
        check(memberwise.group(models), copy.deepcopy(models))


@settings(max_examples=8, deadline=None)
@given(members(shared=True))
def test_any_stack_of_members_that_differ_equals_them(models: list[Net]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StackWarning)
        check(memberwise.stack(models), copy.deepcopy(models))
