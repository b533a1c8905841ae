"""Lesson: where members part ways the half-done run is undone, and no user code can swallow the signal."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import memberwise
from memberwise.engine import trace
from memberwise.testing.tolerance import assert_equal
from tests.parity.loops import check, numbers

pytestmark = [
    pytest.mark.usefixtures("composites"),
    pytest.mark.filterwarnings("ignore::memberwise.errors.StackWarning"),
]


def differs(x: torch.Tensor) -> bool:
    return bool(x.detach().sum() > 0)


def swallows(x: torch.Tensor) -> torch.Tensor:
    try:
        positive = differs(x)
    except Exception:
        return x * 100
    return x * 2 if positive else x * 3


def swallows_runtime_error(x: torch.Tensor) -> torch.Tensor:
    with contextlib.suppress(RuntimeError, ValueError, TypeError):
        return x * (2 if differs(x) else 3)
    return x * 100


def has_finally(x: torch.Tensor) -> torch.Tensor:
    y = x * 1
    try:
        if differs(x):
            y = y + 1
    finally:
        y = y * 2
    return y


def raises_its_own(x: torch.Tensor) -> torch.Tensor:
    try:
        if differs(x):
            raise KeyError("positive")
    except KeyError:
        return x * 5
    return x


def writes_its_input(x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    state.add_(1.0)
    state[0] = x.detach().sum()
    return x * 2 + state if differs(x) else x * 3


def writes_through_a_view(x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    state.view(2, 2)[1].mul_(3.0)
    state.t_() if state.ndim > 1 else state.neg_()
    return x * 2 + state if differs(x) else x * 3


@pytest.mark.parametrize("func", [swallows, swallows_runtime_error, has_finally, raises_its_own])
def test_signal(func: Callable[[torch.Tensor], torch.Tensor]) -> None:
    check(func, numbers(4, 4, seed=5))


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("func", [writes_its_input, writes_through_a_view])
def test_inputs_are_written_once(func: Callable[..., torch.Tensor], dim: int) -> None:
    state = numbers(4, 4, seed=6, grad=False).movedim(0, dim)
    check(func, numbers(4, 4, seed=5), state, in_dims=[0, dim])


def test_draws_are_undone() -> None:
    def func(x: torch.Tensor) -> torch.Tensor:
        y = F.dropout(x, 0.5) + torch.randn(4, dtype=x.dtype)
        y = y * 2 if differs(y) else y * 3
        return F.dropout(y, 0.5)

    check(func, numbers(4, 4, seed=5), seeds=[7, 8, 9, 10])


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_the_global_stream_is_undone(randomness: str) -> None:
    """With an unseeded run by members the global stream moves as far as the loop's, not twice as far."""

    def func(x: torch.Tensor) -> torch.Tensor:
        y = x + torch.randn(4, dtype=x.dtype)
        return y * 2 if differs(x) else y * 3

    x = numbers(4, 4, seed=5, grad=False)
    torch.manual_seed(0)
    out = memberwise.vmap(func, randomness=randomness)(x)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    members = []
    for row in x:
        if randomness == "same":
            torch.manual_seed(0)
        members.append(func(row))
    assert_equal(out, torch.stack(members))
    assert torch.equal(state, torch.get_rng_state())


