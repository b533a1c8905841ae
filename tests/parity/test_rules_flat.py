"""Rules of reads and writes among all of a member's values."""

from __future__ import annotations

import pytest
import torch

from tests.parity.loops import check, numbers
from tests.parity.rule_case import RuleCase, case, of, whole

_aten = torch.ops.aten

_MASK = of(3, 4) > 0
_NO_GRADIENT = {"state": (2,)}

CASES = [
    case(_aten.take.default, of(3, 4), torch.tensor([[0, -1], [7, 7], [2, 3]])),
    case(_aten.take.default, of(), torch.tensor([0, -1]), name="of a number"),
    case(_aten.put.default, of(3, 4), torch.tensor([0, -1, 7]), of(3), declines=True),
    case(_aten.put.default, of(3, 4), torch.tensor([[0, -1], [7, 7]]), of(2, 2), True, name="added", declines=True),
    case(_aten.masked_scatter.default, of(3, 4), _MASK, of(13)),
    case(_aten.masked_scatter.default, of(3, 4), _MASK[0], of(2, 6), name="by columns"),
    case(_aten.masked_scatter.default, of(4), _MASK, of(12), name="spread"),
    case(_aten.masked_scatter_backward.default, of(3, 4), _MASK, [2, 6]),
    case(_aten.masked_scatter_backward.default, of(3, 4), _MASK[0], [14], name="by columns"),
    case(_aten.masked_scatter.default, of(), torch.tensor(True), of(2), name="of numbers"),
    case(_aten.masked_scatter_backward.default, of(), torch.tensor(True), [2], name="of numbers"),
    case(_aten.index_put.default, of(3, 4), [_MASK], of(), **_NO_GRADIENT),
    case(_aten.index_put.default, of(3, 4), [_MASK], of(1), True, name="added", **_NO_GRADIENT),
    case(_aten.index_put.default, of(3, 4, 2), [_MASK], of(2), name="rows", **_NO_GRADIENT),
    case(_aten.index_put.default, of(2, 4, 2), [_MASK[0, :2]], of(1, 4, 2), name="slices", **_NO_GRADIENT),
    case(_aten.index_put.default, of(3, 4, 2), [_MASK], of(2), name="with a gradient", declines=True),
    case(_aten.isin.Tensor_Tensor, whole(7, 3, 4), torch.tensor([[1, 5], [2, 2]]), declines=True),
    case(_aten.isin.Tensor_Tensor, whole(7, 3), torch.tensor(2), invert=True, name="not in", declines=True),
    case(_aten.isin.Tensor_Scalar, whole(7, 3, 4), 2),
    case(_aten.isin.Scalar_Tensor, 2, torch.tensor([[1, 5], [2, 2]])),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rule(case: RuleCase) -> None:
    case.check()


def test_a_mask_of_the_last_dimensions() -> None:
    def func(x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        x = x * 2
        x[:, x[0] > 0] = value
        return x

    check(func, numbers(3, 2, 4), numbers(3, 2, 1, grad=False))
    check(func, numbers(3, 2, 4), numbers(3, 2, 1))


def test_different_indices_are_counted_before() -> None:
    """How many are different shapes the gradient of the value: in backward it would be too late to part ways."""
    index = torch.tensor([[0, 0, 2], [0, 1, 2], [1, 1, 1]])
    check(lambda x, index, value: x.index_fill(0, index, value), numbers(3, 4), index, numbers(3))
