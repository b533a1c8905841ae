"""Rules of evenly spaced values."""

from __future__ import annotations

import pytest
import torch

from tests.parity.loops import check, numbers
from tests.parity.rule_case import RuleCase, case, of

_aten = torch.ops.aten
_NARROW, _WIDE = torch.tensor(0.1), {"dtype": torch.float64}
"""An end in float32, and a result that shows more digits."""

CASES = [
    made
    for op in (_aten.linspace, _aten.logspace)
    for made in (
        case(op.Tensor_Tensor, _NARROW, torch.tensor(3), 6, dtypes=(), grad=False, **_WIDE),
        case(op.Tensor_Tensor, of(), of(seed=1), 7, name="odd", dtypes=(), grad=False, **_WIDE),
        case(op.Tensor_Scalar, _NARROW, 2.5, 1, name="one value", dtypes=(), grad=False, **_WIDE),
        case(op.Tensor_Scalar, _NARROW, 2.5, 5, dtypes=(), grad=False),
        case(op.Scalar_Tensor, 2.5, _NARROW, 0, name="none", dtypes=(), grad=False, **_WIDE),
        case(op.Tensor_Scalar, torch.tensor(1.7), 9.9, 4, name="whole", dtypes=(), grad=False, dtype=torch.int64),
        case(op.Tensor_Scalar, _NARROW, 2, 4, name="complex", dtypes=(), grad=False, dtype=torch.complex128),
        case(op.Scalar_Tensor, 2, _NARROW, 5, dtypes=(), grad=False, dtype=torch.bfloat16),
    )
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rule(case: RuleCase) -> None:
    case.check()


def test_complex_ends() -> None:
    ends = torch.complex(numbers(3, grad=False), numbers(3, grad=False, seed=1))
    check(lambda start: torch.linspace(start, 9, 4), ends, gradients=False)