class Counting(nn.Module):
    """BatchNorm, dropout, a counter and an attribute of its own, then a host read in which the members differ."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.4)
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(4))
        self.python_calls = 0
        self.last: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.python_calls += 1
        x = self.drop(self.norm(x))
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        self.last = x.detach().sum()
        y = self.linear(x)
        if y.detach().sum() > 0:
            y = y * 2
        return self.drop(y)


def test_buffers_and_draws_after_batch_norm_and_dropout() -> None:
    """The issue's own case: BatchNorm has updated, dropout has drawn, then `.item()` differs; both are undone."""
    models = []
    for i in range(4):
        torch.manual_seed(i)
        models.append(Counting().double())
    params, buffers = memberwise.stack_module_state(models)
    generators = [torch.Generator().manual_seed(10 + i) for i in range(4)]
    x = numbers(5, 4, seed=2, grad=False)
    template = models[0]

    def func(p: Any, b: Any, own: torch.Tensor) -> torch.Tensor:
        return memberwise.functional_call(template, (p, b), (own,))

    for _ in range(2):
        out = memberwise.vmap(func, (0, 0, None), generators=generators)(params, buffers, x)
    out.sum().backward()
    with torch.random.fork_rng(devices=[]):
        for i, model in enumerate(models):
            lone = Counting().double()
            lone.load_state_dict(model.state_dict())
            torch.manual_seed(10 + i)
            # A functional call drops what is assigned to a buffer, as torch's does: alone it must be put back.
            first = lone.mean.clone()
            lone(x)
            lone.mean = first
            expected = lone(x)
            expected.sum().backward()
            assert torch.equal(generators[i].get_state(), torch.get_rng_state())
            assert_equal(out[i].detach(), expected.detach())
            for name, p in lone.named_parameters():
                assert_equal(params[name].grad[i], p.grad, name)
            for name in ("calls", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
                assert_equal(buffers[name][i], dict(lone.named_buffers())[name], name)


def test_agreeing_members_read_the_same_after_an_update() -> None:
    """`.item()` of a counter that all members share a value of: answered, and nothing is undone."""
    models = [nn.BatchNorm1d(4).double() for _ in range(3)]
    params, buffers = memberwise.stack_module_state(models)

    def func(p: Any, b: Any, own: torch.Tensor) -> torch.Tensor:
        out = memberwise.functional_call(models[0], (p, b), (own,))
        return out * int(b["num_batches_tracked"].item())

    x = numbers(3, 5, 4)
    out = memberwise.vmap(func)(params, buffers, x)
    out = memberwise.vmap(func)(params, buffers, x)
    for i, model in enumerate(models):
        model(x[i])
        assert_equal(out[i].detach(), model(x[i]).detach() * 2)
        assert_equal(buffers["running_var"][i], model.running_var)


def test_a_closure_tensor_is_written_as_often_as_alone() -> None:
    def run(mapped: Callable[..., Any]) -> tuple[torch.Tensor, torch.Tensor]:
        total = torch.zeros(4, dtype=torch.float64)

        def func(x: torch.Tensor) -> torch.Tensor:
            total.add_(x.detach())
            return x * 2 if differs(x) else x * 3

        return mapped(func), total

    x = numbers(4, 4, seed=5, grad=False)
    out, total = run(lambda f: memberwise.vmap(f)(x))
    expected, expected_total = run(lambda f: torch.stack([f(row) for row in x]))
    assert_equal(out, expected)
    assert_equal(total, expected_total)


def test_an_error_of_one_member_is_the_error_of_its_lone_run() -> None:
    def func(x: torch.Tensor) -> torch.Tensor:
        if x[0] > 0:
            raise ArithmeticError("positive")
        return x

    x = torch.tensor([[-1.0], [1.0]])
    with pytest.raises(ArithmeticError, match="positive"):
        memberwise.vmap(func)(x)


def test_a_failed_call_leaves_no_trace() -> None:
    """An ordinary error inside: afterwards tensors are plain, and the next call is right."""

    def func(x: torch.Tensor) -> torch.Tensor:
        torch.zeros(3)
        raise KeyError("mine")

    x = numbers(3, 4)
    with pytest.raises(KeyError):
        memberwise.vmap(func)(x)
    assert type(torch.zeros(3)) is torch.Tensor
    check(lambda own: own * 2, x)


def test_warned_once_with_the_users_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "_warned", set())

    def func(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if differs(x) else x * 3

    x = numbers(4, 4, seed=5, grad=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            memberwise.vmap(func)(x)
    messages = [str(w.message) for w in caught if issubclass(w.category, memberwise.errors.StackWarning)]
    assert len(messages) == 1 and "MW207" in messages[0] and __file__ in messages[0]


NESTED: dict[str, Callable[[torch.Tensor], Any]] = {
    "below no_grad": lambda x: (torch.no_grad()(differs)(x) + 1) * x,
    "below grad": lambda x: torch.func.grad(lambda y: (y**3).sum() if differs(x) else (y**2).sum())(x),
    "in a backward hook": lambda x: hooked(x),
    "inside our vmap": lambda x: memberwise.vmap(lambda v: v * 2 if bool(v.detach() > 0) else v * 3)(x),
    "inside torch's autograd.grad": lambda x: torch.autograd.grad(
        (x * (2 if differs(x) else 3)).pow(2).sum(), x, create_graph=True
    )[0],
}


def hooked(x: torch.Tensor) -> torch.Tensor:
    """A hook that runs inside the call, and reads a value."""
    y = x * 2
    y.register_hook(lambda grad: grad * 2 if differs(grad) else grad * 3)
    (found,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    return found


@pytest.mark.parametrize("name", NESTED)
def test_nested(name: str) -> None:
    check(NESTED[name], numbers(4, 4, seed=5))


def test_a_read_in_backward_has_no_way_back_and_says_so() -> None:
    """After the call there is nothing to go back to: a coded error, never a wrong gradient."""

    def func(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y.register_hook(lambda grad: grad * 2 if differs(grad) else grad * 3)
        return y

    x = numbers(4, 4, seed=5)
    out = memberwise.vmap(func)(x)
    with pytest.raises(memberwise.errors.EngineError, match="MW208"):
        (out * numbers(4, 4, seed=8, grad=False)).sum().backward()


BY_MEMBERS: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "a saved buffer is written by the next member": lambda x, s: (s.add_(1.0) * x)[: 2 if differs(x) else 3].sum(),
    "written through detach": lambda x, s: (x.detach().mul_(0.7), x[2:] * (2 if differs(x) else 3))[1],
    "written under no_grad": lambda x, s: torch.no_grad()(lambda: s.mul_(2))() * x * (2 if differs(x) else 3),
    "a view made under no_grad is written": lambda x, s: viewed(x, s) * (2 if differs(x) else 3),
    "written with a gradient": lambda x, s: (s.mul_(x), s * x * (2 if differs(x) else 3))[1],
    "hook": lambda x, s: hooked(x) * s,
    "hook on what was written with gradients off": lambda x, s: hooked_when_written(x) * s,
    "hook on what was written, then written again": lambda x, s: hooked_when_written(s.mul_(x)) * x,
    "requires_grad_": lambda x, s: torch.autograd.grad((s.requires_grad_() * x).sum(), s, create_graph=True)[0]
    * (2 if differs(x) else 3),
}  # fmt: skip


def viewed(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        half = s[:2]
    s.add_(1.0)
    return torch.cat([half, s[2:]]) * x


def hooked_when_written(x: torch.Tensor) -> torch.Tensor:
    """Alone `x` is no view; torch 2.13 ends the process where it is one."""
    with torch.no_grad():
        x.add_(1.0)
    x.register_hook(lambda grad: grad * 2)
    return x * (2 if differs(x) else 3)


@pytest.mark.parametrize("name", BY_MEMBERS)
def test_a_run_by_members_is_m_lone_runs(name: str) -> None:
    """Each member's tensors are its own: no version, no hook and no flag of one reaches another."""
    check(BY_MEMBERS[name], numbers(4, 4, seed=5), numbers(4, 4, seed=6, grad=False))


def test_a_tensor_given_twice_is_one_tensor_to_each_member() -> None:
    """Written through one name, its other name has the history."""
    leaf = numbers(3, 4, seed=5)

    def func(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        assert first is second
        first.mul_(2.0)
        return second * (2 if differs(second) else 3)

    given = leaf * 1
    memberwise.vmap(func)(given, given).sum().backward()
    factors = torch.tensor([[4.0 if differs(row) else 6.0] for row in leaf], dtype=leaf.dtype)
    assert_equal(leaf.grad, factors.expand(3, 4))
    assert_equal(given.detach(), 2 * leaf.detach())
