"""Members that differ in plain settings: each runs with its own, one call where a rule takes it, and draws as alone."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import memberwise
from memberwise.engine.values import MemberValue
from memberwise.errors import StackAttributeError, StackWarning
from memberwise.rules.registry import SETTINGS
from memberwise.testing.tolerance import assert_equal
from tests.parity.stacks import assert_same_state, backward, inputs, run_alone, twins


def between(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), *layers, nn.Linear(4, 2)).double()


TAKEN: dict[Any, Callable[[int], nn.Module]] = {
    F.dropout: lambda i: between(nn.Dropout((0.2, 0.0, 0.5, 1.0)[i])),
    F.layer_norm: lambda i: between(nn.LayerNorm(4, eps=10.0 ** (i - 4))),
    F.group_norm: lambda i: between(nn.GroupNorm(2, 4, eps=10.0 ** (i - 4))),
    F.batch_norm: lambda i: between(nn.BatchNorm1d(4, eps=10.0 ** (i - 4), momentum=0.1 + 0.2 * i)),
    F.leaky_relu: lambda i: between(nn.LeakyReLU(0.1 * i)),
    F.elu: lambda i: between(nn.ELU(0.5 + i)),
}
"""Functions that take a number a member, and member i of a stack that differs in it."""

OTHERS: dict[str, Callable[[int], nn.Module]] = {
    "momentum alone": lambda i: between(nn.BatchNorm1d(4, momentum=0.1 + 0.2 * i)),
    "eps alone": lambda i: between(nn.BatchNorm1d(4, eps=10.0 ** (i - 4))),
    "eps without statistics": lambda i: between(nn.BatchNorm1d(4, eps=10.0 ** (i - 4), track_running_stats=False)),
    "eps of which one is zero": lambda i: between(nn.LayerNorm(4, eps=0.1 * i)),
    "a momentum that one leaves out": lambda i: between(nn.BatchNorm1d(4, momentum=None if i == 1 else 0.1 + 0.1 * i)),
    "a slope in place": lambda i: between(nn.LeakyReLU(0.1 * i, inplace=True)),
    "dropout in place": lambda i: between(nn.Dropout(0.1 + 0.2 * i, inplace=True)),
    "dropout of other dimensions": lambda i: between(nn.Dropout1d(0.1 + 0.2 * i)),
    "alpha dropout": lambda i: between(nn.AlphaDropout(0.1 + 0.2 * i)),
    "no rule": lambda i: between(nn.Softplus(0.5 + i)),
    "bounds": lambda i: between(nn.Hardtanh(-0.1 * (i + 1), 0.2 * (i + 1))),
    "in place or not": lambda i: between(nn.ReLU(inplace=i == 1)),
    "other activations": lambda i: between((nn.ReLU(), nn.Tanh(), nn.GELU(), nn.GELU("tanh"))[i]),
    "other modules on the same parameters": lambda i: between(nn.LayerNorm(4) if i == 1 else nn.GroupNorm(1, 4)),
    "rate and order in a transformer": lambda i: nn.Sequential(
        nn.Linear(3, 4), nn.TransformerEncoderLayer(4, 2, 8, 0.1 * i, norm_first=i == 2)
    ).double(),
    "dropout between recurrent layers": lambda i: Recurrent(0.1 + 0.2 * i).double(),
}


class Recurrent(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.layers = nn.LSTM(3, 4, 2, dropout=rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)[0]


@contextmanager
def drawing(stream: torch.Generator) -> Iterator[None]:
    """Plain torch, its global stream standing where `stream` does."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(stream.get_state())
        yield
        stream.set_state(torch.get_rng_state())


def streams(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(10 + i) for i in range(count)]


def run(model: nn.Module, stream: torch.Generator, x: torch.Tensor) -> torch.Tensor:
    with drawing(stream):
        return model(x)


