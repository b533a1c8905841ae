"""Rules of matrix products, and of linear layers."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from memberwise.rules.matmul import is_narrow
from tests.parity.rule_case import RuleCase, case, of

_aten = torch.ops.aten

CASES = [
    case(_aten.mm.default, of(2, 3), of(3, 4), batch_dims=(0, None)),
    case(_aten.mm.default, of(9, 3), of(3, 3), name="narrow"),
    case(_aten.mm.default, of(9, 1), of(1, 3), name="outer"),
    case(_aten.mm.default, of(2, 0), of(0, 4), name="of nothing", dtypes=()),
    case(_aten.bmm.default, of(2, 3, 4), of(2, 4, 5), batch_dims=(0, 0)),
    *[
        case(_aten.addmm.default, of(*bias), of(rows, 4), of(4, 3), name=f"{bias} and {rows} rows")
        for bias in ((3,), (1, 3), (9, 3), (9, 1), ())
        for rows in (9, 2)
        if bias[:1] != (9,) or rows == 9
    ],
    case(_aten.addmm.default, of(3), of(9, 4), of(4, 3), name="scaled", beta=0.5, alpha=2),
    case(_aten.addmm.default, of(3), of(2, 4), of(4, 3), name="no bias", beta=0, alpha=2),
    case(_aten._trilinear.default, of(5, 2), of(4, 2, 3), of(5, 3), [1, 3], [0], [1, 2], [2, 3]),
    case(_aten._trilinear.default, of(5, 2), of(5, 3), of(2, 3), [2], [1], [0], [1], 2, name="elsewhere"),
    case(F.linear, of(2, 3), of(4, 3), of(4), declines=True, batch_dims=(0, None, None)),
    case(F.linear, of(9, 5), of(3, 5), of(3), name="narrow", declines=True),
    case(F.linear, of(9, 3), of(30, 3), None, name="narrow input"),
    case(F.linear, of(9, 3), of(1, 3), of(1), name="one output", declines=True),
    case(F.linear, of(3), of(4, 3), of(4), name="one row", declines=True),
    case(F.linear, of(2, 5, 3), of(4, 3), of(4), name="two leading dimensions", declines=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rule(case: RuleCase) -> None:
    case.check()


def test_narrow_results_are_those_that_were_measured() -> None:
    like = torch.empty(0)
    assert is_narrow(256, 10, like) and is_narrow(256, 23, like) and is_narrow(64, 10, like)
    assert not is_narrow(256, 16, like) and not is_narrow(64, 33, like) and not is_narrow(32, 12, like)
    assert not is_narrow(256, 1, like), "one column is a vector"
    assert not is_narrow(256, 10, like.bfloat16()), "not MKL's"
