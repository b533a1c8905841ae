"""A stacked step holds what M lone steps, held together, hold: counted in bytes, by torch's own allocator."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import memberwise
from memberwise.engine.tensor import MemberTensor
from memberwise.testing.tolerance import assert_equal

ELSEWHERE = os.environ.get("MEMBERWISE_DEVICE", "cpu") != "cpu"
pytestmark = [
    pytest.mark.filterwarnings("ignore::memberwise.errors.StackWarning"),
    pytest.mark.skipif(ELSEWHERE, reason="the profiler counts another device's memory in another way"),
]
MEMBERS = 8
MOST = 1.1


class Attends(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.attend, self.last = nn.MultiheadAttention(32, 4, dropout=dropout, batch_first=True), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.attend(x, x, x, need_weights=False)[0])  # type: ignore[no-any-return] # a tensor


def perceptron() -> nn.Module:
    hidden = [part for _ in range(2) for part in (nn.Linear(64, 64), nn.ReLU())]
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), *hidden, nn.Dropout(0.1), nn.Linear(64, 10))


def convolutions() -> nn.Module:
    def block(ins: int, outs: int) -> list[nn.Module]:
        return [nn.Conv2d(ins, outs, 3, padding=1), nn.BatchNorm2d(outs), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(*block(3, 8), *block(8, 16), *block(16, 32), nn.Flatten(), nn.Linear(128, 10))


def grouped() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 8, 3))


def normed() -> nn.Module:
    """Deep enough that the copies of one layer, which its grouped convolution reads, are little of what a step holds:
    where torch's lone kernels pad no channels (AVX2), they show."""

    def block() -> list[nn.Module]:
        return [nn.InstanceNorm2d(8, affine=True), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]

    return nn.Sequential(nn.Conv2d(3, 8, 3), *(part for _ in range(5) for part in block()))


def upsampled() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(8, 8, 3))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "a perceptron with dropout": (perceptron, (64, 32)),
    "convolutions and batch norm": (convolutions, (4, 3, 16, 16)),
    "convolutions and group norm": (grouped, (4, 3, 12, 12)),
    "layer norms": (lambda: nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 64)), (64, 64)),
    "a transformer's layer": (lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), (4, 12, 32)),
    "attention": (lambda: Attends(0.0), (4, 12, 32)),
    "attention with dropout": (lambda: Attends(0.1), (4, 12, 32)),
    "an LSTM": (lambda: nn.LSTM(16, 32, 2, batch_first=True), (4, 12, 16)),
    "a GRU": (lambda: nn.GRU(16, 32, 2, batch_first=True), (4, 12, 16)),
    "an RNN": (lambda: nn.RNN(16, 32, 2, batch_first=True), (4, 12, 16)),
    "instance norm": (normed, (4, 3, 12, 12)),
    "upsampling between convolutions": (upsampled, (4, 3, 12, 12)),
}


def bytes_of(run: Callable[[], Any]) -> tuple[int, int]:
    """The most bytes that lived at one time while it ran, of those it allocated; and how many of them still do."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        kept = run()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    del kept
    return most, live


def loss_of(model: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
    out = model(x)
    return (out[0] if isinstance(out, tuple) else out).square().mean()


def step(forward: Callable[[], torch.Tensor], model: Any) -> None:
    forward().sum().backward()
    model.zero_grad()


@pytest.mark.parametrize("name", CASES)
def test_a_step_holds_what_the_members_steps_hold_together(name: str) -> None:
    make, shape = CASES[name]
    lone, x = make(), torch.randn(shape)
    stack = memberwise.stack([copy.deepcopy(lone) for _ in range(MEMBERS)])
    mapped = memberwise.vmap(loss_of, in_dims=(0, None), randomness="different")

    def alone() -> torch.Tensor:
        return loss_of(lone, x)

    def stacked() -> torch.Tensor:
        return mapped(stack, x)  # type: ignore[no-any-return] # a tensor

    for forward, model in ((alone, lone), (stacked, stack)):
        step(forward, model)  # what is made once, and kept: plans, caches
    lone_most, lone_held = bytes_of(lambda: step(alone, lone))[0], bytes_of(alone)[1]
    most, held = bytes_of(lambda: step(stacked, stack))[0], bytes_of(stacked)[1]

    assert lone_held > 0
    assert held <= MOST * MEMBERS * lone_held
    assert most <= MOST * MEMBERS * lone_most


def test_the_count_sees_what_is_held_and_what_was() -> None:
    kept: list[torch.Tensor] = []
    most, held = bytes_of(lambda: kept.append(torch.ones(100, 100) + 1))
    assert held == 40_000
    assert 80_000 <= most < 81_000


@pytest.mark.usefixtures("composites")
@pytest.mark.parametrize("what", ["left as it lies", "flattened after", "written after", "a view of it written"])
def test_what_autograd_keeps_of_a_convolutions_result_is_no_copy(what: str) -> None:
    """It lies with the members among the channels, and so does what is kept of it, until someone takes a view."""
    seen: list[bool] = []

    def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        out = torch.relu(model(x))
        kept = out.detach()
        if isinstance(out, MemberTensor):
            seen.append(out._inner.data_ptr() == kept._inner.data_ptr() and not out._inner.is_contiguous())
        if what == "flattened after":
            return (out.flatten(1) * kept.flatten(1)).sum()
        if what == "written after":
            return (kept.mul_(2).sum() + model.bias.sum() + kept).sum() + out.detach().sum()
        if what == "a view of it written":
            kept.flatten()[::2].mul_(3)
            return out.detach().square().sum() + model.bias.sum()
        return out.square().mean()

    models = [nn.Conv2d(3, 8, 3).double() for _ in range(3)]
    stack, x = memberwise.stack(copy.deepcopy(models)), torch.randn(4, 3, 6, 6, dtype=torch.float64)
    found = memberwise.vmap(loss, in_dims=(0, None))(stack, x)
    alone = [loss(model, x) for model in models]
    assert_equal(found.detach(), torch.stack(alone).detach(), what)
    found.sum().backward()
    for i, (model, one) in enumerate(zip(models, alone, strict=True)):
        one.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                assert_equal(stack.get_parameter(name).grad[i], parameter.grad, f"member {i}: {name}")
    assert seen and all(seen)
