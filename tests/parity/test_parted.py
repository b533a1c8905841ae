"""Where members parted ways once, the next call does not fail first; another kind of call tries anew."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import memberwise
from memberwise.engine import boundary, parted
from memberwise.testing.tolerance import assert_equal
from tests.parity.loops import numbers

pytestmark = pytest.mark.filterwarnings("ignore::memberwise.errors.StackWarning")


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Each stacked run that is begun."""
    begun: list[Any] = []
    run = boundary._run_stacked

    def counted(*args: Any) -> Any:
        begun.append(args[0])
        return run(*args)

    monkeypatch.setattr(boundary, "_run_stacked", counted)
    return begun


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * self.weight
        return y * 2 if y.detach().sum() > 0 else y * 3


class Holds(nn.Module):
    """Its part parts ways, and itself does not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.reads = nn.Linear(3, 3), Reads()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.reads(self.first(x)).tanh()


def stack_of(kind: type[nn.Module]) -> tuple[Callable[..., Any], list[Any]]:
    models = [kind().double() for _ in range(4)]
    return memberwise.stack(models), models


def by_functional_call(kind: type[nn.Module]) -> tuple[Callable[..., Any], list[Any]]:
    models = [kind().double() for _ in range(4)]
    params, buffers = memberwise.stack_module_state(models)
    template = kind().double()

    def call(p: Any, b: Any, x: torch.Tensor) -> Any:
        return memberwise.functional_call(template, (p, b), x)

    run = memberwise.vmap(call, (0, 0, None))

    def train(mode: bool) -> None:
        template.train(mode)

    def called(x: torch.Tensor) -> Any:
        return run(params, buffers, x)

    called.train = train  # type: ignore[attr-defined] # as a stack has it
    return called, models


WAYS = [stack_of, by_functional_call]


@pytest.mark.parametrize("kind", [Reads, Holds])
@pytest.mark.parametrize("way", WAYS)
def test_the_second_call_does_not_fail_first(way: Any, kind: type[nn.Module], tries: list[Any]) -> None:
    run, models = way(kind)
    is_part = way is stack_of and kind is Holds  # then the rest of the call stays stacked
    for call, expected in enumerate([2 if is_part else 1, int(is_part), int(is_part)]):
        tries.clear()
        x = numbers(5, 3, seed=call, grad=False)
        out = run(x)
        assert len(tries) == expected, f"call {call}"
        assert_equal(out.detach(), torch.stack([model(x).detach() for model in models]))


@pytest.mark.parametrize("way", WAYS)
def test_another_signature_tries_anew(way: Any, tries: list[Any]) -> None:
    run, _ = way(Reads)
    x = numbers(5, 3, grad=False)
    run(x)
    for mode, given, expected in ((True, x[:2], 1), (True, x.float(), 1), (False, x, 1), (True, x, 0), (False, x, 0)):
        run.train(mode)
        tries.clear()
        run(given)
        assert len(tries) == expected


def test_which_arguments_are_stacked_is_part_of_the_signature(tries: list[Any]) -> None:
    def func(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a * 2 if (a + b).sum() > 0 else b

    x = torch.tensor([[1.0, 1.0], [-5.0, -5.0]])
    for in_dims in ((0, 0), (0, None), (0, 0), (0, None)):
        memberwise.vmap(func, in_dims)(x, x[0] if in_dims[1] is None else x)
    assert len(tries) == 2


def test_members_that_agree_again_are_found_after_a_while(tries: list[Any]) -> None:
    def func(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x * 3

    apart, together = torch.tensor([[1.0], [-1.0]]), torch.ones(2, 1)
    run = memberwise.vmap(func)
    run(apart)
    for _ in range(parted.FIRST_WAIT):
        run(together)
    assert len(tries) == 1
    run(together)
    run(together)
    assert len(tries) == 3
    run(apart)  # they part again, and the wait is twice as long
    for _ in range(2 * parted.FIRST_WAIT):
        run(apart)
    assert len(tries) == 4


def test_an_error_of_a_member_is_no_parting(tries: list[Any]) -> None:
    """The next call may be right."""

    def func(x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 5:
            raise ArithmeticError("large")
        return x * 2

    run = memberwise.vmap(func)
    with pytest.raises(ArithmeticError):
        run(torch.tensor([[1.0], [9.0]]))
    tries.clear()
    run(torch.ones(2, 1))
    run(torch.ones(2, 1))
    assert len(tries) == 2


def test_a_selected_stack_and_a_copy_remember(tries: list[Any]) -> None:
    run, models = stack_of(Reads)
    assert isinstance(run, memberwise.Stack)
    x = numbers(5, 3, grad=False)
    run(x)
    tries.clear()
    out = run.select([2, 0])(x)
    assert not tries
    assert_equal(out.detach(), torch.stack([models[i](x).detach() for i in (2, 0)]))


def test_a_function_that_is_gone_is_forgotten() -> None:
    space: dict[str, Any] = {}
    exec("def func(x): return x * 2 if x.sum() > 0 else x", space)
    memberwise.vmap(space["func"])(torch.tensor([[1.0], [-1.0]]))
    assert len(parted.of_functions) == 1
    space.clear()
    gc.collect()
    assert not parted.of_functions


def test_shapes_without_end_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parted, "MOST", 3)

    def func(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x

    for size in range(1, 9):
        memberwise.vmap(func)(torch.stack([torch.ones(size), -torch.ones(size)]))
    (known,) = parted.of_functions.values()
    assert len(known) <= 3


def test_explain_says_what_a_try_has_cost() -> None:
    def func(x: torch.Tensor) -> torch.Tensor:
        return x.sin() * 2 if x.sum() > 0 else x

    x = numbers(4, 4, seed=5, grad=False)
    run = memberwise.vmap(func)
    first, second = memberwise.explain(run, x), memberwise.explain(run, x)
    (undone,) = [row for row in first.rows if row.path == "undone"]
    assert undone.op == "func" and undone.count == 1 and undone.seconds > 0 and "host" in undone.reason
    assert not [row for row in second.rows if row.path == "undone"]
    assert [(row.op, row.count) for row in second.slow] == [("func", 1)]
