"""What cannot be recorded runs eagerly, once, with right results, and says why and on which line."""

from __future__ import annotations

import copy
import functools
import io
import random
import warnings
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.utils import dlpack

from memberwise.capture import CapturedStep, compile
from memberwise.capture.refusals import REASONS
from memberwise.capture.step import PATIENCE
from memberwise.errors import StackWarning
from tests.parity.twins import Twins

MASK = torch.tensor([True, False, True])
WEIGHT = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
NUMPYS, OLD_NUMPYS, OWN = numpy.random.default_rng(0), numpy.random.RandomState(0), random.Random(0)
INDEX = torch.tensor([2, 0])
STATE = torch.get_rng_state()

OPERATIONS = torch.library.Library("refused", "DEF")
OPERATIONS.define("in_lists(Tensor x) -> (Tensor[], Tensor[])")
OPERATIONS.impl("in_lists", lambda x: ([x * 2], [x * 3]), "CPU")

READS: dict[str, tuple[str, Callable[[torch.Tensor], Any]]] = {
    "item": ("host-read", lambda x: x[0].item()),
    "float": ("host-read", lambda x: float(x[0])),
    "int": ("host-read", lambda x: int(x[0])),
    "bool": ("host-read", lambda x: x if x.sum() > 0 else -x),
    "index": ("host-read", lambda x: [1, 2, 3][x[0].long()]),
    "tolist": ("host-read", lambda x: x.tolist()),
    "numpy": ("host-read", lambda x: float(x.numpy().sum())),
    "asarray": ("host-read", lambda x: float(numpy.asarray(x).sum())),
    "data_ptr": ("host-read", lambda x: x.data_ptr() and None),
    "storage": ("host-read", lambda x: x.untyped_storage().nbytes()),
    "dlpack": ("host-read", lambda x: dlpack.from_dlpack(x.__dlpack__())),
    "print": ("host-read", lambda x: len(repr(x))),
    "format": ("host-read", lambda x: f"{x[0]:.1f}"),
    "equal": ("host-read", lambda x: torch.equal(x, x)),
    "allclose": ("host-read", lambda x: torch.allclose(x, x)),
    "contains": ("host-read", lambda x: 1.0 in x),
    "iteration": ("host-read", lambda x: sum(float(entry) for entry in x)),
    "list of tensors": ("host-read", lambda x: torch.tensor([x[0], x[1]])),
    "save": ("host-read", lambda x: torch.save(x, io.BytesIO())),
    "closure tensor": ("host-read", lambda x: x * WEIGHT[0].item()),
    "tensor_split": ("host-read", lambda x: torch.tensor_split(x, INDEX[:1])[0]),
    "one_hot": ("host-read", lambda x: nn.functional.one_hot(INDEX)),
    "results in lists": ("internal", lambda x: torch.ops.refused.in_lists(x)[1][0] + 1),
    "nonzero": ("dynamic-shape", lambda x: x.nonzero().shape[0]),
    "mask": ("dynamic-shape", lambda x: x[MASK]),
    "where": ("dynamic-shape", lambda x: torch.where(x > 0)[0]),
    "unique": ("dynamic-shape", lambda x: x.unique()),
    "masked_select": ("dynamic-shape", lambda x: x.masked_select(MASK)),
    "from_numpy": ("host-data", lambda x: x + torch.from_numpy(numpy.ones(3, dtype=numpy.float32))),
    "as_tensor": ("host-data", lambda x: x + torch.as_tensor(numpy.ones(3, dtype=numpy.float32))),
    "tensor of array": ("host-data", lambda x: x + torch.tensor(numpy.ones(3, dtype=numpy.float32))),
    "tensor of numpy scalar": ("host-data", lambda x: x + torch.tensor(numpy.float32(2.0))),
    "data exchanged": ("memory", lambda x: setattr(x, "data", torch.ones(3))),
    "set_": ("memory", lambda x: x.set_(torch.ones(3))),
    "resize_": ("memory", lambda x: x.resize_(2)),
    "transposed in place": ("memory", lambda x: x.unsqueeze_(0)),
    "seeded": ("random-state", lambda x: (torch.manual_seed(3), x + torch.rand(3))[1]),
    "state set": ("random-state", lambda x: (torch.rand(2), torch.set_rng_state(STATE))[0]),
    "multinomial": ("random-values", lambda x: torch.multinomial(x.abs() + 1, 2)),
    "bernoulli of computed": ("random-values", lambda x: torch.bernoulli(x.sigmoid())),
    "python random": ("random-state", lambda x: x * random.random()),
    "numpy random": ("random-state", lambda x: x * numpy.random.rand()),
    "numpy generator": ("random-state", lambda x: x * float(NUMPYS.random())),
    "numpy state": ("random-state", lambda x: x * float(OLD_NUMPYS.rand())),
    "own random": ("random-state", lambda x: x * OWN.random()),
    "needs graph": ("needs-graph", lambda x: x * WEIGHT),
    "returned object": ("returned-object", lambda x: SimpleNamespace(x=x)),
    "copied": ("memory", lambda x: copy.deepcopy(x)),
}


