"""Reductions of everything: to one truth value, with members that differ in it (in random samples they seldom do), and
to the smallest or largest number, whose gradient is filled in where that lies."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import memberwise
from memberwise.testing.tolerance import assert_equal
from tests.parity.loops import check, numbers
from tests.parity.rule_case import RuleCase, case, of

VALUES = torch.tensor([[0, 0], [0, 1], [1, 1]], dtype=torch.bool)


CASES = [
    case(function, of(2, 3), name=name, batch_dims=(0,), declines=True)
    for function, name in (
        (torch.min, "function"),
        (torch.max, "function"),
        (torch.Tensor.min, "method"),
        (torch.Tensor.max, "method"),
    )
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rule(case: RuleCase) -> None:
    case.check()


@pytest.mark.parametrize("op", [torch.min, torch.max])
@pytest.mark.parametrize("values", [[1.0, 1, 2, 2], [0.0, float("nan"), 1, float("nan")], [-float("inf"), 1, 2, 3]])
def test_several_extreme_ones_share_the_gradient(op: Any, values: list[float]) -> None:
    def func(x: torch.Tensor) -> torch.Tensor:
        return op(x * torch.tensor(values, dtype=x.dtype)) * x[0]

    check(func, numbers(3, 4))


@pytest.mark.parametrize("op", [torch.min, torch.max])
def test_a_gradient_that_is_not_finite_reaches_the_extreme_one_alone(op: Any) -> None:
    """torch's formula multiplies by a mask, for a subclass, where it fills one in alone; the second derivative, too."""

    def func(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        (slope,) = torch.autograd.grad(op(x * x) * scale, x, create_graph=True)
        return slope

    x, scale = numbers(3, 4), torch.tensor([1.0, float("nan"), float("inf")], dtype=torch.float64)
    slopes = memberwise.vmap(func)(x, scale)
    (found,) = torch.autograd.grad(slopes.sum(), x)
    for member in range(3):
        alone = x.detach()[member].requires_grad_()
        slope = func(alone, scale[member])
        assert_equal(slopes[member].detach(), slope.detach())
        assert_equal(found[member], torch.autograd.grad(slope.sum(), alone)[0])


@pytest.mark.parametrize("op", [torch.ops.aten.any.default, torch.ops.aten.all.default])
def test_members_that_differ(op: torch._ops.OpOverload) -> None:
    assert memberwise.vmap(op)(VALUES).tolist() == [bool(op(member)) for member in VALUES]
