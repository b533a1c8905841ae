"""Stacks next to the models they are made of, each model run alone in a plain loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import memberwise
from memberwise.testing.tolerance import assert_equal
from tests.parity.loops import cotangent


class Net(nn.Module):
    """What most tests need: a layer, running statistics, a buffer that is assigned anew, dropout, an attribute."""

    def __init__(self, p: float = 0.4) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(p)
        self.last = nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(4), persistent=False)
        self.mark = "as made"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.drop(self.norm(self.first(x)).relu())
        self.calls = self.calls + 1
        self.mean.lerp_(hidden.detach().mean(0), 0.5)
        return self.last(hidden) * self.scale


class Branches(nn.Module):
    """A trunk that members may share, and a head of their own."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.trunk(x).tanh())


def nets(count: int, p: float = 0.0, dtype: torch.dtype = torch.float64) -> list[Net]:
    """Models with values of their own, buffers included."""
    models = []
    with torch.random.fork_rng(devices=[]):
        for i in range(count):
            torch.manual_seed(i)
            model = Net(p).to(dtype)
            model.norm.running_mean.normal_()
            models.append(model)
    return models


def branches(count: int) -> list[Branches]:
    """Models that share one trunk."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        trunk = nn.Linear(3, 4).double()
        return [Branches(trunk).double() for _ in range(count)]


def inputs(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Reproducible inputs that require a gradient."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).requires_grad_()


def run_alone(models: Sequence[nn.Module], call: Callable[[nn.Module, int], torch.Tensor]) -> torch.Tensor:
    """Each model forward, then backward, one after another: `call(model, i)`. Answers their outputs, M first."""
    outs = []
    for i, model in enumerate(models):
        out = call(model, i)
        if out.requires_grad:
            out.backward(cotangent(out.new_empty(len(models), *out.shape), 0)[i])
        outs.append(out.detach())
    return torch.stack(outs)


def backward(out: torch.Tensor) -> None:
    """Backward from the outputs of a stack, with the gradients that `run_alone` gives its models."""
    out.backward(cotangent(out, 0))


def assert_same_state(stack: memberwise.Stack, models: Sequence[nn.Module], gradients: bool = True) -> None:
    """Parameters, gradients (unless told not to look) and buffers of the stack are those of the models."""
    shared = {name for name, p in stack.named_parameters() if getattr(p, "_memberwise_shared", False)}
    assert [name for name, _ in stack.named_parameters()] == [name for name, _ in models[0].named_parameters()]
    for name, p in stack.named_parameters():
        if name in shared:
            assert_equal(p.detach(), models[0].get_parameter(name).detach(), name)
            if gradients:
                assert_same_gradient(name, p.grad, [models[0].get_parameter(name).grad])
            continue
        own = [model.get_parameter(name) for model in models]
        assert_equal(p.detach(), torch.stack([q.detach() for q in own]), name)
        if gradients:
            assert_same_gradient(name, p.grad, [q.grad for q in own])
    for name, buffer in stack.named_buffers():
        assert_equal(buffer, torch.stack([model.get_buffer(name) for model in models]), name)


def assert_same_gradient(name: str, ours: Any, theirs: list[Any]) -> None:
    """One gradient; a model without one counts as zeros."""
    assert any(grad is not None for grad in theirs), f"the loop has no gradient of {name}"
    if ours is None:
        assert all(grad is None or not grad.any() for grad in theirs), f"{name} has no gradient"
        return
    parts = [ours] if len(theirs) == 1 and ours.shape == getattr(theirs[0], "shape", None) else [*ours]
    for part, grad in zip(parts, theirs, strict=True):
        assert_equal(part, torch.zeros_like(part) if grad is None else grad, f"gradient of {name}")


def twins(models: Sequence[nn.Module]) -> list[Any]:
    """Copies of the models, to be run alone."""
    return [copy.deepcopy(model) for model in models]
