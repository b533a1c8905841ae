"""Chunks of members: the same training as all at once, and refused where members depend on each other."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import memberwise
from memberwise import optim
from memberwise.capture import CapturedStep, chunker, chunks, compile, plan
from memberwise.capture.remembered import Candidate, Plan, Remembered
from memberwise.construction import build, stack
from memberwise.trees import each
from tests.parity.test_capture import INPUTS, training
from tests.parity.twins import Twins, assert_same


def chunked(make: Any, chunk: Any, *inputs: Any, steps: int = 6) -> Any:
    """Train a world in chunks and one all at once, on the same inputs; the captured step of the chunks."""
    torch.manual_seed(0)
    whole = make()
    torch.manual_seed(0)
    parts = make()
    steppers = compile(whole.step, chunk=10**6, backend="fx"), compile(parts.step, chunk=chunk, backend="fx")
    streams = [torch.get_rng_state()] * 2
    for _ in range(steps):
        outs = []
        for index, step in enumerate(steppers):
            torch.set_rng_state(streams[index])
            outs.append(step(*(x() if callable(x) else x for x in inputs)))
            streams[index] = torch.get_rng_state()
        assert_same(outs[1], outs[0], "returned", exact=False)
        assert_same(parts, whole, "world", exact=False)
        assert torch.equal(*streams)
    assert steppers[1].captured.replayed >= steps - 2
    return steppers[1].captured


@pytest.mark.parametrize("chunk", [1, 2, 3, 4])
@pytest.mark.parametrize("seeded", [True, False])
def test_each_size_trains_the_same(chunk: int, seeded: bool) -> None:
    x = INPUTS["mlp"][1]()
    captured = chunked(lambda: training("mlp", "adamw", members=5, seeded=seeded), chunk, x)
    assert captured.plans == [f"{chunk} at a time, as told"]


def test_the_programs_of_chunks_are_begun_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """That for those left over is generated while a compiler builds the first."""
    order: list[str] = []

    def begun(graph: Any, inputs: Any, how: Any) -> Any:
        order.append("begun")
        return lambda trial: order.append("ended") or graph.forward

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("memberwise.capture.cache._begun", begun)
    captured = compile(training("mlp", "adamw", members=5).step, chunk=2).captured
    for _ in range(3):
        captured((INPUTS["mlp"][1](),), {})
    assert order == ["begun", "begun", "ended", "ended"]
    assert captured.plans == ["2 at a time, as told"]


@pytest.mark.parametrize("kind", ["cnn", "transformer", "lstm"])
def test_each_kind_one_at_a_time(kind: str) -> None:
    x = INPUTS[kind][1]()
    captured = chunked(lambda: training(kind, "sgd"), 1, x, steps=4)
    assert captured.plans == ["1 at a time, as told"]


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("what", ["gradients", "an argument"])
def test_a_trial_leaves_alone_what_lies_elsewhere_in_each_call(chunk: int, what: str) -> None:
    """What the recording wrote to was in other memory than what the call that plans writes to."""

    def make() -> SimpleNamespace:
        net = build(lambda: nn.Linear(3, 2), seeds=range(4), dtype=torch.float64)

        def step(x: torch.Tensor, done: bool) -> torch.Tensor:
            losses = memberwise.vmap(lambda m, x: m(x).pow(2).mean(), (0, 0))(net, x)
            losses.sum().backward()
            if what == "an argument":
                x.mul_(2).add_(losses.detach()[:, None, None])
            if done:
                net.zero_grad()
            return losses.detach()

        return SimpleNamespace(step=step, net=net)

    twins = Twins(make, exact=False)
    twins.captured.chunk = chunk
    kept = []
    for k in range(9):
        x = torch.randn(4, 5, 3, dtype=torch.float64)
        twins.call(x, k % 3 == 2)
        kept.append(twins.world.net.weight.grad)  # its memory is not given to the next
    assert twins.captured.replayed >= 5


def _data(own: bool, marked: bool) -> tuple[Any, Any]:
    """A step with inputs of each member's own, in the arguments or marked with each()."""

    def make() -> SimpleNamespace:
        net = stack([nn.Linear(3, 2).double() for _ in range(4)])
        opt = optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

        def step(x: Any) -> torch.Tensor:
            opt.zero_grad()
            if marked:
                losses = net(x).pow(2).mean((1, 2))
            else:
                losses = memberwise.vmap(lambda m, x: m(x).pow(2).mean(), (0, 0 if own else None))(net, x)
            losses.sum().backward()
            opt.step()
            return losses

        return SimpleNamespace(step=step, net=net, opt=opt)

    shape = (4, 6, 3) if own else (4, 3)
    x = torch.randn(shape, dtype=torch.float64)
    if marked:
        return make, each(x.movedim(0, 1), 1) if own else x
    return make, x


