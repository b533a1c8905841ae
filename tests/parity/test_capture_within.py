"""A step within some memory: parts of the members, one after the other, are the step for all of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx, nn

import memberwise
from memberwise import optim
from memberwise.capture import compile, rehearsal
from memberwise.capture.cache import structure
from memberwise.capture.step import CapturedStep
from memberwise.capture.within import Within
from memberwise.construction import build
from memberwise.errors import ArgumentError, StackWarning
from memberwise.metering import Meter
from memberwise.trees import each
from tests.parity.test_capture import INPUTS, KINDS, training
from tests.parity.twins import Twins

BYTES = 1000
"""What a member is said to take, where parts of so many are wanted."""


@pytest.fixture
def priced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A member takes `BYTES`."""
    whole = rehearsal.Rehearsals.__post_init__

    def init(self: rehearsal.Rehearsals) -> None:
        whole(self)
        self.per_member, self.base = BYTES, 0

    monkeypatch.setattr(rehearsal.Rehearsals, "__post_init__", init)


def twins_in_parts(make: Callable[[], SimpleNamespace], size: int) -> Twins:
    """One world runs so many members at a time."""
    twins = Twins(make, exact=False)
    within = Within(twins.captured, BYTES * size)
    twins.function = lambda *args, **kwargs: within(args, kwargs)
    return twins


@pytest.mark.usefixtures("priced")
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_training_in_parts(kind: str, size: int) -> None:
    twins = twins_in_parts(lambda: training(kind, "adamw", members=5), size)
    for _ in range(6):
        twins.call(INPUTS[kind][1]())
    assert twins.captured.plans[0].startswith(f"parts of {size}")
    assert twins.captured.replayed, [refusal.sentence() for refusal in twins.captured.refusals]


@pytest.mark.usefixtures("priced")
@pytest.mark.parametrize("optimizer", ["adam", "sgd", "plain sgd"])
def test_each_optimizer_and_streams_that_members_share(optimizer: str) -> None:
    twins = twins_in_parts(lambda: training("cnn", optimizer, members=4, seeded=False), 2)
    with pytest.warns(StackWarning, match="MW505"):  # members draw from one stream, one after the other
        twins.call(INPUTS["cnn"][1]())
    twins = twins_in_parts(lambda: training("mlp", optimizer, members=4), 2)
    for value in (0.1, [0.1, 0.0, 0.2, 0.3]):
        for _ in range(3):
            twins.call(INPUTS["mlp"][1]())
        twins.both(lambda world, value=value: world.opt.param_groups[0].update(lr=value))
        twins.call(INPUTS["mlp"][1]())


@pytest.mark.usefixtures("priced")
def test_what_changes_on_the_way_counts() -> None:
    twins = twins_in_parts(lambda: training("mlp", "adamw", members=4), 2)
    x = INPUTS["mlp"][1]()
    changes: list[Callable[[SimpleNamespace], Any]] = [
        lambda world: world.stack.eval(),
        lambda world: world.opt.load_state_dict(world.opt.state_dict()),
        lambda world: world.stack.layers[0].weight.requires_grad_(False),
        lambda world: world.stack.train(),
    ]
    for change in changes:
        for batch in (x, x, x[:3]):
            twins.call(batch)
        twins.both(change)
    twins.call(x)


def _accumulating() -> SimpleNamespace:
    stack = build(lambda: nn.Linear(3, 2), seeds=range(4), dtype=torch.float64)
    opt = optim.SGD(stack.parameters(), lr=0.1)

    def step(x: Any, update: bool) -> torch.Tensor:
        losses = memberwise.vmap(lambda model, x: model(x).square().mean(), (0, 0))(stack, getattr(x, "value", x))
        losses.sum().backward()
        if update:
            opt.step()
            opt.zero_grad()
        return losses.detach()

    return SimpleNamespace(step=step, stack=stack, opt=opt)


@pytest.mark.usefixtures("priced")
@pytest.mark.parametrize("mark", [each, lambda x: x])
def test_gradients_that_add_up_and_data_of_each(mark: Callable[[torch.Tensor], Any]) -> None:
    twins = twins_in_parts(_accumulating, 3)
    for k in range(9):
        twins.call(mark(torch.randn(4, 5, 3, dtype=torch.float64)), k % 3 == 2)


UNFIT: dict[str, Callable[[Any, Any], Any]] = {
    "a mean over members": lambda stack, x: stack(x).square().mean(),
    "members in the loss": lambda stack, x: (stack(x) - stack(x).mean(0)).square().mean((1, 2)),
}


