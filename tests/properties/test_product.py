"""Our own product gives what torch's does, whatever sizes and strides its factors have."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from memberwise.kernels.product import available, product
from memberwise.testing.tolerance import assert_equal

pytestmark = pytest.mark.skipif(not available(), reason="no C++ compiler, or a processor without AVX2")

SIZES = st.one_of(st.integers(0, 40), st.sampled_from([63, 64, 193, 257, 300]))
ORDERS = st.sampled_from(["rows", "columns", "apart", "shared"])


def _matrix(members: int, rows: int, columns: int, order: str, seed: int) -> torch.Tensor:
    """Members' matrices, dense by rows or by columns, with gaps, or one for all."""
    generator = torch.Generator().manual_seed(seed)
    if order == "columns":
        return torch.randn(members, columns, rows, generator=generator).mT
    if order == "apart":
        return torch.randn(members, rows, 2, columns, 3, generator=generator)[:, :, 1, :, 1]
    made = torch.randn(1 if order == "shared" else members, rows, columns, generator=generator)
    return made.expand(members, rows, columns)


@given(st.integers(1, 4), SIZES, SIZES, SIZES, ORDERS, ORDERS, st.integers(0, 99))
@example(1, 193, 47, 257, "rows", "columns", 0)
@example(3, 14, 32, 300, "columns", "columns", 0)
@example(2, 5, 16, 0, "rows", "rows", 0)
def test_products(members: int, m: int, n: int, k: int, left: str, right: str, seed: int) -> None:
    a, b = _matrix(members, m, k, left, seed), _matrix(members, k, n, right, seed + 1)
    found, expected = product(a, b), torch.bmm(a.double(), b.double()).float()
    assert found.is_contiguous()
    assert_equal(found / max(1, k) ** 0.5, expected / max(1, k) ** 0.5)
    assert torch.equal(product(a[0], b[0]), found[0])


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 300), st.integers(0, 99))
def test_a_value_that_is_not_finite_stays_in_its_row_and_column(m: int, n: int, k: int, seed: int) -> None:
    a, b = torch.ones(2, m, k), torch.ones(2, k, n)
    row, column, one = seed % m, seed % n, seed % k
    a[0, row, one], b[1, one, column] = torch.nan, torch.inf
    expected = torch.full((2, m, n), float(k))
    expected[0, row], expected[1, :, column] = torch.nan, torch.inf
    assert_equal(product(a, b), expected)