@pytest.mark.parametrize("own", [True, False], ids=["own", "shared, a batch of M"])
@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("chunk", [1, 2])
def test_inputs(own: bool, marked: bool, chunk: int) -> None:
    make, x = _data(own, marked)
    assert chunked(make, chunk, x).plans == [f"{chunk} at a time, as told"]


def test_inputs_held_by_the_closure() -> None:
    def make() -> SimpleNamespace:
        net = stack([nn.Linear(3, 2).double() for _ in range(4)])
        opt = optim.SGD(net.parameters(), lr=0.1)
        xs = torch.linspace(-1, 1, 4 * 6 * 3, dtype=torch.float64).reshape(4, 6, 3)

        def step() -> torch.Tensor:
            opt.zero_grad()
            losses = memberwise.vmap(lambda m, x: m(x).pow(2).mean())(net, xs)
            losses.sum().backward()
            opt.step()
            return losses

        return SimpleNamespace(step=step, net=net)

    assert chunked(make, 1).plans == ["1 at a time, as told"]


def _dependent(kind: str) -> Any:
    def make() -> SimpleNamespace:
        if kind == "shared":
            trunk = nn.Linear(3, 3)
            models = [nn.Sequential(trunk, nn.Linear(3, 2)).double() for _ in range(4)]
            net = stack(models, shared=("0.*",))
        else:
            net = build(lambda: nn.Linear(3, 2), seeds=range(4), dtype=torch.float64)
        opt = optim.Adam(net.parameters(), lr=0.1)
        bank = torch.zeros(2, dtype=torch.float64)

        def step(x: torch.Tensor) -> Any:
            opt.zero_grad()
            out = net(x)
            losses = out.pow(2).mean((1, 2))
            total = losses.mean() if kind == "mean" else losses.sum()
            if kind == "diversity":
                total = total + (out - out.mean(0)).pow(2).sum()
            if kind == "index":
                total = total + losses[3]
            total.backward()
            opt.step()
            if kind == "bank":
                bank.add_(out.detach().sum((0, 1)))
            return total if kind == "returned" else losses

        return SimpleNamespace(step=step, net=net, bank=bank)

    return make


@pytest.mark.parametrize("kind", ["mean", "diversity", "index", "returned", "bank", "shared"])
def test_members_that_depend_on_each_other_run_at_once(kind: str) -> None:
    x = torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(6, 3)
    with pytest.warns(UserWarning, match="MW505"):
        captured = chunked(_dependent(kind), 1, x)
    assert captured.plans[0].startswith("all at once: ")