@pytest.mark.usefixtures("priced")
@pytest.mark.parametrize("name", UNFIT)
def test_members_that_are_not_apart_run_at_once(name: str) -> None:
    def make() -> SimpleNamespace:
        stack = build(lambda: nn.Linear(3, 2), seeds=range(4), dtype=torch.float64)

        def step(x: torch.Tensor) -> torch.Tensor:
            losses = UNFIT[name](stack, x)
            stack.zero_grad()
            losses.sum().backward()
            return losses.detach()

        return SimpleNamespace(step=step, stack=stack)

    twins = twins_in_parts(make, 2)
    with pytest.warns(StackWarning, match=r"whatever memory that takes.*MW505"):
        for _ in range(3):
            twins.call(torch.randn(5, 3, dtype=torch.float64))
    assert not twins.captured.plans


def test_a_step_that_no_recording_can_stand_on_runs_at_once() -> None:
    """It reaches an iterator, which is refused before the step is rehearsed."""

    def make() -> SimpleNamespace:
        stack, scales = build(lambda: nn.Linear(3, 2), seeds=range(4), dtype=torch.float64), iter([1.0, 2.0, 3.0])
        return SimpleNamespace(step=lambda x: (stack(x) * next(scales)).detach(), stack=stack)

    twins = twins_in_parts(make, 2)
    with pytest.warns(StackWarning, match=r"whatever memory that takes.*MW505"):
        for _ in range(3):
            twins.call(torch.randn(5, 3, dtype=torch.float64))


def test_a_member_that_does_not_fit_is_told_before_anything_runs() -> None:
    world = training("mlp", "adamw")
    before = {name: tensor.clone() for name, tensor in world.stack.state_dict().items()}
    step = compile(world.step, backend="fx", max_memory=100)
    with pytest.raises(ArgumentError, match=r"max_memory: expected at least .* KiB.*found 100 B.*MW507"):
        step(INPUTS["mlp"][1]())
    assert all(torch.equal(before[name], tensor) for name, tensor in world.stack.state_dict().items())
    assert all(parameter.grad is None for parameter in world.stack.parameters())


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "2 GiB"])
def test_wrong_bounds(wrong: Any) -> None:
    with pytest.raises(ArgumentError, match=r"max_memory: expected a number of bytes.*MW504"):
        compile(lambda: None, max_memory=wrong)


def test_parts_take_what_was_said() -> None:
    """Counted below the step itself, in what operations hold at one time."""
    stack = build(lambda: nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 1)), seeds=range(32))

    def step(x: torch.Tensor) -> torch.Tensor:
        losses = stack(x).square().mean((1, 2))
        losses.sum().backward()
        return losses.detach()

    x = torch.randn(256, 8)
    with Meter() as meter:
        step(x)
    stack.zero_grad()
    captured = CapturedStep(step, backend="fx")
    within = Within(captured, meter.most // 4)
    assert within((x,), {}).shape == (32,)
    assert 4 <= len(within.partings[0].parts) <= 5
    assert Within(captured, int(1.1 * meter.most))((x,), {}).shape == (32,)
    assert len(captured.plans) == 1, "all of them fit"


def test_what_is_compiled_serves_all_parts() -> None:
    """They are views that begin elsewhere in the same storage."""
    graph = fx.Graph()
    graph.output((graph.call_function(torch.ops.aten.exp.default, (graph.placeholder("x"),)),))
    module, state = fx.GraphModule({}, graph), torch.ones(5, 3)
    assert structure(module, [state[:2]]) == structure(module, [state[2:4]]) != structure(module, [state[4:]])


PROGRAM = """
import re, sys, torch, memberwise

def most():  # (what `resource` tells is never less than what the parent process had)
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

stack = memberwise.build(lambda: torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(16)]), seeds=range(32))
opt = memberwise.optim.SGD(stack.parameters(), lr=0.1)

def step(x):
    opt.zero_grad()
    losses = stack(x).square().mean((1, 2))
    losses.sum().backward()
    opt.step()
    return losses

step = memberwise.compile(step, backend="fx", max_memory=int(sys.argv[1]) or None)
x = torch.randn(2048, 64)
stack(x[:1])
before = most()
for _ in range(4):
    step(x)
print(most() - before)
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="tells of memory on Linux")
def test_the_process_takes_less_memory() -> None:
    """A step for all holds more than half a gigabyte of activations."""
    taken = [
        int(subprocess.run([sys.executable, "-c", PROGRAM, str(most)], capture_output=True, check=True).stdout)
        for most in (0, 100 * 2**20)
    ]
    assert taken[0] > 500 * 2**10, taken
    assert taken[1] < 250 * 2**10, taken
