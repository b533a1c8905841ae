"""register_rule as users meet it: each misuse is an error with a name, and check_rule finds what is wrong where."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import memberwise
from memberwise.engine import operation
from memberwise.errors import ArgumentError, EngineError, KindError
from memberwise.rules.registry import RULES
from memberwise.testing import check_rule
from tests.parity.loops import numbers


@torch.library.custom_op("memberwise_users::shifted", mutates_args=())
def shifted(x: torch.Tensor, by: torch.Tensor, times: float) -> torch.Tensor:
    """`x + times * by`, of `(n, d)` and `(d)`."""
    return x + times * by


shifted.register_autograd(
    lambda ctx, grad: (grad, (grad * ctx.times).sum(0), None),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "times", inputs[2]),
)


def right(info: Any, in_dims: Any, x: torch.Tensor, by: torch.Tensor, times: float) -> Any:
    return x + times * (by.unsqueeze(1) if in_dims[1] == 0 else by), 0


@pytest.fixture(autouse=True)
def no_rule_stays() -> Iterator[None]:
    yield
    RULES.pop(shifted._opoverload, None)
    operation._KNOWN.pop(shifted._opoverload, None)


def both() -> torch.Tensor:
    x, by = numbers(3, 5, 4, grad=False), numbers(3, 4, seed=1, grad=False)
    return memberwise.vmap(lambda x, by: shifted(x, by, 2.0))(x, by)


REGISTERED: dict[str, tuple[Callable[[], Any], type, str]] = {
    "no operator": (lambda: memberwise.register_rule(torch.sin, right), KindError, "expected an operator"),
    "a packet": (lambda: memberwise.register_rule(torch.ops.aten.add, right), KindError, "aten.add.Tensor"),
    "no function": (lambda: memberwise.register_rule(shifted, 3), KindError, "is a int, which cannot be called"),
    "too few": (lambda: memberwise.register_rule(shifted, lambda x: x), KindError, "cannot take its arguments"),
    "another name": (
        lambda: memberwise.register_rule(torch.ops.aten.zeros.default, lambda info, in_dims, size: (size, None)),
        KindError,
        "dtype",
    ),
    "twice": (
        lambda: [memberwise.register_rule(shifted, right), memberwise.register_rule(shifted, right)],
        ArgumentError,
        "has a rule already",
    ),
}


@pytest.mark.parametrize("name", REGISTERED)
def test_misuse_of_register_rule(name: str) -> None:
    call, kind, text = REGISTERED[name]
    before = dict(RULES)
    with pytest.raises(kind, match=rf"(?s){text}.*MW213"):
        call()
    assert RULES.keys() - {shifted._opoverload} == before.keys() - {shifted._opoverload}


ANSWERS: dict[str, tuple[Callable[..., Any], str]] = {
    "no pair": (lambda *args: right(*args)[0], "a Tensor, expected a pair"),
    "out_dims 1": (lambda *args: (right(*args)[0].movedim(0, 1), 1), "out_dims 1"),
    "out_dims True": (lambda *args: (right(*args)[0], True), "out_dims True"),
    "two out_dims": (lambda *args: (right(*args)[0], [0, 0]), "2 out_dims for 1 results"),
    "no member axis": (lambda *args: (right(*args)[0][0], 0), r"result 0 of shape \(5, 4\)"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_of_another_form(name: str) -> None:
    rule, text = ANSWERS[name]
    memberwise.register_rule(shifted, rule)
    with pytest.raises(EngineError, match=rf"(?s){text}.*in_dims \[0, 0, None\].*MW213"):
        both()


def checked() -> Any:
    sample = torch.randn(5, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64), 2.0
    return check_rule(shifted, *sample, batch_dims=(0, None, None))


def test_a_right_rule_in_every_way_it_is_run() -> None:
    memberwise.register_rule(shifted, right)
    found = checked()
    assert not found.declined
    ran = [name.split(" (")[0] for name in found.by_rule]
    for way in ("M=1", "other memory", "batch 0", "batch 1", "torch.float16", "torch.complex128", "autocast"):
        assert way in ran, way
    assert {"(0, 0, None)", "(0, None, None)", "(None, 0, None)"} <= {*found.by_rule}


WRONG: dict[str, tuple[Callable[..., Any], str]] = {
    "a shared argument": (
        lambda info, in_dims, x, by, times: right(info, in_dims, x, by if in_dims[1] == 0 else by * 2, times),
        r"\(0, None, None\): result 0.*Greatest absolute difference",
    ),
    "its type": (
        lambda *args: (right(*args)[0].float(), 0),
        r"\(0, 0, None\): result 0.*float32",
    ),
    "its shape": (lambda *args: (right(*args)[0].unsqueeze(-1), 0), r"\(0, 0, None\): result 0"),
    "an error": (lambda *args: 1 / 0, "MW211"),
    "an error where one is shared": (
        lambda info, in_dims, *args: right(info, in_dims, *args) if in_dims[0] == 0 else 1 / 0,
        r"in_dims \[None, 0, None\].*MW211",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rule_is_told_where_and_how_far_off(name: str) -> None:
    rule, text = WRONG[name]
    memberwise.register_rule(shifted, rule)
    with pytest.raises((AssertionError, EngineError), match=rf"(?s){text}"):
        checked()
