"""Several steps in one call: what as many calls compute, whether all at once or a few members at a time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import memberwise
from memberwise import optim
from memberwise.capture import compile, plan, step
from memberwise.capture.chunks import Chunks
from memberwise.capture.clock import Clock
from memberwise.capture.remembered import Remembered
from memberwise.construction import build, stack
from memberwise.errors import ArgumentError
from memberwise.trees import each
from tests.parity.test_capture import INPUTS, KINDS, training
from tests.parity.test_capture_chunks import Clock as PlannedClock
from tests.parity.test_capture_chunks import as_if_compiled
from tests.parity.twins import assert_same


class Worlds:
    """One in which steps are called one by one, eagerly, and one in which they are handed over together."""

    def __init__(self, make: Any, chunk: Any = 10**6, steps: int = 3) -> None:
        torch.manual_seed(0)
        self.eager = make()
        torch.manual_seed(0)
        self.world = make()
        self.function = compile(self.world.step, chunk=chunk, backend="fx", steps_per_call=steps)
        self.captured = self.function.captured
        self.streams = [torch.get_rng_state()] * 2

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The same steps in both, then everything is compared."""
        tensors = [arg.value if hasattr(arg, "value") else arg for arg in (*args, *kwargs.values())]
        torch.set_rng_state(self.streams[0])
        alone = []
        for k in range(len(tensors[0])):
            own = [each(arg.value[k], arg.dim) if hasattr(arg, "value") else arg[k] for arg in args]
            alone.append(self.eager.step(*own, **{name: arg[k] for name, arg in kwargs.items()}))
        self.streams[0] = torch.get_rng_state()
        torch.set_rng_state(self.streams[1])
        found = self.function(*args, **kwargs)
        self.streams[1] = torch.get_rng_state()
        expected = _stacked(alone)
        assert_same(found, expected, "returned", exact=False)
        assert_same(self.world, self.eager, "world", exact=False)
        assert torch.equal(*self.streams)
        return found


def _stacked(outs: list[Any]) -> Any:
    if isinstance(outs[0], dict):
        return {key: torch.stack([out[key].detach() for out in outs]) for key in outs[0]}
    return torch.stack([out.detach() for out in outs])


def _data(kind: str, steps: int) -> torch.Tensor:
    return torch.stack([INPUTS[kind][1]() for _ in range(steps)])


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps each replay of several had."""
    from memberwise.capture.program import Program

    counts: list[int] = []
    replay = Program.replay_several

    def noted(self: Program, steps: Any, several: Any) -> Any:
        counts.append(len(steps))
        return replay(self, steps, several)

    monkeypatch.setattr(Program, "replay_several", noted)
    return counts


@pytest.mark.parametrize("chunk", [10**6, 2, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind(kind: str, chunk: int, together: list[int]) -> None:
    """Dropout of each member's stream, statistics of BatchNorm, clipping, moments: all go on from step to step."""
    worlds = Worlds(lambda: training(kind, "adamw", members=4), chunk)
    for steps in (3, 3, 3, 2, 1):
        worlds.call(_data(kind, steps))
    assert together == [3, 3, 2]


@pytest.mark.parametrize("chunk", [10**6, 2])
def test_draws_of_the_global_stream(chunk: int, together: list[int]) -> None:
    worlds = Worlds(lambda: training("cnn", "sgd", members=4, seeded=False), chunk)
    for _ in range(3):
        worlds.call(_data("cnn", 3))
    assert together == [3, 3]


def test_what_is_set_between_calls() -> None:
    worlds = Worlds(lambda: training("mlp", "sgd"), 1)
    for value in (0.1, 0.2, [0.1, 0.2, 0.3]):
        for world in (worlds.eager, worlds.world):
            world.opt.param_groups[0].update(lr=value)
        worlds.call(_data("mlp", 3))
    for world in (worlds.eager, worlds.world):
        world.stack.eval()
        world.rescale(2.0)
    for _ in range(2):
        worlds.call(_data("mlp", 4))


@pytest.mark.parametrize("marked", [True, False])
def test_data_of_each_members_own(marked: bool, together: list[int]) -> None:
    def make() -> SimpleNamespace:
        net = stack([nn.Linear(3, 2).double() for _ in range(4)])
        opt = optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

        def step(x: Any, *, target: torch.Tensor) -> torch.Tensor:
            opt.zero_grad()
            out = net(x) if marked else memberwise.vmap(lambda model, x: model(x), (0, 0))(net, x)
            losses = (out - target).square().mean((1, 2))
            losses.sum().backward()
            opt.step()
            return losses

        return SimpleNamespace(step=step, net=net, opt=opt)

    worlds = Worlds(make, 1)
    for _ in range(3):
        x = torch.randn(3, 5, 4, 6, dtype=torch.float64) if marked else torch.randn(3, 4, 5, 6, dtype=torch.float64)
        x = x[..., :3].contiguous()
        worlds.call(each(x, 1) if marked else x, target=torch.randn(3, 5, 2, dtype=torch.float64))
    assert together == [3, 3]


