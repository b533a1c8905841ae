"""The composite rule of relu, by each of its names; and rrelu in evaluation."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.parity.loops import check, numbers
from tests.parity.rule_case import RuleCase, case, of

_aten = torch.ops.aten
CASES = [
    case(function, of(2, 3), name=name, declines=True, batch_dims=(0,))
    for name, function in {"torch": torch.relu, "functional": F.relu, "method": torch.Tensor.relu}.items()
] + [
    case(
        torch.ops.aten.rrelu_with_noise.default, of(2, 3), of(2, 3), 0.1, 0.3, False, state=(1,), stacked=[(0, 1), (1,)]
    ),
    case(_aten.rrelu_with_noise_.default, of(2, 3), of(2, 3), state=(0, 1), stacked=[(0, 1)]),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rule(case: RuleCase) -> None:
    case.check()


def test_in_place() -> None:
    """By the operation itself, whose input may have other readers."""
    check(lambda x: F.relu(x * 2, inplace=True) + 1, numbers(3, 4))


def test_a_result_that_is_changed_afterwards_is_refused_in_backward() -> None:
    """As alone: relu keeps its result."""
    import memberwise

    def changed(x: torch.Tensor) -> torch.Tensor:
        out = torch.relu(x)
        out.add_(1)
        return out

    for func, x in ((changed, numbers(4)), (memberwise.vmap(changed), numbers(3, 4))):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            func(x).sum().backward()
