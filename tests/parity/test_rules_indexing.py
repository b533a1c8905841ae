"""Rules of reads and writes at indices."""

from __future__ import annotations

import pytest
import torch

from tests.parity.rule_case import RuleCase, case, of, whole

_aten = torch.ops.aten

_WRITTEN = {"state": (0,), "stacked": [(0, 2, 3), (0, 2), (0, 3), (0,)]}

CASES = [
    case(_aten.gather.default, of(3, 4), 1, whole(4, 3, 2)),
    case(_aten.scatter.src, of(3, 4), 1, whole(4, 3, 2), of(3, 2)),
    case(_aten.scatter.value, of(3, 4), 1, whole(4, 3, 2), 2.5),
    case(_aten.scatter_add.default, of(3, 4), 0, whole(3, 2, 4), of(2, 4)),
    case(_aten.scatter_.src, of(3, 4), 1, whole(4, 3, 2), of(3, 2), **_WRITTEN),
    case(_aten.scatter_.value, of(3, 4), 1, whole(4, 3, 2), 2.5, state=(0,), stacked=[(0, 2), (0,)]),
    case(_aten.scatter_add_.default, of(3, 4), 0, whole(3, 2, 4), of(2, 4), **_WRITTEN),
    case(_aten.index_select.default, of(3, 4), 1, torch.tensor([3, 1, 1]), declines=True),
    case(_aten.index_select.default, of(5, 2), 0, whole(5, 4000), declines=True, name="many rows"),
    case(_aten.index_select.default, of(5, 2), -1, whole(2, 4000), declines=True, name="many columns"),
    case(_aten.index_add.default, of(3, 4), 1, torch.tensor([3, 1, 3]), of(3, 3)),
    case(_aten.index_add.default, of(3, 4), -2, torch.tensor([2, 2]), of(2, 4), alpha=0.5, name="scaled"),
    case(_aten.index_add.default, of(5), 0, whole(5, 4000), of(4000), name="many numbers"),
    case(_aten.index_add.default, of(5, 2), 0, whole(5, 4000), of(4000, 2), alpha=2, name="many rows"),
    case(_aten.index_add_.default, of(3, 4), 0, torch.tensor([2, 0, 0]), of(3, 4), **_WRITTEN),
    case(_aten.index_add_.default, of(5, 2), 0, whole(5, 4000), of(4000, 2), **_WRITTEN, name="many rows"),
    case(_aten.index_copy.default, of(3, 4), 1, torch.tensor([3, 1]), of(3, 2)),
    case(_aten.index_copy.default, of(3, 4), 0, torch.tensor([2, 0, 1]), of(3, 4), name="rows"),
    case(_aten.index_copy_.default, of(3, 4), -1, torch.tensor([3, 0]), of(3, 2), **_WRITTEN),
    case(_aten.select_backward.default, of(3), [3, 4], 1, -2),
    case(_aten.select_backward.default, of(), [3], 0, 1, name="of numbers"),
    case(_aten.index_reduce.default, of(3, 4), 1, torch.tensor([3, 1]), of(3, 2), "prod"),
    case(_aten.index_reduce.default, of(3, 4), 0, torch.tensor([2, 2]), of(2, 4), "mean", include_self=False),
    case(_aten.index_copy.default, of(), 0, torch.tensor([0]), of(1), name="of numbers"),
    case(_aten.index_reduce.default, of(), 0, torch.tensor(0), of(), "mean", name="of numbers"),
    case(_aten.unfold_backward.default, of(1), [], 0, 1, 1, name="of numbers"),
    case(_aten.unfold_backward.default, of(3, 2, 2), [3, 4], 1, 2, 2),
    case(_aten.slice_backward.default, of(3, 2), [3, 4], 1, 1, 3, 1),
    case(_aten.masked_fill.Tensor, of(3, 4), of(3, 4) > 0, of(), declines=True),
    case(_aten.masked_fill_.Tensor, of(3, 4), of(3, 4) > 0, of(), state=(0,), stacked=[(0, 1, 2), (0, 2), (0,)]),
    case(_aten.index_fill.int_Tensor, of(3, 4), 1, torch.tensor([0, 2]), of()),
    case(
        _aten.index_fill_.int_Tensor,
        *(of(3, 4), 1, torch.tensor([0, 2]), of()),
        state=(0,),
        stacked=[(0, 2, 3), (0, 2), (0, 3), (0,)],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rule(case: RuleCase) -> None:
    case.check()