def _carrying(kind: str) -> Any:
    """Steps that leave something which the next finds elsewhere than in memory that is written."""

    def make() -> SimpleNamespace:
        net = build(lambda: nn.Linear(3, 1), seeds=range(3), dtype=torch.float64)
        opt = optim.SGD(net.parameters(), lr=0.1)
        chance = torch.ones(3, dtype=torch.float64)
        world = SimpleNamespace(net=net, opt=opt, mean=torch.zeros(3, dtype=torch.float64), chance=chance)

        def step(x: torch.Tensor) -> torch.Tensor:
            if kind != "gradients":
                opt.zero_grad()
            losses = memberwise.vmap(lambda model, x: model(x).square().mean(), (0, None))(net, x)
            losses.sum().backward()
            opt.step()
            if kind == "a place":
                world.mean = 0.9 * world.mean + losses.detach()
            if kind == "a draw":
                losses = losses + torch.bernoulli(world.chance)
                world.chance.mul_(0.5)
            return losses

        world.step = step
        return world

    return make


@pytest.mark.parametrize("kind", ["a place", "gradients", "a draw"])
def test_what_is_carried_otherwise_goes_step_by_step(kind: str, together: list[int]) -> None:
    worlds = Worlds(_carrying(kind))
    for _ in range(3):
        worlds.call(torch.randn(3, 4, 3, dtype=torch.float64))
    assert not together
    assert worlds.captured.replayed > 3


def test_a_refused_step_runs_as_often() -> None:
    calls = []
    function = compile(lambda x: (calls.append(float(x.sum())), x + 1)[1], backend="fx", steps_per_call=2)
    with pytest.warns(UserWarning, match="MW501"):
        for _ in range(4):
            assert torch.equal(function(torch.arange(2.0)), torch.tensor([1.0, 2.0]))
    assert calls == [0.0, 1.0] * 4


@pytest.mark.parametrize("args", [(), (3,), (torch.ones(2), torch.ones(3)), (torch.ones(()),), (torch.ones(0, 2),)])
def test_data_for_each_step_is_asked_for(args: Any) -> None:
    function = compile(lambda *args: None, steps_per_call=2)
    with pytest.raises(ArgumentError, match="MW506"):
        function(*args)


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, None])
def test_a_number_of_steps_is_asked_for(steps: Any) -> None:
    with pytest.raises(ArgumentError, match="MW504"):
        compile(lambda x: x, steps_per_call=steps)


@pytest.mark.parametrize("chunk", [10**6, 1, 3])
@pytest.mark.chooses
def test_gradients_of_earlier_steps_are_not_kept(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    world = training("mlp", "sgd", members=4)
    captured = compile(world.step, chunk=chunk, backend="fx", steps_per_call=3).captured
    x = INPUTS["mlp"][1]()
    for _ in range(3):
        captured((x,), {})
    program, made = captured.programs[0], []
    assert program.fleeting == {output for _, output in program.grads_out} != set()
    real = step.several
    monkeypatch.setattr(step, "several", lambda *args: made.append(real(*args)) or made[-1])
    captured.several([((x,), {})] * 3)
    (steps,) = made
    for output in program.fleeting:
        first, second, last = (found[output] for found in steps)
        assert (first is second is last) if isinstance(program.run, Chunks) else (first is second is None)
        assert last is not None
    returned = {*range(len(steps[0]))} - program.fleeting
    assert all(steps[0][output] is not steps[2][output] for output in returned)


def test_a_gradient_that_is_returned_is_kept_of_each_step() -> None:
    model = stack([nn.Linear(3, 1) for _ in range(4)])

    def step(x: torch.Tensor) -> torch.Tensor:
        model.zero_grad()
        model(x).square().sum().backward()
        return model.weight.grad

    ours, x = compile(step, chunk=2, backend="fx", steps_per_call=3), torch.randn(3, 4, 5, 3)
    for _ in range(4):
        found = ours(x)
    assert_same(found, torch.stack([step(one).clone() for one in x]), "gradients", exact=False)
    assert ours.captured.programs[0].fleeting != set()  # the bias's


def test_candidates_are_timed_on_as_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Remembered, "get", lambda _: None)
    monkeypatch.setattr(Remembered, "put", lambda *_: None)
    captured = compile(training("mlp", "sgd", members=4).step, backend="fx", steps_per_call=5).captured
    as_if_compiled(captured, monkeypatch)
    counts: list[int] = []

    def clock(run: Any, steps: Any, *rest: Any) -> Clock:
        counts.append(len(steps))
        return Clock(run, steps, *rest)

    monkeypatch.setattr(plan, "Clock", clock)
    monkeypatch.setattr(plan, "TRIAL", 0.0)
    for k in range(3):
        captured((INPUTS["mlp"][1]() + k,), {})
    assert {*counts} == {5}
    assert captured.plans


@pytest.mark.chooses
@pytest.mark.parametrize(("long", "choice"), [(10**6, "one at a time"), (10, "8 at a time")])
def test_small_chunks_come_first_but_of_a_long_recording_the_fastest(
    long: int, choice: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """Of a long one a single candidate is compiled: what is fastest operation by operation."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(plan, "LONG", long)
    monkeypatch.setattr(plan, "BUDGET", -1.0)
    monkeypatch.setattr(plan.Planner, "_seconds", PlannedClock(whole=1.0, of_1=0.8, of_8=0.5))
    captured = compile(training("mlp", "sgd", members=17).step, backend="fx", steps_per_call=2).captured
    as_if_compiled(captured, monkeypatch)
    for k in range(3):
        captured((INPUTS["mlp"][1]() + k,), {})
    assert captured.plans[0].startswith(f"{choice}: ")
