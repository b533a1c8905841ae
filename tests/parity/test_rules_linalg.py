"""Rules of operations on matrices with leading dimensions."""

from __future__ import annotations

import pytest
import torch

from tests.parity.loops import check, numbers
from tests.parity.rule_case import RuleCase, case, of

_aten = torch.ops.aten

_SQUARE = of(2, 3, 3) @ of(2, 3, 3).mT + 10 * torch.eye(3, dtype=torch.float64)  # of which all pivots are single
_LD, _PIVOTS = torch.linalg.ldl_factor(_SQUARE)
_LU = torch.linalg.lu_factor(_SQUARE)
_QR, _TAU = torch.geqrf(of(3, 2))
_DOUBLE = {"dtypes": (torch.float64,)}
_FORWARD = {**_DOUBLE, "grad": False}

CASES = [
    case(_aten.linalg_lu.default, of(2, 3, 4), **_DOUBLE),
    case(_aten.linalg_lu.default, of(3, 3), pivot=True, name="one", **_DOUBLE),
    case(_aten.linalg_ldl_solve.default, _LD, _PIVOTS, of(2, 3, 4), **_FORWARD),
    case(_aten.linalg_ldl_solve.default, _LD[0], _PIVOTS[0], of(3, 4), name="one matrix", **_FORWARD),
    case(_aten._linalg_solve_ex.default, _SQUARE, of(3, 4), name="matrices and a right-hand side", **_DOUBLE),
    case(_aten._linalg_solve_ex.default, _SQUARE[0], of(2, 3, 4), name="a matrix and right-hand sides", **_DOUBLE),
    case(_aten._linalg_solve_ex.default, _SQUARE[0], of(3, 3), left=False, name="from the right", **_DOUBLE),
    case(_aten._linalg_solve_ex.default, _SQUARE, of(2, 3), name="vectors", **_DOUBLE),
    case(_aten._linalg_solve_ex.default, _SQUARE, of(3), name="a vector", **_DOUBLE),
    case(_aten.linalg_lu_solve.default, *_LU, of(3, 4), name="a right-hand side", **_FORWARD),
    case(_aten.linalg_lu_solve.default, *_LU, of(2, 3, 4), adjoint=True, name="adjoint", **_FORWARD),
    case(_aten.linalg_lu_solve.default, _LU[0][0], _LU[1][0], of(2, 3, 4), name="one matrix", **_FORWARD),
    case(_aten.linalg_lu_solve.default, _LU[0][:1], _LU[1][:1], of(1, 3, 4), name="a single one", **_FORWARD),
    case(_aten.lu_unpack.default, *_LU, **_FORWARD),
    case(_aten.lu_unpack.default, _LU[0][0], _LU[1][0], name="one matrix", **_FORWARD),
    case(_aten.lu_unpack.default, *_LU, False, True, name="pivots alone", **_FORWARD),
    case(_aten.ormqr.default, _QR, _TAU, of(3, 4), **_DOUBLE),
    case(_aten.ormqr.default, _QR, _TAU, of(4, 3), False, True, name="from the right", **_DOUBLE),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rule(case: RuleCase) -> None:
    case.check()


@pytest.mark.usefixtures("composites")
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("shape", [(3, 4), (3,), (2, 3)], ids=str)
def test_solve_where_a_member_has_matrices(shape: tuple[int, ...], count: int) -> None:
    """torch's batching sets the members against the matrices, and where these are as many, says nothing."""
    a = numbers(count, 2, 3, 3)
    eye = torch.eye(3, dtype=torch.float64)
    check(lambda a, b: torch.linalg.solve(a @ a.mT + 4 * eye, b), a, numbers(count, *shape, seed=1))
    check(
        lambda a, b: torch.linalg.solve(a @ a.mT + 4 * eye, b), a[0].detach(), numbers(count, *shape), in_dims=(None, 0)
    )


@pytest.mark.usefixtures("composites")
@pytest.mark.parametrize(
    ("matrix", "side"), [((3, 3), (1, 3, 3)), ((1, 3, 3), (3, 3)), ((1, 3, 3), (1, 3, 2))], ids=str
)
def test_solve_with_a_single_leading_entry(matrix: tuple[int, ...], side: tuple[int, ...]) -> None:
    """torch's kernel goes from one matrix to the next by the stride of the last leading dimension, also where that has
    a single entry; found by random program 68966."""
    eye = 4 * torch.eye(3, dtype=torch.float64)
    check(lambda a, b: torch.linalg.solve(a @ a.mT + eye, b), numbers(3, *matrix), numbers(3, *side, seed=1))


def test_ldl_solve_with_a_single_leading_entry() -> None:
    """The same kernel's way; alone the stride of the single entry is not looked at."""
    factors, pivots = torch.linalg.ldl_factor(_SQUARE)
    check(
        lambda f, p, b: torch.linalg.ldl_solve(f[None], p[None], b[None]), factors, pivots, of(2, 3, 4), gradients=False
    )
