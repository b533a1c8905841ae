"""What a recording cannot see must never go stale: each change after capture counts in the very next call."""

from __future__ import annotations

import functools
import types
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from memberwise.capture import compile
from tests.parity.twins import Twins

X = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64).reshape(2, 3)

SCALE = 2.0
TABLE = {"scale": 2.0, "deep": {"list": [2.0, 3.0]}}


class Config:
    """A class used as a namespace."""

    scale = 2.0


def helper(x: torch.Tensor) -> torch.Tensor:
    """A function that the step calls, with a global of its own."""
    return x * SCALE


def _world(step: Any, **held: Any) -> SimpleNamespace:
    return SimpleNamespace(step=step, **held)


def closure_scalar() -> SimpleNamespace:
    box = SimpleNamespace(k=2.0)
    k = 2.0

    def step(x: torch.Tensor) -> torch.Tensor:
        return x * k

    def change(value: float) -> None:
        nonlocal k
        k = value

    return _world(step, change=lambda: change(3.0), box=box)


def closure_int_to_float() -> SimpleNamespace:
    k: Any = 2

    def step(x: torch.Tensor) -> torch.Tensor:
        return torch.ones(2, dtype=torch.int64) * k + x.sum().long()

    def change() -> None:
        nonlocal k
        k = 2.0

    return _world(step, change=change)


def nested_function() -> SimpleNamespace:
    k = 2.0

    def inner(x: torch.Tensor) -> torch.Tensor:
        return x + k

    def step(x: torch.Tensor) -> torch.Tensor:
        return inner(x)

    def change() -> None:
        nonlocal k
        k = 5.0

    return _world(step, change=change)


def exchanged_function() -> SimpleNamespace:
    act = torch.relu

    def step(x: torch.Tensor) -> torch.Tensor:
        return act(x)

    def change() -> None:
        nonlocal act
        act = torch.tanh

    return _world(step, change=change)


def default_argument() -> SimpleNamespace:
    options = {"k": 2.0}

    def step(x: torch.Tensor, options: dict[str, float] = options) -> torch.Tensor:
        return x * options["k"]

    return _world(step, change=lambda: options.update(k=4.0))


def dict_and_list() -> SimpleNamespace:
    table = {"deep": {"list": [2.0, 3.0]}}

    def step(x: torch.Tensor) -> torch.Tensor:
        return x * sum(table["deep"]["list"])

    return _world(step, change=lambda: table["deep"]["list"].__setitem__(1, 7.0))


def longer_list() -> SimpleNamespace:
    weights = [1.0]

    def step(x: torch.Tensor) -> torch.Tensor:
        return x * sum(weights)

    return _world(step, change=lambda: weights.append(4.0))


def new_key() -> SimpleNamespace:
    extra: dict[str, float] = {}

    def step(x: torch.Tensor) -> torch.Tensor:
        return x * extra.get("k", 1.0)

    return _world(step, change=lambda: extra.update(k=4.0))


def set_of_names() -> SimpleNamespace:
    frozen = {"a"}

    def step(x: torch.Tensor) -> torch.Tensor:
        return x if "b" in frozen else -x

    return _world(step, change=lambda: frozen.add("b"))