def test_a_trial_changes_nothing() -> None:
    """State, gradients, streams and what the step keeps are to the bit what they were before chunks were tried."""

    def make() -> SimpleNamespace:
        world = training("mlp", "adamw", members=4)
        step = world.step
        world.mean = [torch.zeros(4, dtype=torch.float64)]

        def keeping(x: torch.Tensor) -> Any:
            out = step(x)
            world.mean[0] = 0.9 * world.mean[0] + out["losses"].detach()
            return out

        world.step = keeping
        return world

    world = make()
    captured = compile(world.step, chunk=1, backend="fx")
    x = INPUTS["mlp"][1]()
    captured(x)
    captured(x)
    core = captured.captured
    program = core.programs[0]
    from memberwise.capture.arguments import Arguments
    from tests.parity.twins import tensors_of

    values = program.match(Arguments((x,), {}))
    assert values is not None
    before = {name: tensor.clone() for name, tensor in tensors_of(world).items()}
    objects = {name: id(p) for name, p in world.stack.named_parameters()}
    streams = [generator.get_state() for generator in world.stack.generators]
    core._planned(program, values, (x,), {})
    assert core.plans == ["1 at a time, as told"]
    after = tensors_of(world)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert objects == {name: id(p) for name, p in world.stack.named_parameters()}
    assert all(torch.equal(a, g.get_state()) for a, g in zip(streams, world.stack.generators, strict=True))


def test_a_failing_trial_changes_nothing_either() -> None:
    make = _dependent("index")
    twins = Twins(make, exact=False)
    twins.captured.chunk = 1
    x = torch.randn(6, 3, dtype=torch.float64)
    with pytest.warns(UserWarning, match="MW505"):
        for _ in range(5):
            twins.call(x)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where plans are remembered in a test."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path / "memberwise"


class Clock:
    """Programs take as long as their chunks are said to: nothing is timed."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = seconds
        self.asked = 0

    def __call__(self, *runs: Any, **rounds: int) -> list[float]:
        self.asked += 1
        owners = [getattr(run, "__self__", run) for run in runs]  # of a bound method, run uncompiled
        return [self.seconds[self._name(one)] for one in owners]

    def _name(self, one: Any) -> str:
        if not isinstance(one, chunks.Chunks):
            return "whole"
        return f"of_{one.size}" if one.lanes == 1 else f"of_{one.size}_on_{one.lanes}"


def as_if_compiled(captured: CapturedStep, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan a step as with a compiler, and compile nothing."""
    monkeypatch.setattr(captured._compiled, "backend", "inductor")
    monkeypatch.setattr("memberwise.capture.cache._begun", lambda graph, inputs, how: lambda trial: graph.forward)


def _planned(clock: Clock, monkeypatch: pytest.MonkeyPatch, members: int = 4) -> Any:
    """A step that was planned by such a clock."""
    torch.manual_seed(0)
    world = training("mlp", "sgd", members=members)
    captured = compile(world.step, backend="fx").captured
    as_if_compiled(captured, monkeypatch)
    monkeypatch.setattr(plan.Planner, "_seconds", clock)
    x = INPUTS["mlp"][1]()
    for _ in range(4):
        captured((x,), {})
    return captured