def quietly(captured: Any, *args: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return captured(*args)


@pytest.mark.parametrize("name", READS)
def test_each_kind_is_refused_with_its_reason_and_line(name: str) -> None:
    reason, read = READS[name]
    state = torch.zeros(3)

    def step(x: torch.Tensor) -> Any:
        state.add_(x)
        return read(x)

    captured = compile(step, backend="fx")
    with pytest.warns(StackWarning, match="MW501") as caught:
        captured(torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(state, torch.tensor([1.0, 2.0, 3.0])), "the refused step ran other than once"
    (refusal,) = captured.captured.refusals
    assert refusal.reason == reason, refusal
    if reason in ("host-read", "dynamic-shape", "host-data", "memory", "random-values"):
        assert "test_capture_refusals.py:" in refusal.where
        assert "lambda x" in refusal.where
        assert refusal.where in str(caught[0].message)
    assert caught[0].filename == __file__


def test_every_reason_has_a_sentence() -> None:
    assert {reason for reason, _ in READS.values()} <= set(REASONS)


def test_what_is_refused_runs_as_it_would_and_warns_once() -> None:
    def make() -> SimpleNamespace:
        state = torch.zeros(3)

        def step(x: torch.Tensor) -> torch.Tensor:
            state.add_(torch.rand(3))
            if x.sum() > 0:
                state.mul_(2)
            return state * x

        return SimpleNamespace(step=step, state=state)

    twins = Twins(make)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for sign in (1, -1, 1, -1, 1):
            twins.call(torch.ones(3) * sign)
    assert [str(warning.message).count("MW501") for warning in caught] == [1]
    assert twins.captured.recorded == PATIENCE
    assert twins.captured.replayed == 0


def test_a_line_in_a_function_that_the_step_calls() -> None:
    def inner(x: torch.Tensor) -> float:
        return x.sum().item()  # the line

    captured = compile(lambda x: x * inner(x), backend="fx")
    quietly(captured, torch.ones(2))
    assert captured.captured.refusals[0].where.endswith("return x.sum().item()  # the line")


def test_a_read_in_backward_names_the_hook() -> None:
    weight = torch.ones(3, requires_grad=True)

    def hook(grad: torch.Tensor) -> None:
        assert grad.sum().item() != 0  # read in backward

    def step(x: torch.Tensor) -> None:
        out = weight * x
        out.register_hook(hook)
        out.sum().backward()

    captured = compile(step, backend="fx")
    quietly(captured, torch.ones(3))
    assert "read in backward" in captured.captured.refusals[0].where


def test_values_that_are_the_same_in_each_run_may_be_read() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        steps = torch.arange(3)
        scale = torch.tensor([2.0, 3.0]).sum().item()
        mask = torch.tensor([True, False, True])
        return sum(x[int(k)] for k in steps) * scale + x[steps[steps > 0]].sum() + mask.sum().item()

    twins = Twins(lambda: SimpleNamespace(step=step))
    twins.settle(torch.randn(3))
    assert twins.replays(torch.randn(3))


def test_but_not_after_a_value_was_written_into_them() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        held = torch.zeros(3)
        held[1:].copy_(x[1:])
        return x * held[2].item()

    captured = compile(step, backend="fx")
    quietly(captured, torch.ones(3))
    assert captured.captured.refusals[0].reason == "host-read"


# -- Python state


def counting() -> SimpleNamespace:
    box = SimpleNamespace(n=0)

    def step(x: torch.Tensor) -> torch.Tensor:
        box.n += 1
        return x * box.n

    return SimpleNamespace(step=step, box=box)


def appending() -> SimpleNamespace:
    history: list[torch.Tensor] = []

    def step(x: torch.Tensor) -> torch.Tensor:
        history.append(x.sum())
        return x + len(history)

    return SimpleNamespace(step=step, history=history)


def nonlocal_counter() -> SimpleNamespace:
    n = 0

    def step(x: torch.Tensor) -> torch.Tensor:
        nonlocal n
        n += 1
        return x * n

    return SimpleNamespace(step=step)


def new_parameter() -> SimpleNamespace:
    net = nn.Linear(3, 3)

    def step(x: torch.Tensor) -> torch.Tensor:
        net.bias = nn.Parameter(net.bias.detach() + 1)
        return net(x).detach()

    return SimpleNamespace(step=step, net=net)


def scheduler() -> SimpleNamespace:
    net = nn.Linear(3, 3)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)

    def step(x: torch.Tensor) -> torch.Tensor:
        opt.zero_grad()
        loss = net(x).pow(2).sum()
        loss.backward()
        opt.step()
        schedule.step()
        return loss

    return SimpleNamespace(step=step, net=net)


def test_a_parameter_made_in_the_step() -> None:
    twins = Twins(new_parameter)
    with pytest.warns(StackWarning, match="MW501"):
        for _ in range(4):
            twins.call(torch.randn(3))
    assert twins.captured.replayed == 0


@pytest.mark.parametrize("make", [counting, appending, nonlocal_counter, scheduler])
def test_a_step_that_changes_python_state_stays_eager(make: Callable[[], SimpleNamespace]) -> None:
    twins = Twins(make)
    with pytest.warns(StackWarning, match="changes Python state"):
        for _ in range(6):
            twins.call(torch.randn(3))
    assert twins.captured.replayed == 0
    assert {refusal.reason for refusal in twins.captured.refusals} == {"python-state"}


def test_state_made_in_the_first_call_alone_is_no_reason() -> None:
    def make() -> SimpleNamespace:
        net = nn.Linear(3, 3)
        opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        cache: dict[str, torch.Tensor] = {}

        def step(x: torch.Tensor) -> torch.Tensor:
            if "mask" not in cache:
                cache["mask"] = torch.tril(torch.ones(3, 3))
            opt.zero_grad()
            loss = (net(x) @ cache["mask"]).pow(2).sum()
            loss.backward()
            opt.step()
            return loss

        return SimpleNamespace(step=step, net=net, opt=opt, cache=cache)

    twins = Twins(make)
    with warnings.catch_warnings():
        warnings.simplefilter("error", StackWarning)
        twins.settle(torch.randn(2, 3))
        assert twins.replays(torch.randn(2, 3))


def test_a_large_numpy_array_within_reach() -> None:
    table = numpy.ones(100_000)
    captured = compile(lambda x: x * float(table[3]), backend="fx")
    assert torch.equal(quietly(captured, torch.ones(2)), torch.ones(2))
    assert captured.captured.refusals[0].reason == "host-data"
    assert "table" in captured.captured.refusals[0].found


def test_sparse_tensors() -> None:
    eye = torch.eye(3).to_sparse()
    captured = compile(lambda x: torch.sparse.mm(eye, x), backend="fx")
    for _ in range(4):
        assert torch.equal(quietly(captured, torch.ones(3, 2)), torch.ones(3, 2))
    assert captured.captured.refusals[0].reason == "layout"


def test_a_wrong_call_is_told_by_torch() -> None:
    captured = compile(lambda x: torch.tensor_split(x), backend="fx")
    with pytest.raises(TypeError):
        captured(torch.ones(2))


# -- where tensors come from


def test_an_iterator_within_reach() -> None:
    batches = iter([torch.ones(3) * k for k in range(9)])
    captured = compile(lambda: next(batches) * 2, backend="fx")
    outs = [quietly(captured) for _ in range(5)]
    assert [out[0].item() for out in outs] == [0, 2, 4, 6, 8]
    assert captured.captured.refusals[0].reason == "iterator"
    assert "batches" in captured.captured.refusals[0].found


def test_a_tensor_from_nowhere() -> None:
    class Source:
        """Hands out tensors that nothing within reach holds."""

        def __getattr__(self, name: str) -> torch.Tensor:
            return KEPT()

    source = Source()
    held = torch.ones(2)
    KEPT = weakref.ref(held)  # a global in spirit
    captured = compile(lambda x: x + source.batch, backend="fx")
    assert torch.equal(quietly(captured, torch.zeros(2)), torch.ones(2))
    refusal = captured.captured.refusals[0]
    assert refusal.reason == "unknown-tensor"
    assert "source.batch" in refusal.where


def test_a_function_with_a_cache() -> None:
    def make() -> SimpleNamespace:
        @functools.lru_cache
        def mask(size: int) -> torch.Tensor:
            return torch.tril(torch.ones(size, size))

        return SimpleNamespace(step=lambda x: x @ mask(x.shape[0]))

    twins = Twins(make)
    with pytest.warns(StackWarning, match="MW501"):
        for _ in range(5):
            twins.call(torch.randn(3))
    first = twins.captured.refusals[0]
    assert (first.reason, first.found[:12]) == ("python-state", "the cache of")
    assert twins.captured.refusals[1].reason == "unknown-tensor"


def test_more_than_can_be_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    from memberwise.capture import reach

    monkeypatch.setattr(reach, "LIMIT", 50)
    many = list(range(100))
    captured = compile(lambda x: x * many[3], backend="fx")
    assert torch.equal(quietly(captured, torch.ones(2)), torch.ones(2) * 3)
    assert captured.captured.refusals[0].reason == "too-large"


def test_a_trainer_that_also_holds_its_data() -> None:
    class Trainer:
        def __init__(self) -> None:
            self.loader = torch.utils.data.DataLoader([torch.ones(2) * k for k in range(30_000)], batch_size=2)
            self.batches = 0
            self.weight = torch.zeros(2)

        def step(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight.add_(x.sum(0)).clone()

    trainer = Trainer()
    captured = compile(trainer.step, backend="fx")
    for x, _ in zip(trainer.loader, range(5), strict=False):
        captured(x)
    assert captured.captured.replayed == 4
    assert torch.equal(trainer.weight, torch.full((2,), 45.0))


def test_views_of_one_state_of_which_one_is_written() -> None:
    def make() -> SimpleNamespace:
        base = torch.zeros(4)
        left, right = base[:3], base[1:]

        def step(x: torch.Tensor) -> torch.Tensor:
            left.add_(1)
            return right * x

        return SimpleNamespace(step=step, base=base, left=left, right=right)

    twins = Twins(make)
    with pytest.warns(StackWarning, match="share memory"):
        for _ in range(4):
            twins.call(torch.ones(3))
    assert twins.captured.replayed == 0


# -- failures


def test_an_exception_passes_and_leaves_what_the_eager_step_leaves() -> None:
    def make() -> SimpleNamespace:
        weight = torch.ones(3, requires_grad=True)
        box = SimpleNamespace(fail=False)

        def step(x: torch.Tensor) -> torch.Tensor:
            loss = (weight * x).sum()
            loss.backward()
            if box.fail:
                raise KeyError("mine")
            return loss

        return SimpleNamespace(step=step, weight=weight, box=box)

    twins = Twins(make)
    twins.both(lambda world: setattr(world.box, "fail", True))
    for function in (twins.eager.step, twins.function):
        with pytest.raises(KeyError, match="mine"):
            function(torch.ones(3))
    assert torch.equal(twins.world.weight.grad, twins.eager.weight.grad)
    twins.both(lambda world: setattr(world.box, "fail", False))
    twins.settle(torch.ones(3))
    twins.both(lambda world: setattr(world.box, "fail", True))
    with pytest.raises(KeyError, match="mine"):
        twins.function(torch.ones(3))


def test_what_the_compiler_cannot_do_the_step_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memberwise.capture.cache._begun", _broken)
    monkeypatch.setattr("memberwise.capture.step.compiler_missing", lambda: "")
    state = torch.zeros(2)
    captured = compile(lambda x: state.add_(x) * 2)
    captured(torch.ones(2))
    with pytest.warns(StackWarning, match="no such kernel"):
        assert torch.equal(captured(torch.ones(2)), torch.full((2,), 4.0))
    assert torch.equal(state, torch.full((2,), 2.0))


def _broken(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError("no such kernel\nmore")


def test_an_operation_that_the_recorder_trips_over(monkeypatch: pytest.MonkeyPatch) -> None:
    from memberwise.capture.record import Recorder

    def broken(self: Any, *args: Any) -> Any:
        raise ValueError("unknown argument")

    monkeypatch.setattr(Recorder, "_record", broken)
    captured = compile(lambda x: x * 2, backend="fx")
    with pytest.warns(StackWarning, match="unknown argument"):
        assert torch.equal(captured(torch.ones(2)), torch.full((2,), 2.0))


def test_no_compiler_means_eager_and_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memberwise.capture.cache._begun", _broken)
    monkeypatch.setattr("memberwise.capture.step.compiler_missing", lambda: "no g++ here")
    state = torch.zeros(2)
    captured = compile(lambda x: state.add_(x) * 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for k in range(1, 6):
            assert torch.equal(captured(torch.ones(2)), torch.full((2,), 2.0 * k))
    assert len(caught) == 1
    assert "no g++ here" in str(caught[0].message)
    assert "MW502" in str(caught[0].message)
    assert caught[0].filename == __file__


# -- around the call


@pytest.fixture
def counter() -> Iterator[CapturedStep]:
    captured = compile(lambda x: x * 2, backend="fx")
    for _ in range(3):
        captured(torch.ones(3))
    yield captured.captured


def test_inside_another_recording_the_step_is_part_of_it() -> None:
    inner = compile(lambda x: x * 2, backend="fx")
    outer = compile(lambda x: inner(x) + 1, backend="fx")
    for _ in range(3):
        assert torch.equal(outer(torch.ones(2)), torch.full((2,), 3.0))
    assert outer.captured.replayed == 2
    assert inner.captured.recorded == 0


def test_under_a_transform_the_step_runs_eagerly() -> None:
    inner = compile(lambda x: x * x, backend="fx")
    for _ in range(3):
        assert torch.equal(torch.func.grad(lambda x: inner(x).sum())(torch.ones(2)), torch.full((2,), 2.0))
    assert inner.captured.recorded == 0


@pytest.mark.parametrize("bad", [{"step": 3}, {"step": print, "backend": "cuda"}])
def test_wrong_arguments(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="MW504"):
        compile(**bad)


def test_as_a_decorator_and_as_a_method() -> None:
    class Trainer:
        def __init__(self) -> None:
            self.weight = torch.ones(2)

        @compile(backend="fx")
        def step(self, x: torch.Tensor) -> torch.Tensor:
            """Doc."""
            return self.weight.add_(x).clone()

    first, second = Trainer(), Trainer()
    for k in range(1, 5):
        assert torch.equal(first.step(torch.ones(2)), torch.full((2,), 1.0 + k))
    assert torch.equal(second.step(torch.ones(2)), torch.full((2,), 2.0))
    assert Trainer.step.__doc__ == "Doc."


def test_a_step_from_no_file_is_followed() -> None:
    """As `python -c` and `exec` make it: its globals are inputs and guards like those of any other."""
    space: dict[str, object] = {"__name__": "__main__", "torch": torch, "weight": torch.ones(2), "scale": 2.0}
    exec("def step(x):\n    return weight * x * scale", space)  # as a user would
    captured = compile(space["step"], backend="fx")  # type: ignore[call-overload] # a function
    for scale in (2.0, 2.0, 2.0, 5.0, 5.0):
        space["scale"] = scale
        assert captured(torch.ones(2)).tolist() == [scale, scale]
    assert captured.captured.replayed == 3