def object_attribute() -> SimpleNamespace:
    class Trainer:
        def __init__(self) -> None:
            self.k = 2.0

        def step(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.k

    trainer = Trainer()
    return _world(trainer.step, change=lambda: setattr(trainer, "k", 3.0))


def slots_attribute() -> SimpleNamespace:
    class Options:
        __slots__ = ("k",)

    options = Options()
    options.k = 2.0

    def step(x: torch.Tensor) -> torch.Tensor:
        return x * options.k

    return _world(step, change=lambda: setattr(options, "k", 3.0))


def class_attribute() -> SimpleNamespace:
    class Own:
        scale = 2.0

    def step(x: torch.Tensor) -> torch.Tensor:
        return x * Own.scale

    return _world(step, change=lambda: setattr(Own, "scale", 3.0))


def module_flag() -> SimpleNamespace:
    net = nn.BatchNorm1d(3, affine=False).double()
    return _world(lambda x: net(x), net=net, change=net.eval)


def module_eps() -> SimpleNamespace:
    net = nn.LayerNorm(3).double()
    return _world(lambda x: net(x).detach(), net=net, change=lambda: setattr(net, "eps", 0.5))


def dropout_rate() -> SimpleNamespace:
    net = nn.Sequential(nn.Dropout(0.2), nn.Dropout(0.2))
    return _world(lambda x: net(x), net=net, change=lambda: setattr(net[1], "p", 0.9))


def dropout_off() -> SimpleNamespace:
    net = nn.Sequential(nn.Dropout(0.5))
    return _world(lambda x: net(x), net=net, change=net.eval)


def exchanged_module() -> SimpleNamespace:
    net = nn.Sequential(nn.ReLU())
    return _world(lambda x: net(x), change=lambda: net.__setitem__(0, nn.Tanh()))


def appended_module() -> SimpleNamespace:
    net = nn.Sequential(nn.ReLU())
    return _world(lambda x: net(x), change=lambda: net.append(nn.Tanh()))


def new_hook() -> SimpleNamespace:
    net = nn.ReLU()
    return _world(lambda x: net(x), change=lambda: net.register_forward_hook(lambda m, args, out: out * 3))


def exchanged_forward() -> SimpleNamespace:
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    net = Net()
    return _world(lambda x: net(x), change=lambda: setattr(Net, "forward", lambda self, x: x * 5))


def forward_of_one_instance() -> SimpleNamespace:
    net = nn.ReLU()
    return _world(lambda x: net(x), change=lambda: setattr(net, "forward", lambda x: x * 5))


def tensor_hook() -> SimpleNamespace:
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)

    def step(x: torch.Tensor) -> torch.Tensor:
        weight.grad = None
        (weight * x).sum().backward()
        return weight.grad

    return _world(step, change=lambda: weight.register_hook(lambda grad: grad * 7), weight=weight)


def accumulation_hook() -> SimpleNamespace:
    world = tensor_hook()
    weight = world.weight

    def hook(leaf: torch.Tensor) -> None:
        leaf.grad.mul_(7)

    world.change = lambda: weight.register_post_accumulate_grad_hook(hook)
    return world


def exchanged_parameter() -> SimpleNamespace:
    net = nn.Linear(3, 2).double()

    def change() -> None:
        net.weight = nn.Parameter(torch.ones(2, 3, dtype=torch.float64))

    return _world(lambda x: net(x).detach(), change=change, net=net)


def parameter_data() -> SimpleNamespace:
    net = nn.Linear(3, 2).double()

    def change() -> None:
        net.weight.data = torch.ones(2, 3, dtype=torch.float64)

    return _world(lambda x: net(x).detach(), change=change, net=net)


def module_dtype() -> SimpleNamespace:
    net = nn.Linear(3, 2).double()
    return _world(lambda x: net(x.to(net.weight.dtype)).detach(), change=net.float, net=net)


def frozen_parameter() -> SimpleNamespace:
    net = nn.Linear(3, 2).double()

    def step(x: torch.Tensor) -> torch.Tensor:
        net.zero_grad()
        loss = net(x).pow(2).sum()
        loss.backward()
        return loss

    return _world(step, change=lambda: net.weight.requires_grad_(False), net=net)


def optimizer_group() -> SimpleNamespace:
    net = nn.Linear(3, 2).double()
    opt = torch.optim.SGD(net.parameters(), lr=0.1)

    def step(x: torch.Tensor) -> torch.Tensor:
        opt.zero_grad()
        loss = net(x).pow(2).sum()
        loss.backward()
        opt.step()
        return loss

    def change() -> None:
        opt.param_groups[0]["lr"] = 0.01

    return _world(step, change=change, net=net)


