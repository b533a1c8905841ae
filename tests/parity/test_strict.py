"""Strict mode: what a rule raises and no member raises alone is an error; what a member raises is that."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import memberwise
from memberwise.engine import operation, trace
from memberwise.errors import EngineError
from memberwise.rules.registry import COMPOSITES, RULES
from memberwise.testing import strict
from tests.parity.loops import numbers

X = numbers(3, 2, 4)
EXP = torch.ops.aten.exp.default


def broken(*args: Any) -> Any:
    raise KeyError("a fault of the rule")


@pytest.fixture
def broken_exp(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setitem(RULES, EXP, broken)
        operation._KNOWN.pop(EXP, None)
        yield
    operation._KNOWN.pop(EXP, None)


def test_a_broken_rule_is_an_error(broken_exp: None) -> None:
    with pytest.raises(EngineError, match="rule of aten::exp raised KeyError") as caught:
        memberwise.vmap(lambda x: x.exp())(X)
    assert caught.value.code == "MW211"
    assert isinstance(caught.value.__cause__, KeyError)


def test_without_strict_it_is_slow_and_right(broken_exp: None) -> None:
    with strict(False), pytest.warns(memberwise.StackWarning, match="MW207"):
        torch.testing.assert_close(memberwise.vmap(lambda x: x.exp())(X), X.exp())


def test_on_the_ladder_too(broken_exp: None) -> None:
    """With a record being written, an operation takes the longer way."""
    with pytest.raises(EngineError, match="MW211"), trace.recording():
        memberwise.vmap(torch.exp)(X)


@pytest.mark.parametrize("part", ["forward", "backward", "below"])
def test_a_broken_composite_is_an_error(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(COMPOSITES[F.linear], part, broken)
    w = numbers(3, 4, 4, seed=1)
    with pytest.raises(EngineError, match="MW211"):
        memberwise.vmap(lambda x, w: torch.autograd.grad(F.linear(x, w).sum(), x)[0])(X, w)


def test_what_a_member_raises_alone_stays_its_own_error() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught:
        memberwise.vmap(lambda x: x @ torch.ones(7, 7, dtype=x.dtype))(X)
    assert not isinstance(caught.value, EngineError)


@pytest.mark.long
def test_the_variable_switches_it_on() -> None:
    code = (
        "import os, importlib; from memberwise.engine import strict\n"
        "for value in ('1', '0', ''):\n"
        "    os.environ['MEMBERWISE_STRICT'] = value\n"
        "    print(importlib.reload(strict)._enabled)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["True", "False", "False"]