@pytest.mark.chooses
@pytest.mark.parametrize("faster", [True, False])
def test_auto_takes_the_faster(faster: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = _planned(Clock(whole=1.0, of_1=0.5 if faster else 2.0, of_2=0.8), monkeypatch)
    assert captured.plans[0].startswith("one at a time" if faster else "all at once")
    assert isinstance(captured.programs[0].run, chunks.Chunks) == faster


@pytest.mark.parametrize(
    ("seconds", "size"),
    [
        ({"whole": 1.0, "of_1": 0.5, "of_8": 0.25, "of_4": 0.3}, 8),
        ({"whole": 1.0, "of_1": 0.5, "of_8": 0.75, "of_2": 0.6}, 1),
        ({"whole": 1.0, "of_1": 1.4, "of_8": 0.75, "of_4": 0.7, "of_2": 0.65}, 2),
        ({"whole": 1.0, "of_1": 0.5, "of_8": 0.75, "of_2": 0.4, "of_4": 0.3}, 4),
        ({"whole": 1.0, "of_1": 1.4, "of_8": 1.2}, 0),
    ],
)
@pytest.mark.chooses
def test_auto_tries_several_sizes(
    seconds: dict[str, float], size: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = _planned(Clock(**seconds), monkeypatch, members=17)
    run = captured.programs[0].run
    assert (run.size if isinstance(run, chunks.Chunks) else 0) == size
    assert captured.plans[0].count(" ms, ") == len(seconds) - 1


@pytest.mark.chooses
def test_what_has_a_member_axis_is_guessed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of data, nobody says so: without a member axis it does not fit, with one it does, in each further candidate."""
    w = torch.ones(16, 3, requires_grad=True)
    optimizer = optim.SGD([w], lr=0.1)

    def step(x: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = (w * x).square().sum(-1)
        loss.sum().backward()
        optimizer.step()
        return loss.detach()

    recorded: list[int] = []
    record = chunker.Chunker._recorded

    def counted(self: Any, stacked: Any, size: int, members: int) -> Any:
        recorded.append(size)
        return record(self, stacked, size, members)

    monkeypatch.setattr(chunker.Chunker, "_recorded", counted)
    captured = compile(step, backend="fx").captured
    as_if_compiled(captured, monkeypatch)
    monkeypatch.setattr(plan.Planner, "_seconds", Clock(whole=1.0, of_1=1.2, of_8=0.5, of_4=0.6))
    for _ in range(3):
        captured((torch.randn(16, 3),), {})
    assert captured.programs[0].run.size == 8
    assert recorded == [1, 1, 8, 4]


@pytest.mark.chooses
def test_auto_does_not_compile_what_promises_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = _planned(Clock(whole=1.0, of_1=2.0, of_8=1.2), monkeypatch, members=17)
    assert captured.plans == ["all at once: 8 at a time 1200.00 ms, all at once 1000.00"]
    captured = _planned(Clock(whole=1.0, of_1=2.0), monkeypatch)
    assert captured.plans == ["all at once: one at a time 200% of its time"]


@pytest.mark.chooses
def test_auto_stops_where_its_budget_ends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "BUDGET", -1.0)
    captured = _planned(Clock(whole=1.0, of_1=0.5, of_8=0.75), monkeypatch, members=17)
    assert captured.plans == ["one at a time: one at a time 500.00 ms, all at once 1000.00"]


@pytest.mark.chooses
@pytest.mark.parametrize(("seconds", "size"), [(0.5, 1), (0.97, 0), (2.0, 0)])
def test_what_takes_long_to_compile_must_be_faster_uncompiled(
    seconds: float, size: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "LONG", 10)
    captured = _planned(Clock(whole=1.0, of_1=seconds), monkeypatch)
    assert isinstance(captured.programs[0].run, chunks.Chunks) == size
    told = f"one at a time {100 * seconds:.0f}% of its time, operation by operation"
    assert captured.plans[0] == ("one at a time: " if size else "all at once: ") + told
    assert len(captured._compiled._entries) == 1  # nothing else was compiled


@pytest.mark.chooses
@pytest.mark.parametrize(("of_8", "choice"), [(0.7, "one at a time"), (0.5, "8 at a time")])
def test_members_left_over_must_pay_where_compiling_takes_long(
    of_8: float, choice: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They need a program of their own, which takes as long again."""
    monkeypatch.setattr(plan, "LONG", 10)
    captured = _planned(Clock(whole=1.0, of_1=0.75, of_8=of_8), monkeypatch, members=17)
    assert captured.plans[0].startswith(f"{choice}: ")


@pytest.mark.chooses
def test_auto_does_not_try_what_cannot_pay(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(whole=plan.WORTH * 1.9)
    captured = _planned(clock, monkeypatch)
    assert "us a member" in captured.plans[0]
    assert clock.asked == 2, "compiled; and beside the recording as it is"


@pytest.mark.chooses
@pytest.mark.parametrize(("part", "plain"), [(0.5, True), (0.97, False)])
def test_a_recording_may_run_uncompiled(
    part: float, plain: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(self: Any, *runs: Any, **rounds: int) -> list[float]:
        whole = [not isinstance(getattr(run, "__self__", run), chunks.Chunks) for run in runs]
        return [1.0, part] if whole == [True, True] else [1.0 if one else 2.0 for one in whole]

    texts = []
    for _ in range(2):  # the second time as remembered
        captured = _planned(seconds, monkeypatch)  # type: ignore[arg-type] # called like one
        program = captured.programs[0]
        assert (getattr(program.run, "__self__", None) is program.graph) == plain
        texts.append(captured.plans[0])
    assert texts[0].startswith("all at once, operation by operation: " if plain else "all at once: ")
    assert texts[1] == f"{texts[0]}, as measured before"


@pytest.mark.chooses
@pytest.mark.parametrize("faster", [True, False])
def test_a_plan_is_remembered(faster: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another step of the same operations measures nothing; with another number of members it is another step."""
    clock = Clock(whole=1.0, of_1=0.5 if faster else 2.0, of_2=0.8)
    first = _planned(clock, monkeypatch)
    asked = clock.asked
    second = _planned(clock, monkeypatch)
    assert clock.asked == asked
    assert second.plans == [f"{first.plans[0]}, as measured before"]
    assert isinstance(second.programs[0].run, chunks.Chunks) == faster
    _planned(clock, monkeypatch, members=5)
    assert clock.asked > asked


@pytest.mark.parametrize("text", ["", "{", "[]", '{"size": "many", "text": ""}'])
def test_a_plan_that_cannot_be_read_is_none(text: str, folder: Path) -> None:
    kept = Remembered("a step")
    assert kept.get() is None
    kept.put(Plan(Candidate(3, 2, "lstm by calls"), "why"))
    assert Remembered("a step").get() == Plan(Candidate(3, 2, "lstm by calls"), "why")
    assert Remembered("another").get() is None
    (path,) = folder.iterdir()
    path.write_text(text)
    assert kept.get() is None


def test_a_plan_that_cannot_be_kept_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memberwise").write_text("a file where the folder would be")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    Remembered("a step").put(Plan(Candidate(3), "why"))
    assert Remembered("a step").get() is None


@pytest.mark.parametrize(
    ("ours", "other", "agree"),
    [
        ([1.0, 2.0], [1.0, 2.0], True),
        ([1.0 + 1e-5, 2.0], [1.0, 2.0], True),  # within the table
        ([1.01, 2.0], [1.0, 2.0], False),
        ([1.01, 2.0], [1.005, 2.0], True),  # no more than a nudge does
        ([float("nan"), 2.0], [1.0, 2.0], False),
        ([0.5, 2.0], [1.0, 2.0], False),
    ],
)
def test_what_counts_as_rounding(ours: list[float], other: list[float], agree: bool) -> None:
    assert _agree(torch.tensor(ours), torch.tensor([1.0, 2.0]), torch.tensor(other)) == agree


def _agree(ours: torch.Tensor, theirs: torch.Tensor, other: torch.Tensor) -> bool:
    return chunker._agree(ours, theirs, chunker._noise(theirs, other))


def test_each_member_has_a_scale_of_its_own() -> None:
    """A member whose values are small is not hidden by one whose values are large."""
    theirs = torch.tensor([[1e6, 2e6], [1e-6, 2e-6]])
    ours = theirs.clone()
    ours[1] *= 2
    assert not _agree(ours, theirs, theirs)
    assert _agree(theirs * (1 + 1e-6), theirs, theirs)
    assert _agree(torch.tensor([1, 2]), torch.tensor([1, 2]), torch.tensor([1, 2]))
    assert not _agree(torch.tensor([1, 2]), torch.tensor([1, 3]), torch.tensor([1, 2]))


def test_of_a_nudge_no_copy_of_the_state_is_kept() -> None:
    """A state may be gigabytes: what is kept beside one copy of it is a number a row."""
    state = [torch.randn(4, 1000), torch.arange(4)]
    found = chunker.Expected.of(lambda w, k: [w * 2], lambda: [one.clone() for one in state])
    assert [value.shape for value in found.values] == [(4, 1000), (4, 1000), (4,)]
    noise = [None if each is None else each.shape for each in found.noise]
    assert noise == [(4,), (4,), None]
    assert all(0 < each.amax() < 1e-5 for each in found.noise[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_that_are_rounding_alone_do_not_forbid_chunks(dtype: torch.dtype) -> None:
    """A bias before BatchNorm has gradient zero; Adam makes steps of its rounding, and members seem to differ."""

    def make() -> SimpleNamespace:
        net = build(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), seeds=range(4), dtype=dtype)
        opt = optim.Adam(net.parameters(), lr=0.1)
        x = torch.randn(16, 3, dtype=dtype)

        def step() -> torch.Tensor:
            opt.zero_grad()
            losses = net(x).pow(3).mean((1, 2))
            losses.sum().backward()
            opt.step()
            return losses

        return SimpleNamespace(step=step)

    torch.manual_seed(0)
    captured = compile(make().step, chunk=1, backend="fx")
    for _ in range(4):
        captured()
    assert captured.captured.plans == ["1 at a time, as told"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_graph_that_the_user_keeps_does_not_hinder_chunks(dtype: torch.dtype) -> None:
    """It holds the node that each leaf's gradient comes from, made for all members."""
    weight = torch.randn(4, 3).to(dtype).requires_grad_()
    kept = (weight * 2).sum()
    opt = optim.SGD([weight], lr=0.1)

    def step() -> torch.Tensor:
        opt.zero_grad()
        losses = (weight * weight).sum(1)
        losses.sum().backward()
        opt.step()
        return losses.detach()

    captured = compile(step, chunk=2, backend="fx")
    for _ in range(3):
        captured()
    assert captured.captured.plans == ["2 at a time, as told"]
    before = weight.grad.clone()
    kept.backward()
    assert torch.equal(weight.grad, before + 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_differs_in_float32_is_compared_in_float64(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a kink a last bit is a percent of a gradient. What still differs in float64 is refused, as before."""
    is_met, asked = chunker.Expected.is_met, []

    def coarse(self: Any, runs: Any, values: list[torch.Tensor]) -> bool:
        asked.append({value.dtype for value in values if value.is_floating_point()})
        return len(asked) > 1 and is_met(self, runs, values)

    def make(kind: str) -> SimpleNamespace:
        net = build(lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), seeds=range(4), dtype=dtype)
        opt = optim.Adam(net.parameters(), lr=0.1)
        x = torch.randn(16, 3, dtype=dtype)

        def step() -> torch.Tensor:
            opt.zero_grad()
            losses = net(x).float().pow(2).mean((1, 2))
            (losses.sum() if kind == "apart" else losses.mean()).backward()
            opt.step()
            return losses

        return SimpleNamespace(step=step)

    monkeypatch.setattr(chunker.Expected, "is_met", coarse)
    for kind, plans in (("apart", ["2 at a time, as told"]), ("dependent", ["all at once: its results differ"])):
        asked.clear()
        captured = compile(make(kind).step, chunk=2, backend="fx")
        with warnings.catch_warnings(action="ignore"):
            for _ in range(4):
                captured()
        assert asked[1] <= {torch.float64} and len(asked) >= 2
        assert [plan.split(", so")[0] for plan in captured.captured.plans] == plans


@pytest.mark.parametrize(("name", "limit"), [("COPIED", 100), ("free_memory", 100)])
def test_state_is_not_copied_that_is_large_or_has_no_room(
    name: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = limit if name == "COPIED" else lambda device: limit
    monkeypatch.setattr(f"memberwise.capture.program.{name}", value)
    world = training("mlp", "sgd", members=4)
    captured = compile(world.step, backend="fx").captured
    x = INPUTS["mlp"][1]()
    for _ in range(3):
        captured((x,), {})
    program = captured.programs[0]
    assert not program.can_copy(program.values)
    planner = plan.Planner(program, program.values, None, lambda *args: lambda: None, [])  # type: ignore[arg-type] # unused
    assert "too large" in planner.plan(Remembered("unused"))[1]


@pytest.mark.parametrize("chunk", [0, -1, True, 1.5, "all"])
def test_a_wrong_chunk(chunk: Any) -> None:
    with pytest.raises(ValueError, match="MW504"):
        compile(lambda: None, chunk=chunk)