def closure_tensor() -> SimpleNamespace:
    target = torch.ones(3, dtype=torch.float64)

    def step(x: torch.Tensor) -> torch.Tensor:
        return x - target

    def change() -> None:
        nonlocal target
        target = torch.zeros(3, dtype=torch.float64)

    return _world(step, change=change)


def closure_tensor_shape() -> SimpleNamespace:
    target = torch.ones(3, dtype=torch.float64)

    def step(x: torch.Tensor) -> torch.Tensor:
        return (x - target) / target.shape[0]

    def change() -> None:
        nonlocal target
        target = torch.zeros(1, dtype=torch.float64)

    return _world(step, change=change)


def tensor_in_place() -> SimpleNamespace:
    target = torch.ones(3, dtype=torch.float64)
    return _world(lambda x: x - target, change=lambda: target.fill_(4.0), target=target)


def tensor_in_list() -> SimpleNamespace:
    data = [torch.ones(3, dtype=torch.float64)]
    return _world(lambda x: x - data[0], change=lambda: data.__setitem__(0, torch.full((3,), 9.0, dtype=torch.float64)))


def tied_then_untied() -> SimpleNamespace:
    first = torch.ones(3, dtype=torch.float64)
    pair = [first, first]
    return _world(lambda x: x * pair[0] - pair[1], change=lambda: pair.__setitem__(1, torch.zeros_like(first)))


def attribute_of_a_dict() -> SimpleNamespace:
    class Options(dict[str, float]):
        k = 2.0

    options = Options()
    options.k = 2.0
    return _world(lambda x: x * options.k, change=lambda: setattr(options, "k", 3.0))


def attribute_of_a_function() -> SimpleNamespace:
    def step(x: torch.Tensor) -> torch.Tensor:
        return x * getattr(step, "k", 1.0)

    return _world(step, change=lambda: setattr(step, "k", 3.0))


def numpy_array() -> SimpleNamespace:
    weights = numpy.ones(3)
    return _world(lambda x: x * float(weights[1]), change=lambda: weights.__setitem__(1, 5.0))


def numpy_array_in_an_object() -> SimpleNamespace:
    box = SimpleNamespace(weights=numpy.ones(3))
    return _world(lambda x: x * float(box.weights.sum()), change=lambda: box.weights.__imul__(2))


def exchanged_partial() -> SimpleNamespace:
    options = {"f": functools.partial(torch.mul, other=2.0)}
    change = lambda: options.update(f=functools.partial(torch.mul, other=3.0))  # noqa: E731 # as its neighbours
    return _world(lambda x: options["f"](x), change=change)


def draw_by_a_tensor() -> SimpleNamespace:
    box = SimpleNamespace(p=torch.zeros(3, dtype=torch.float64))
    change = lambda: setattr(box, "p", torch.ones(3, dtype=torch.float64))  # noqa: E731 # as its neighbours
    return _world(lambda x: x * torch.bernoulli(box.p), change=change)


WORLDS = [
    closure_scalar, closure_int_to_float, nested_function, exchanged_function, default_argument, dict_and_list,
    longer_list, new_key, set_of_names, object_attribute, slots_attribute, class_attribute, module_flag, module_eps,
    dropout_rate, dropout_off, exchanged_module, appended_module, new_hook, exchanged_forward, exchanged_parameter,
    forward_of_one_instance, tensor_hook, accumulation_hook, attribute_of_a_dict, attribute_of_a_function,
    numpy_array, numpy_array_in_an_object, exchanged_partial, draw_by_a_tensor,
    parameter_data, module_dtype, frozen_parameter, optimizer_group, closure_tensor, closure_tensor_shape,
    tensor_in_place, tensor_in_list, tied_then_untied,
]  # fmt: skip


