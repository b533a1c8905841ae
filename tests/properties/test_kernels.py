"""Our own kernels give what torch's do, whatever sizes and strides they are given."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.nn.functional import conv2d, scaled_dot_product_attention

from memberwise.kernels.attention import (
    attention,
    attention_backward,
    attention_dropout,
    attention_dropout_backward,
)
from memberwise.kernels.convolution import convolution3x3, convolution3x3_backward
from memberwise.kernels.library import available
from memberwise.kernels.product import product, product_plus
from memberwise.testing.tolerance import assert_equal

pytestmark = pytest.mark.skipif(not available("product"), reason="no C++ compiler, or a processor without AVX2")

SIZES = st.one_of(st.integers(0, 40), st.sampled_from([63, 64, 193, 257, 300]))
DTYPES = st.sampled_from([torch.bfloat16, torch.float32, torch.float64])
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


@given(st.integers(1, 4), SIZES, SIZES, SIZES, ORDERS, ORDERS, DTYPES, st.integers(0, 99))
@example(1, 193, 47, 257, "rows", "columns", torch.float32, 0)
@example(3, 14, 32, 300, "columns", "columns", torch.float64, 0)
@example(2, 5, 16, 0, "rows", "rows", torch.float32, 0)
@example(2, 15, 33, 65, "rows", "columns", torch.bfloat16, 0)
@example(2, 40, 64, 64, "columns", "rows", torch.bfloat16, 0)
@example(700, 24, 33, 21, "rows", "columns", torch.float32, 0)  # more than a cache holds: memory is asked for ahead
@example(40, 300, 20, 64, "shared", "rows", torch.float64, 0)
@example(300, 40, 33, 30, "apart", "shared", torch.float32, 0)
@example(2, 256, 130, 300, "columns", "rows", torch.float32, 0)  # a left factor that is laid anew
@example(1, 384, 257, 128, "columns", "columns", torch.float64, 0)
@example(2, 100, 1024, 300, "rows", "rows", torch.float32, 0)  # rows that share sets of a cache
@example(1, 130, 300, 700, "rows", "columns", torch.float64, 0)  # the next panel is asked for
@example(1, 130, 300, 700, "apart", "apart", torch.float32, 0)
@example(300, 0, 64, 64, "rows", "rows", torch.float32, 0)
@example(3000, 20, 20, 0, "rows", "rows", torch.float32, 0)
def test_products(members: int, m: int, n: int, k: int, left: str, right: str, dtype: torch.dtype, seed: int) -> None:
    a, b = (_matrix(members, *of, seed).to(dtype) for of in ((m, k, left), (k, n, right)))
    found, expected = product(a, b), torch.bmm(a.double(), b.double()).to(dtype)
    assert found.is_contiguous()
    assert_equal(found / max(1, k) ** 0.5, expected / max(1, k) ** 0.5)
    assert torch.equal(product(a[0], b[0]), found[0])


@given(st.integers(1, 4), SIZES, SIZES, SIZES, ORDERS, ORDERS, st.sampled_from([1, 2, 3]), st.integers(0, 99))
@example(2, 15, 33, 65, "rows", "columns", 3, 0)
@example(3, 40, 64, 64, "columns", "rows", 1, 0)
@example(1, 193, 20, 300, "apart", "shared", 2, 0)
def test_products_and_a_bias(members: int, m: int, n: int, k: int, left: str, right: str, kind: int, seed: int) -> None:
    """One a member, one for all, or without a member axis; rounded once, which an addition afterwards would not be."""
    a, b = (_matrix(members, *of, seed).bfloat16() for of in ((m, k, left), (k, n, right)))
    bias = torch.randn(members if kind == 3 else 1, 1, n, generator=torch.Generator().manual_seed(seed)).bfloat16()
    bias = bias.reshape(n) if kind == 1 else bias
    found, expected = product_plus(bias, a, b), torch.baddbmm(bias.double(), a.double(), b.double()).bfloat16()
    assert found.is_contiguous()
    assert_equal(found / max(1, k) ** 0.5, expected / max(1, k) ** 0.5)
    assert torch.equal(product_plus(bias.flatten()[:n], a[0], b[0]), found[0])


@pytest.mark.parametrize("members, m", [(1, 15), (1, 16), (1, 500), (3, 20), (40, 64)])
def test_products_by_several_threads(members: int, m: int, two_threads: None) -> None:
    """Each row is summed alike, whichever core has it."""
    a, b = _matrix(members, m, 300, "rows", 0), _matrix(members, 300, 64, "columns", 1)
    found = product(a, b)
    torch.set_num_threads(1)
    assert torch.equal(product(a, b), found)
    assert_equal(found / 300**0.5, torch.bmm(a.double(), b.double()).float() / 300**0.5)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 300), DTYPES, st.integers(0, 99))
def test_a_value_that_is_not_finite_stays_in_its_row_and_column(
    m: int, n: int, k: int, dtype: torch.dtype, seed: int
) -> None:
    a, b = torch.ones(2, m, k, dtype=dtype), torch.ones(2, k, n, dtype=dtype)
    row, column, one = seed % m, seed % n, seed % k
    a[0, row, one], b[1, one, column] = torch.nan, torch.inf
    expected = torch.full((2, m, n), float(k), dtype=dtype)
    expected[0, row], expected[1, :, column] = torch.nan, torch.inf
    assert_equal(product(a, b), expected)


LENGTHS = st.one_of(st.integers(1, 20), st.sampled_from([63, 64, 65, 130]))
WIDTHS = st.sampled_from([1, 3, 8, 16, 17, 32, 40])


def _heads(batch: int, rows: int, width: int, order: str, seed: int) -> torch.Tensor:
    """Those of three heads, by heads, by rows, in gaps, or one for all of the batch."""
    generator = torch.Generator().manual_seed(seed)
    if order == "columns":
        return torch.randn(batch, rows, 3, width, generator=generator).transpose(1, 2)
    if order == "apart":
        return torch.randn(batch, rows, 3, 2, width, 2, generator=generator)[:, :, :, 1, :, 1].transpose(1, 2)
    return _matrix(batch, 3 * rows, width, order, seed).unflatten(1, (3, rows))


@given(st.integers(1, 3), LENGTHS, LENGTHS, WIDTHS, WIDTHS, ORDERS, ORDERS, st.booleans(), st.integers(0, 99))
@example(1, 65, 64, 32, 32, "columns", "columns", True, 0)
@example(2, 130, 20, 16, 3, "rows", "apart", True, 0)
def test_attention(
    batch: int, rows: int, keys: int, width: int, wide: int, left: str, right: str, causal: bool, seed: int
) -> None:
    q, k = _heads(batch, rows, width, left, seed), _heads(batch, keys, width, right, seed + 1)
    v, grad = _heads(batch, keys, wide, right, seed + 2), _heads(batch, rows, wide, left, seed + 3)
    out, sums = attention(q, k, v, causal, 0.3)
    alone = [x.double().requires_grad_() for x in (q, k, v)]
    expected = scaled_dot_product_attention(*alone, is_causal=causal, scale=0.3)
    assert_equal(out, expected.detach().float())
    scores = (alone[0] @ alone[1].mT * 0.3).detach()
    if causal:
        scores = scores.masked_fill(torch.ones(rows, keys).triu(1).bool(), -torch.inf)
    assert_equal(sums, scores.logsumexp(-1).float())
    found = attention_backward(grad, q, k, v, sums, causal, 0.3)
    for ours, theirs in zip(found, torch.autograd.grad(expected, alone, grad.double()), strict=True):
        assert_equal(ours / rows**0.5, theirs.float() / rows**0.5)


@given(st.integers(1, 70), st.integers(0, 69), st.sampled_from(["q", "k", "v"]))
def test_a_head_that_is_not_finite_is_no_other_heads_matter(rows: int, one: int, which: str) -> None:
    given = {name: torch.ones(2, 3, rows, 4) for name in "qkv"}
    given[which][1, 2, one % rows] = torch.nan
    out, _ = attention(*given.values(), False, 0.5)
    assert not out[1, 2, one % rows].isfinite().any()
    out[1, 2] = 1
    assert_equal(out, torch.ones(2, 3, rows, 4))


def _apart(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, drawn: torch.Tensor, causal: bool) -> torch.Tensor:
    """What torch computes, operation by operation."""
    scores = q @ k
    if causal:
        scores = scores + torch.full(scores.shape[-2:], -torch.inf).triu(1)
    return (torch.ops.aten._safe_softmax(scores, -1) * (drawn / 0.75)) @ v


def _mask(like: torch.Tensor, keys: int, seed: int) -> torch.Tensor:
    drawn = torch.rand(*like.shape[:3], keys, generator=torch.Generator().manual_seed(seed))
    return (drawn < 0.75).float()


@given(st.integers(1, 3), LENGTHS, LENGTHS, WIDTHS, WIDTHS, ORDERS, ORDERS, st.booleans(), st.integers(0, 99))
@example(1, 65, 64, 32, 32, "columns", "columns", True, 0)
@example(2, 130, 20, 16, 3, "rows", "apart", True, 0)
def test_attention_with_dropout(
    batch: int, rows: int, keys: int, width: int, wide: int, left: str, right: str, causal: bool, seed: int
) -> None:
    q, k = _heads(batch, rows, width, left, seed) * 0.3, _heads(batch, keys, width, right, seed + 1).mT
    v, grad = _heads(batch, keys, wide, right, seed + 2), _heads(batch, rows, wide, left, seed + 3)
    drawn = _mask(q, keys, seed)
    if left == "apart":
        drawn = drawn.mT.contiguous().mT
    out, sums = attention_dropout(q, k, v, drawn, 1 / 0.75, causal)
    alone = [x.double().requires_grad_() for x in (q, k, v)]
    expected = _apart(*alone, drawn.double(), causal)
    assert_equal(out, expected.detach().float())
    found = attention_dropout_backward(grad, q, k, v, drawn, sums, 1 / 0.75, causal)
    for ours, theirs in zip(found, torch.autograd.grad(expected, alone, grad.double()), strict=True):
        assert ours.is_contiguous()
        assert_equal(ours / rows**0.5, theirs.float() / rows**0.5)


@given(
    st.integers(1, 70),
    st.integers(0, 999),
    st.sampled_from(["q", "k", "v", "grad"]),
    st.sampled_from([torch.nan, torch.inf, -torch.inf]),
    st.booleans(),
)
@example(20, 37, "v", torch.inf, True)
@example(1, 0, "k", -torch.inf, True)
def test_what_is_not_finite_is_not_hidden_by_dropout(
    rows: int, one: int, which: str, value: float, causal: bool
) -> None:
    """A weight of 0 for a later key, or for what was dropped, is multiplied as any other."""
    generator = torch.Generator().manual_seed(one)
    given = {name: torch.randn(1, 2, rows, 4, generator=generator) for name in ("q", "k", "v", "grad")}
    given[which][0, 1].view(-1)[one % (4 * rows)] = value
    q, k, v = (given[name].requires_grad_() for name in "qkv")
    drawn = _mask(q, rows, one)
    expected = _apart(q, k.mT, v, drawn, causal)
    grads = torch.autograd.grad(expected, (q, k, v), given["grad"])
    with torch.no_grad():
        out, sums = attention_dropout(q, k.mT, v, drawn, 1 / 0.75, causal)
        dq, dk, dv = attention_dropout_backward(given["grad"], q, k.mT, v, drawn, sums, 1 / 0.75, causal)
    for ours, theirs in zip((out, dq, dk.mT, dv), (expected.detach(), *grads), strict=True):
        assert_equal(ours / rows**0.5, theirs / rows**0.5)


def test_scores_far_apart() -> None:
    """The highest wins, whatever the others are; nothing overflows."""
    q, k = torch.full((1, 1, 2, 1), 1e4), torch.tensor([1.0, -1.0, 1e3]).reshape(1, 1, 3, 1)
    out, sums = attention(q, k, torch.tensor([1.0, 2.0, 3.0]).reshape(1, 1, 3, 1), False, 1.0)
    assert torch.equal(out, torch.full((1, 1, 2, 1), 3.0)) and torch.equal(sums, torch.full((1, 1, 2), 1e7))


CHANNELS = st.sampled_from([1, 3, 8, 15, 16, 17, 33, 48, 140])


@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.tuples(CHANNELS, CHANNELS),
    st.tuples(st.integers(3, 20), st.integers(3, 20)),
    st.integers(1, 2),
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
    st.integers(0, 99),
)
@example(9, 1, (16, 33), (8, 8), 1, (1, 1), 0)
@example(1, 2, (140, 16), (4, 3), 1, (2, 0), 0)
@example(5, 1, (16, 16), (40, 37), 1, (1, 1), 0)
@example(9, 1, (512, 16), (8, 7), 1, (1, 1), 0)
@example(9, 1, (16, 33), (16, 15), 2, (1, 2), 0)
@example(1, 2, (140, 16), (4, 3), 2, (0, 1), 0)
@example(5, 1, (16, 16), (80, 34), 2, (1, 0), 0)
def test_convolutions(
    images: int,
    groups: int,
    channels: tuple[int, int],
    size: tuple[int, int],
    stride: int,
    padding: tuple[int, int],
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    deep, wide = channels
    x = torch.randn(images, groups * deep, *size, generator=generator)
    w = torch.randn(groups * wide, deep, 3, 3, generator=generator) / (9 * deep) ** 0.5
    alone = [one.double().requires_grad_() for one in (x, w)]
    expected = conv2d(*alone, stride=stride, padding=padding, groups=groups)
    out = convolution3x3(x, w, stride, *padding, groups)
    assert out.is_contiguous()
    assert_equal(out, expected.detach().float())
    grad = torch.randn(expected.shape, generator=generator)
    found = convolution3x3_backward(grad, x, w, stride, *padding, groups)
    terms = (wide / deep) ** 0.5, (images * expected[0, 0].numel()) ** 0.5
    for ours, theirs, size_of in zip(found, torch.autograd.grad(expected, alone, grad.double()), terms, strict=True):
        assert_equal(ours / size_of, theirs.float() / size_of)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("images", "deep", "side"), [(1, 250, 9), (9, 40, 33)])
def test_convolutions_by_several_threads(images: int, deep: int, side: int, stride: int) -> None:
    """Few tiles are split by channels, many by blocks: the results are the same to the last bit.

    It takes each thread longer than the other's start, so that they would meet if they shared memory.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = (images, deep, side, side), (300, deep, 3, 3)
    x, w = (torch.randn(shape, generator=generator) for shape in shapes)
    settings = (stride, 1, 1, 1)
    grad = convolution3x3(x, w, *settings)
    both = (grad, *convolution3x3_backward(grad, x, w, *settings))
    torch.set_num_threads(1)
    alone = (convolution3x3(x, w, *settings), *convolution3x3_backward(grad, x, w, *settings))
    assert all(map(torch.equal, both, alone))
    expected = conv2d(x.double(), w.double(), stride=stride, padding=1)
    assert_equal(grad / (9 * deep) ** 0.5, expected.float() / (9 * deep) ** 0.5)


@given(
    st.integers(0, 99),
    st.sampled_from([torch.nan, torch.inf, -torch.inf]),
    st.sampled_from(["x", "w", "grad"]),
    st.integers(1, 2),
    st.integers(0, 2),
)
def test_what_is_not_finite_is_what_torch_gives(seed: int, value: float, where: str, stride: int, padding: int) -> None:
    """Not spread over the tile in which it lies, also where no result reads it (the last row, two apart)."""
    generator = torch.Generator().manual_seed(seed)
    side = (6 + 2 * padding - 3) // stride + 1
    shapes = {"grad": (2, 16, side, side), "x": (2, 16, 6, 6), "w": (16, 16, 3, 3)}
    given = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    given[where].view(-1)[seed * 97 % given[where].numel()] = value
    grad, x, w = given.values()
    alone = [one.clone().requires_grad_() for one in (x, w)]
    expected = conv2d(*alone, stride=stride, padding=padding)
    settings = (stride, padding, padding, 1)
    assert_equal(convolution3x3(x, w, *settings), expected.detach())
    for ours, theirs in zip(
        convolution3x3_backward(grad, x, w, *settings), torch.autograd.grad(expected, alone, grad), strict=True
    ):
        assert_equal(ours / 10, theirs / 10)