def check(models: Sequence[nn.Module], x: torch.Tensor, calls: int = 2) -> memberwise.Stack:
    """The stack equals its members in outputs, gradients, buffers and draws, over several calls."""
    alone, stack = twins(models), memberwise.stack(models)
    stack.generators, own = streams(len(models)), streams(len(models))
    for _ in range(calls):
        out = stack(x)
        backward(out)
        expected = run_alone(alone, lambda model, i: run(model, own[i], x))
        assert_equal(out.detach(), expected, "output")
        for mine, theirs in zip(stack.generators, own, strict=True):
            assert torch.equal(mine.get_state(), theirs.get_state())
    assert_same_state(stack, alone)
    return stack


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("function", TAKEN, ids=lambda function: function.__name__)
def test_a_number_that_a_rule_takes(function: Any, training: bool) -> None:
    models = [TAKEN[function](i).train(training) for i in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", StackWarning)  # nothing of it runs member by member
        check(models, inputs(5, 3).detach())


def test_every_function_that_takes_a_number_has_a_case() -> None:
    assert set(TAKEN) == set(SETTINGS)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.filterwarnings("ignore::memberwise.errors.StackWarning")
def test_what_no_rule_takes_runs_by_members(name: str, training: bool) -> None:
    check([OTHERS[name](i).train(training) for i in range(4)], inputs(5, 3).detach())


def test_dropout_of_memory_in_another_order() -> None:
    class Turned(nn.Module):
        def __init__(self, rate: float) -> None:
            super().__init__()
            self.layer, self.drop = nn.Linear(3, 4), nn.Dropout(rate)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.drop(self.layer(x).t()) + self.drop(self.layer(x)[:, ::2]).sum()

    check([Turned(0.2 * i).double() for i in range(3)], inputs(5, 3).detach())


@dataclasses.dataclass
class Config:
    rate: float = 0.1
    width: int = 2
    more: Any = None


class With(nn.Module):
    """A layer, and what is done with its output and a value of the model's own."""

    def __init__(self, does: Callable[[Any, torch.Tensor], Any], value: Any) -> None:
        super().__init__()
        self.layer, self.does, self.value = nn.Linear(3, 3), does, value

    def forward(self, x: torch.Tensor) -> Any:
        return self.does(self, self.layer(x))


def anneal(self: Any, x: torch.Tensor) -> torch.Tensor:
    self.value = self.value * 0.9
    return x * self.value


def anneal_some(self: Any, x: torch.Tensor) -> torch.Tensor:
    if self.value > 0.15:
        self.value = self.value / 2
    return x * self.value


class Thing:
    """An object that can be compared by what is in it only."""

    def __init__(self, **entries: Any) -> None:
        vars(self).update(entries)


def grow(self: Any, x: torch.Tensor) -> torch.Tensor:
    self.value.append(4)
    return x * len(self.value)


def repeat(self: Any, x: torch.Tensor) -> torch.Tensor:
    for _ in range(self.value):
        x = x.tanh() + 1
    return x


USES: dict[str, tuple[Callable[[Any, torch.Tensor], Any], list[Any]]] = {
    "sides": (lambda m, x: m.value - x + (1 - m.value) * x / m.value, [0.5, 2.0, 3.0]),
    "power": (lambda m, x: (x.abs() + 1) ** m.value + m.value**x, [0.5, 2.0, 3.0]),
    "type of a 0-d result": (lambda m, x: (x.float().sum() * m.value) * m.value, [0.1, 0.2, 0.3]),
    "type beside ints": (lambda m, x: x.sum() + torch.arange(3) * m.value, [0.1, 0.2, 0.3]),
    "ints stay ints": (lambda m, x: x.sum() + (torch.arange(3) * m.value).float(), [1, 2, 3]),
    "one is an int": (lambda m, x: x * m.value + m.value, [1, 0.5, 2]),
    "where": (lambda m, x: torch.where(x > 0, x, m.value), [0.1, 0.2, 0.3]),
    "in place": (lambda m, x: x.clone().mul_(m.value).add_(m.value), [0.1, 0.2, 0.3]),
    "written at an index": (lambda m, x: F.pad(x, (1, 0)).index_fill(1, torch.tensor([0]), m.value), [0.1, 0.2, 0.3]),
    "a new tensor": (lambda m, x: x + torch.full((3,), m.value), [0.1, 0.2, 0.3]),
    "the host": (lambda m, x: x * math.sqrt(m.value), [0.1, 0.2, 0.3]),
    "a condition": (lambda m, x: x * 2 if m.value > 0.15 else x, [0.1, 0.2, 0.3]),
    "a condition that agrees": (lambda m, x: x * m.value if 0 < m.value < 1 else x, [0.1, 0.2, 0.3]),
    "its type": (lambda m, x: x * m.value if isinstance(m.value, float) else x, [0.1, 0.2, 0.3]),
    "a key": (lambda m, x: {"a": torch.tanh, "b": torch.relu}[m.value](x), ["a", "b", "a"]),
    "a name": (lambda m, x: getattr(torch, m.value)(x), ["tanh", "relu", "tanh"]),
    "a mode of torch's": (lambda m, x: F.interpolate(x[None], scale_factor=2, mode=m.value), ["nearest", "linear"]),
    "none or a number": (lambda m, x: x if m.value is None else x * m.value, [None, 0.2, 0.3]),
    "a flag": (lambda m, x: x * 2 if m.value is True else x, [True, False, True]),
    "a function": (lambda m, x: m.value(x), [torch.tanh, F.gelu, torch.relu]),
    "a pair": (lambda m, x: x * m.value[0] + sum(m.value), [(0.1, 0.2), (0.3, 0.4)]),
    "a size": (repeat, [1, 3, 2]),
    "a config": (lambda m, x: x * m.value.rate * m.value.more["a"], [Config(0.1 * i, more={"a": i}) for i in (1, 2)]),
    "a namespace": (lambda m, x: x * m.value.rate, [types.SimpleNamespace(rate=0.1 * i) for i in (1, 2)]),
    "tensors of several shapes": (lambda m, x: x + m.value.sum(), [torch.ones(2), torch.ones(3)]),
    "an argument of a function": (lambda m, x: F.huber_loss(x, 2 * x, delta=m.value), [0.1, 0.2, 0.3]),
    "an option in C": (lambda m, x: torch.add(x, x, alpha=m.value), [0.1, 0.2, 0.3]),
    "an array": (lambda m, x: x * torch.from_numpy(m.value), [np.ones(3), np.arange(3.0), np.zeros(3)]),
    "a set": (lambda m, x: x * 2 if 3 in m.value else x, [{1, 2}, {1, 3}]),
    "lists of several lengths": (lambda m, x: x * sum(m.value), [[1.0], [2.0, 3.0]]),
    "other keys": (lambda m, x: x * sum(m.value.values()), [{"a": 1.0}, {"b": 2.0, "c": 3.0}]),
    "a flag of an object": (lambda m, x: x if m.value.flag is True else 2 * x, [Thing(flag=True), Thing(flag=False)]),
    "a number of an object": (lambda m, x: x * m.value.rate, [Thing(rate=0.5, path="a"), Thing(rate=1.5, path="b")]),
    "a list that grows": (grow, [[1], [2, 3]]),
    "set anew in each call": (anneal, [0.1, 0.2, 0.3]),
    "set anew by some": (anneal_some, [0.1, 0.2, 0.7]),
}
"""What a forward does with a value, and the members' values."""


@pytest.mark.parametrize("name", USES)
@pytest.mark.filterwarnings("ignore::memberwise.errors.StackWarning")
def test_each_member_computes_with_its_own_value(name: str) -> None:
    does, values = USES[name]
    models = [With(does, value).double() for value in values]
    alone = twins(models)
    stack = memberwise.stack(models)
    x = inputs(5, 3).detach()
    for _ in range(2):
        out = stack(x)
        backward(out)
        assert_equal(out.detach(), run_alone(alone, lambda model, _: model(x)))
    assert_same_state(stack, alone)
    for back, model in zip(stack.unstack(), alone, strict=True):
        mine, theirs = (vars(one.value) if isinstance(one.value, Thing) else one.value for one in (back, model))
        assert np.all(np.asarray(mine == theirs))


def test_a_number_or_none_under_a_private_name() -> None:
    models = [With(lambda m, x: x if m._limit is None else x * m._limit, 0).double() for _ in range(2)]
    models[0]._limit, models[1]._limit = None, 0.5  # type: ignore[assignment] # torch types attributes as tensors
    with pytest.warns(StackWarning, match=r"_limit is None in member 0, 0\.5 in member 1(?s:.)*MW106"):
        check(models, inputs(5, 3).detach())


def test_what_a_model_has_collected_makes_nothing_slow() -> None:
    models = [With(lambda m, x: x, [0.1] * (i + 1)) for i in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", StackWarning)
        stack = memberwise.stack(models)
        stack(torch.ones(2, 3))
    assert [model.value for model in stack.unstack()] == [model.value for model in models]


def test_a_text_that_is_returned_comes_as_a_list() -> None:
    stack = memberwise.stack([With(lambda m, x: (x, f"{m.value:.1f}", m.value), value) for value in (0.1, 0.2)])
    with pytest.warns(StackWarning, match="MW207"):
        _, texts, values = stack(torch.ones(2, 3))
    assert (texts, values) == (["0.1", "0.2"], [0.1, 0.2])


def test_a_value_of_one_member_is_not_asked_of_the_stack() -> None:
    stack = memberwise.stack([nn.Dropout(0.1), nn.Dropout(0.2)])
    assert repr(stack.p) == "MemberValue(0.1, 0.2)"
    assert repr(stack.p * 2) == "MemberValue(0.2, 0.4)"
    assert f"{stack.p:.2f}" == "MemberValue(0.10, 0.20)"
    assert "p=MemberValue(0.1, 0.2)" in repr(stack)
    assert (stack[0].p, stack[1].p) == (0.1, 0.2)
    with pytest.raises(StackAttributeError, match=r"one value, and the members have 0\.1, 0\.2.*stack\[i\].*MW306"):
        float(stack.p)


def models_that_differ() -> list[nn.Module]:
    """In rates and in a submodule's class."""
    acts = nn.ReLU(), nn.Tanh(), nn.Sigmoid()
    return [between(nn.Dropout(0.2 * (i + 1)), nn.Sequential(acts[i])) for i in range(3)]


@pytest.mark.filterwarnings("ignore::memberwise.errors.StackWarning")
@pytest.mark.parametrize("how", ["select", "deepcopy", "pickle", "to", "chunks", "slices", "modes"])
def test_settings_travel_with_their_members(how: str) -> None:
    models, x = models_that_differ(), inputs(5, 3).detach()
    stack, order = memberwise.stack(models), [0, 1, 2]
    chunks = 2 if how == "chunks" else None
    if how == "select":
        stack, order = stack.select([2, 0, 2]), [2, 0, 2]
    elif how == "slices":
        stack, order = stack[1:], [1, 2]
    elif how == "deepcopy":
        stack = copy.deepcopy(stack)
    elif how == "pickle":
        stack = pickle.loads(pickle.dumps(stack))
    elif how == "to":
        stack = stack.float().double()
    elif how == "modes":
        stack.eval(members=[1])
        models[1].eval()
    alone, own = [copy.deepcopy(models[i]) for i in order], streams(len(order))
    stack.generators = streams(len(order))
    out = memberwise.vmap(lambda model: model(x), chunk_size=chunks)(stack)
    backward(out)
    assert_equal(out.detach(), run_alone(alone, lambda model, i: run(model, own[i], x)))
    assert_same_state(stack, alone)
    for k, i in enumerate(order):
        assert stack.unstack()[k][1].p == models[i][1].p
        assert type(stack[k][2][0]) is type(models[i][2][0])


def test_what_is_set_on_the_stack_holds_for_all() -> None:
    stack, x = memberwise.stack([nn.LeakyReLU(0.1), nn.LeakyReLU(0.2)]), torch.tensor([-1.0])
    stack.negative_slope = 0.1  # which is member 0's: that it was set must be seen all the same
    assert stack(x).tolist() == torch.tensor([[-0.1], [-0.1]]).tolist()
    assert [model.negative_slope for model in stack.unstack()] == [0.1, 0.1]


def test_hooks_of_some_members_run_for_these() -> None:
    models = [between(nn.ReLU()) for _ in range(3)]
    models[1][1].register_forward_hook(lambda module, args, out: out * 3)
    models[2][1].register_forward_hook(halved)
    with pytest.warns(StackWarning, match=r"(?s)1\.\(forward hooks\) is none in member.*MW106"):
        check(models, inputs(5, 3).detach())


def halved(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
    return out / 2


def test_a_difference_that_makes_a_module_slow_is_told_of_at_once() -> None:
    models = [between(act) for act in (nn.ReLU(), nn.Tanh())]
    with pytest.warns(
        StackWarning, match=r"(?s)1 is .*ReLU in member 0, .*Tanh in member 1.*by member.*MW106"
    ) as caught:
        memberwise.stack(models)
    assert [warning.filename for warning in caught] == [__file__]


def test_verify_knows_members_settings() -> None:
    stack = memberwise.stack([between(nn.Dropout(0.1 * i), nn.LeakyReLU(0.1 * i)) for i in range(3)])
    assert memberwise.verify(stack, inputs(5, 3).detach()).wrong == []


def test_a_step_with_settings_is_captured_and_recorded_anew_when_one_is_set() -> None:
    def make() -> tuple[memberwise.Stack, Callable[[torch.Tensor], torch.Tensor]]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            stack = memberwise.stack([between(nn.Dropout(0.1 + 0.2 * i), nn.LeakyReLU(0.1 * i)) for i in range(3)])
        stack.generators = streams(3)
        optimizer = memberwise.optim.SGD(stack.parameters(), lr=0.1)

        def step(x: torch.Tensor) -> torch.Tensor:
            optimizer.zero_grad()
            losses = stack(x).square().mean((1, 2))
            losses.sum().backward()
            optimizer.step()
            return losses.detach()

        return stack, step

    (eager, step), (captured, other) = make(), make()
    compiled = memberwise.compile(other, backend="fx")
    for k in range(4):
        if k == 2:
            eager.get_submodule("1").p = captured.get_submodule("1").p = MemberValue((0.5, 0.6, 0.7))
        assert_equal(step(inputs(5, 3).detach()), compiled(inputs(5, 3).detach()))
    for mine, theirs in zip(eager.parameters(), captured.parameters(), strict=True):
        assert_equal(mine.detach(), theirs.detach())