@pytest.mark.parametrize("make", WORLDS, ids=lambda make: make.__name__)
def test_a_change_after_capture_counts_in_the_next_call(make: Any) -> None:
    twins = Twins(make)
    twins.settle(X)
    before = twins.call(X)
    assert twins.replays(X)
    twins.both(lambda world: world.change())
    after = twins.call(X)
    assert make is frozen_parameter or str(before) != str(after), "the change changes nothing; a weak test"
    twins.settle(X)


def test_globals_and_functions_called_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    twins = Twins(lambda: _world(lambda x: helper(x) * TABLE["deep"]["list"][0] * Config.scale))
    twins.settle(X)
    monkeypatch.setitem(globals(), "SCALE", 5.0)
    assert torch.equal(twins.call(X), X * 5 * 2 * 2)
    monkeypatch.setitem(TABLE, "deep", {"list": [7.0]})
    assert torch.equal(twins.call(X), X * 5 * 7 * 2)
    monkeypatch.setattr(Config, "scale", -1.0)
    assert torch.equal(twins.call(X), X * 5 * 7 * -1)


ACTIVATION = torch.relu


def test_a_global_name_of_a_library_function(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = compile(lambda x: ACTIVATION(x), backend="fx")
    for _ in range(3):
        captured(X)
    monkeypatch.setitem(globals(), "ACTIVATION", torch.tanh)
    assert torch.equal(captured(X), torch.tanh(X))


def test_values_of_a_users_module(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, inner = types.ModuleType("settings"), types.ModuleType("settings.inner")
    settings.inner, inner.rate, inner.options = inner, 2.0, {"k": 1.0}  # type: ignore[attr-defined] # as imports do
    monkeypatch.setitem(globals(), "settings", settings)
    captured = compile(lambda x: x * settings.inner.rate * globals()["settings"].inner.options["k"], backend="fx")
    by_name = compile(_with_settings, backend="fx")
    for _ in range(3):
        assert torch.equal(by_name(X), X * 2)
        captured(X)
    inner.rate = 3.0  # type: ignore[attr-defined] # as above
    assert torch.equal(by_name(X), X * 3)
    assert torch.equal(captured(X), X * 3)
    inner.options["k"] = 4.0
    assert torch.equal(by_name(X), X * 12)


def _with_settings(x: torch.Tensor) -> torch.Tensor:
    return x * settings.inner.rate * settings.inner.options["k"]  # type: ignore[name-defined] # noqa: F821 # set above


def test_a_draw_by_an_argument_uses_the_one_of_this_call() -> None:
    captured = compile(lambda p: torch.bernoulli(p), backend="fx")
    for value in (0.0, 1.0, 0.0, 1.0):
        assert torch.equal(captured(torch.full((3,), value)), torch.full((3,), value))
    assert captured.captured.replayed == 3


@pytest.mark.parametrize(
    "other",
    [
        pytest.param((X.float(),), id="dtype"),
        pytest.param((X[:1],), id="shape"),
        pytest.param((X.t().contiguous().t(),), id="layout"),
        pytest.param((X, 3.0), id="a number more"),
        pytest.param((X.clone().requires_grad_(),), id="requires_grad"),
    ],
)
def test_other_arguments_are_recorded_anew(other: Any) -> None:
    twins = Twins(lambda: _world(lambda x, k=2.0: (x * k).detach()))
    twins.settle(X)
    recorded = twins.captured.recorded
    twins.call(*other)
    assert twins.captured.recorded == recorded + 1
    assert twins.replays(X), "the first recording still stands"


def test_numbers_and_structures_among_the_arguments() -> None:
    def step(batch: dict[str, Any], *, k: float) -> torch.Tensor:
        return batch["x"] * k + batch["more"][0]

    captured = compile(step, backend="fx")
    for k in (2.0, 2.0, 3.0, 3.0, 2.0):
        x, y = torch.randn(3), torch.randn(3)
        assert torch.equal(captured({"x": x, "more": [y]}, k=k), x * k + y)
    assert captured.captured.recorded == 2
    assert captured.captured.replayed == 3


@pytest.mark.parametrize("value", [2, 2.0, True, -0.0, 0.0, float("nan")])
def test_a_number_counts_by_type_and_sign(value: Any) -> None:
    captured = compile(lambda x, k: x * k, backend="fx")
    x = torch.ones(2, dtype=torch.int64)
    for k in (1, 1, value, value):
        out, expected = captured(x, k), x * k
        assert out.dtype == expected.dtype
        assert str(out) == str(expected)


def test_the_same_tensor_twice_is_not_two_tensors() -> None:
    def step(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a.add_(1.0)
        return a * b

    captured = compile(step, backend="fx")
    for _ in range(3):
        same = torch.ones(2)
        assert torch.equal(captured(same, same), torch.full((2,), 4.0))
        assert torch.equal(captured(torch.ones(2), torch.ones(2)), torch.full((2,), 2.0))


def test_an_argument_that_shares_memory_with_written_state() -> None:
    state = torch.zeros(4)

    def step(x: torch.Tensor) -> torch.Tensor:
        state.add_(1.0)
        return x * 2

    captured = compile(step, backend="fx")
    for _ in range(3):
        captured(torch.ones(2))
    assert captured.captured.replayed == 2
    with pytest.warns(UserWarning, match="share memory"):
        assert torch.equal(captured(state[:2]), torch.full((2,), 8.0))
    assert captured.captured.replayed == 2


@pytest.mark.parametrize("mode", ["no_grad", "autocast", "dtype", "inference"])
def test_modes_of_torch_are_watched(mode: str) -> None:
    weight = torch.randn(3, 3)
    captured = compile(lambda x: torch.ones(3) + x @ weight, backend="fx")
    x = torch.randn(2, 3)
    contexts = {
        "no_grad": torch.no_grad,
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        "inference": torch.inference_mode,
    }
    for _ in range(3):
        captured(x)
    recorded = captured.captured.recorded
    if mode == "dtype":
        torch.set_default_dtype(torch.float64)
        try:
            out = captured(x)
        finally:
            torch.set_default_dtype(torch.float32)
        assert out.dtype == torch.float64
    else:
        with contexts[mode]():
            out, expected = captured(x), torch.ones(3) + x @ weight
        assert torch.equal(out, expected)
        assert out.is_inference() == expected.is_inference()
    assert captured.captured.recorded == recorded + 1


def test_equal_values_set_again_record_nothing() -> None:
    options = {"k": 2.5, "betas": (0.5, 0.75)}
    captured = compile(lambda x: x * options["k"] * options["betas"][0], backend="fx")
    for index in range(5):
        options["k"] = float(f"{2.5}")
        options["betas"] = (float("0.5"), float("0.75"))
        captured(torch.ones(2))
        assert captured.captured.recorded == 1, index


def test_a_tensor_exchanged_each_time_is_looked_up_not_recorded() -> None:
    box = SimpleNamespace(x=torch.zeros(3))
    captured = compile(lambda: box.x * 2, backend="fx")
    for index in range(6):
        box.x = torch.full((3,), float(index))
        assert torch.equal(captured(), box.x * 2)
    assert captured.captured.recorded == 1
    assert captured.captured.replayed == 5


def test_no_more_recordings_are_kept_than_said() -> None:
    from memberwise.capture.step import KEPT

    captured = compile(lambda x, k: x * k, backend="fx")
    with pytest.warns(UserWarning, match="MW503"):
        for k in range(3 * KEPT):
            captured(torch.ones(1), k)
    assert len(captured.captured.programs) == KEPT


def test_m_changes() -> None:
    captured = compile(lambda w, x: (w * x).sum(1), backend="fx")
    for members in (2, 3, 2, 3, 5, 2):
        w, x = torch.randn(members, 4), torch.randn(4)
        assert torch.equal(captured(w, x), (w * x).sum(1))
    assert captured.captured.recorded == 3
