"""Rules of embeddings."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import memberwise
from tests.parity.rule_case import RuleCase, case, of, whole

_aten = torch.ops.aten

CASES = [
    case(_aten.embedding.default, of(6, 3), whole(6, 2, 5), batch_dims=(None, 0)),
    case(_aten.embedding.default, of(6, 3), whole(6, 2, 5), 2, name="padding", batch_dims=(None, 0, None)),
    case(_aten.embedding.default, of(6, 3), whole(3, 2, 5), -1, True, name="by frequency"),
    case(_aten.embedding.default, of(6, 3), torch.tensor(4), name="one index"),
    case(_aten.embedding_dense_backward.default, of(2, 5, 3), whole(6, 2, 5), 6, 2, False),
    case(_aten.embedding_dense_backward.default, of(2, 5, 3), whole(3, 2, 5), 6, -1, True, name="by frequency"),
    case(
        _aten.embedding_dense_backward.default,
        *(of(2, 5, 3), whole(6, 2, 5), 6, -1, False),
        name="batch",
        grad=False,
        batch_dims=(0, 0, None, None, None),
    ),
    case(
        _aten.embedding_renorm_.default,
        *(of(6, 3), whole(4, 2, 5), 1.0, 2.0),
        state=(0,),
        stacked=[(0, 1), (0,)],
        declines=True,
    ),
    *[case(F.embedding_bag, whole(6, 2, 5), of(6, 3), None, name=mode, mode=mode) for mode in ("sum", "mean", "max")],
    case(
        F.embedding_bag, whole(6, 7), of(6, 3), torch.tensor([0, 3, 3, 5]), name="offsets", stacked=[(0, 1), (0,), (1,)]
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rule(case: RuleCase) -> None:
    case.check()


@pytest.mark.parametrize("index", [-1, 6, -7, 100])
def test_an_index_out_of_range_reads_no_other_members_row(index: int) -> None:
    """Member 1's index -1 lies inside the stacked table; alone it is an error, and so it is here."""
    indices = torch.tensor([[0, 1], [2, index]])
    with pytest.raises(IndexError):
        torch.embedding(of(6, 3), indices[1])
    with pytest.raises(IndexError):
        memberwise.vmap(torch.embedding)(of(2, 6, 3), indices)
