"""Custom operators, with and without a vmap registration, an autograd registration, mutation; torch.library's kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import memberwise
from memberwise import vmap
from memberwise.testing.tolerance import assert_equal
from tests.parity.loops import check, numbers

pytestmark = [
    pytest.mark.usefixtures("composites"),
    pytest.mark.filterwarnings("ignore::memberwise.errors.StackWarning"),
]


@torch.library.custom_op("memberwise_parity::plain", mutates_args=())
def plain(x: torch.Tensor, scale: float) -> torch.Tensor:
    assert x.ndim == 1, "an operator written for one member must see one member"
    return torch.from_numpy(x.detach().numpy() * scale)


@torch.library.custom_op("memberwise_parity::with_backward", mutates_args=())
def with_backward(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    assert x.ndim == 1
    return x.sin() * y


def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def backward(ctx: Any, grad: torch.Tensor) -> Any:
    x, y = ctx.saved_tensors
    return grad * x.cos() * y, grad * x.sin()


with_backward.register_autograd(backward, setup_context=setup_context)


@torch.library.custom_op("memberwise_parity::with_vmap", mutates_args=())
def with_vmap(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x.sin() * y


with_vmap.register_autograd(backward, setup_context=setup_context)
CALLS: list[Any] = []


@with_vmap.register_vmap
def with_vmap_rule(info: Any, in_dims: Any, x: torch.Tensor, y: torch.Tensor) -> Any:
    CALLS.append((info.batch_size, in_dims))
    x = x.movedim(in_dims[0], 0) if in_dims[0] is not None else x.expand(info.batch_size, *x.shape)
    y = y.movedim(in_dims[1], 0) if in_dims[1] is not None else y
    return x.sin() * y, 0


@torch.library.custom_op("memberwise_parity::mutates", mutates_args=("out",))
def mutates(x: torch.Tensor, out: torch.Tensor) -> None:
    assert x.ndim == 1
    out.copy_(x * 2 + out)


@torch.library.custom_op("memberwise_parity::several", mutates_args=())
def several(xs: list[torch.Tensor], k: int) -> tuple[torch.Tensor, torch.Tensor]:
    assert all(x.ndim == 1 for x in xs)
    return torch.stack(xs).sum(0) * k, torch.tensor(k)


@torch.library.custom_op("memberwise_parity::draws", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def draws(x: torch.Tensor) -> torch.Tensor:
    return x + torch.rand(x.shape, dtype=x.dtype)


@torch.library.custom_op("memberwise_parity::ours", mutates_args=())
def ours(x: torch.Tensor) -> torch.Tensor:
    assert x.ndim == 1
    return x * 3


LIBRARY = torch.library.Library("memberwise_parity_old", "DEF")
LIBRARY.define("composite(Tensor x) -> Tensor")
LIBRARY.define("cpu(Tensor x) -> Tensor")
LIBRARY.impl("composite", lambda x: x.sin() * x.shape[0], "CompositeImplicitAutograd")
LIBRARY.impl("cpu", lambda x: x * x.shape[0] * 2, "CPU")


def mutated(x: torch.Tensor) -> Any:
    out = torch.ones(4, dtype=x.dtype)
    alias = out[1:3]
    mutates(x.detach(), out)
    return out * x, alias


PROGRAMS: dict[str, Callable[..., Any]] = {
    "without anything": lambda x, y: plain(x.detach(), 2.0) * y,
    "with backward": lambda x, y: with_backward(x, y),
    "with backward, used twice": lambda x, y: with_backward(with_backward(x, y), x),
    "with vmap": lambda x, y: with_vmap(x, y),
    "gradient of it": lambda x, y: torch.autograd.grad(with_backward(x, y).sum(), x, create_graph=True)[0] * y,
    "mutating a fresh tensor": lambda x, y: mutated(x),
    "several": lambda x, y: [several([x.detach(), y.detach()], 3)[0] * x, several([y.detach()], 2)[1] * y],
    "old composite": lambda x, y: torch.ops.memberwise_parity_old.composite(x) * y,
    "old cpu": lambda x, y: torch.ops.memberwise_parity_old.cpu(x.detach()) * y,
}


@pytest.mark.parametrize("shared", [None, 0, 1], ids=["all own", "first shared", "second shared"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_operator(name: str, shared: int | None) -> None:
    args = [numbers(3, 4), numbers(3, 4, seed=1)]
    args = [t[0].detach().requires_grad_() if k == shared else t for k, t in enumerate(args)]
    check(PROGRAMS[name], *args, in_dims=[None if k == shared else 0 for k in range(2)])


def test_a_registered_vmap_is_used() -> None:
    CALLS.clear()
    check(lambda x, y: with_vmap(x, y), numbers(3, 4), numbers(4, seed=1), in_dims=[0, None])
    assert CALLS == [(3, (0, None))]


def test_mutating_an_input() -> None:
    def func(x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        mutates(x.detach(), state)
        return x * 2

    check(func, numbers(3, 4), numbers(3, 4, seed=2, grad=False))
    check(func, numbers(3, 4), numbers(4, 3, seed=2, grad=False), in_dims=[0, 1])


def test_draws_in_an_operator_that_says_so() -> None:
    check(lambda x: draws(x.detach()) * x, numbers(3, 4), seeds=[1, 2, 3])


@pytest.fixture
def rule() -> Iterator[list[int]]:
    """A rule for the last operator, taken away again."""
    from memberwise.rules.registry import RULES

    calls: list[int] = []

    @memberwise.register_rule(ours)
    def ours_rule(info: Any, in_dims: Any, x: torch.Tensor) -> Any:
        calls.append(info.batch_size)
        return x * 3, in_dims[0]

    yield calls
    del RULES[ours._opoverload]
    for tell in __import__("memberwise.rules.registry", fromlist=["_listeners"])._listeners:
        tell(ours._opoverload)


def test_a_rule_of_the_user(rule: list[int]) -> None:
    x = numbers(3, 4, grad=False)
    assert_equal(vmap(lambda own: ours(own))(x), x * 3)
    assert rule == [3]
    with pytest.raises(ValueError, match=r"rule already.*MW213"):
        memberwise.register_rule(ours, lambda info, in_dims, x: (x, 0))


def test_without_the_rule_it_runs_by_members() -> None:
    x = numbers(3, 4, grad=False)
    assert_equal(vmap(lambda own: ours(own))(x), x * 3)


def test_triton_like_flop_counter_and_profiler_work_around_a_call() -> None:
    """Tools that watch operations see the call's, and change nothing."""
    from torch.profiler import ProfilerActivity, profile
    from torch.utils.flop_counter import FlopCounterMode

    x, w = numbers(3, 4, grad=False), numbers(3, 4, 4, seed=1, grad=False)
    expected = torch.stack([w[i] @ x[i] for i in range(3)])
    with FlopCounterMode(display=False) as counter:
        assert_equal(vmap(lambda a, b: b @ a)(x, w), expected)
    assert counter.get_total_flops() > 0
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        assert_equal(vmap(lambda a, b: b @ a)(x, w), expected)
    assert any("mm" in event.key or "mv" in event.key for event in recorded.key_averages())
