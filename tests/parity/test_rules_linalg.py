"""Rules of operations on matrices with leading dimensions."""

from __future__ import annotations

import pytest
import torch

from tests.parity.rule_case import RuleCase, case, of

_aten = torch.ops.aten

_SQUARE = of(2, 3, 3) @ of(2, 3, 3).mT + 10 * torch.eye(3, dtype=torch.float64)  # of which all pivots are single
_LD, _PIVOTS = torch.linalg.ldl_factor(_SQUARE)
_QR, _TAU = torch.geqrf(of(3, 2))
_DOUBLE = {"dtypes": (torch.float64,)}
_FORWARD = {**_DOUBLE, "grad": False}

CASES = [
    case(_aten.linalg_lu.default, of(2, 3, 4), **_DOUBLE),
    case(_aten.linalg_lu.default, of(3, 3), pivot=True, name="one", **_DOUBLE),
    case(_aten.linalg_ldl_solve.default, _LD, _PIVOTS, of(2, 3, 4), **_FORWARD),
    case(_aten.linalg_ldl_solve.default, _LD[0], _PIVOTS[0], of(3, 4), name="one matrix", **_FORWARD),
    case(_aten.ormqr.default, _QR, _TAU, of(3, 4), **_DOUBLE),
    case(_aten.ormqr.default, _QR, _TAU, of(4, 3), False, True, name="from the right", **_DOUBLE),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rule(case: RuleCase) -> None:
    case.check()
