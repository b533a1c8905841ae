"""Max pooling by a kernel of our own: the same values, positions and gradients as torch's, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from memberwise.capture import pooling
from memberwise.capture.pooling import BACKWARD, FORWARD, max_pool2d, max_pool2d_backward, with_pooling

VALUES = torch.tensor([-1.0, 0.0, 0.0, 1.0, 2.0, float("nan"), float("inf"), -float("inf")])
"""Few, so that windows have ties."""


def _compare(x: torch.Tensor, size: int) -> None:
    expected, positions = FORWARD(x, [size, size])
    out, index = max_pool2d(x, size)
    assert torch.equal(out.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(index, positions)
    grad = torch.randn(out.shape, dtype=x.dtype)
    where = [size, size], [size, size], [0, 0], [1, 1], False
    theirs = BACKWARD(grad, x, *where, positions)
    assert torch.equal(max_pool2d_backward(grad, index, size, x.shape), theirs)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 3)] * 2, *[st.integers(3, 40)] * 2),
    size=st.sampled_from(pooling.WINDOWS),
    dtype=st.sampled_from(list(pooling.TYPES)),
    few=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_it_is_torchs_to_the_bit(shape: Any, size: int, dtype: torch.dtype, few: bool, seed: int) -> None:
    """Ties go to the first, not-a-number to the last, rows and columns that fill no window get no gradient."""
    torch.manual_seed(seed)
    x = VALUES[torch.randint(len(VALUES), shape)] if few else torch.randn(shape)
    _compare(x.to(dtype), size)


@pytest.mark.parametrize("threads", [1, 2])
def test_on_so_many_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _compare(torch.randn(8, 5, 29, 30), 2)
        _compare(torch.randn(4, 6, 20, 10).transpose(2, 3), 2)  # what the compiler hands over may lie otherwise
    finally:
        torch.set_num_threads(before)


def test_what_the_compiler_is_told_of_them() -> None:
    x = torch.randn(2, 3, 6, 7)
    torch.library.opcheck(torch.ops.memberwise.max_pool2d, (x, 2))
    index = max_pool2d(x, 2)[1]
    torch.library.opcheck(torch.ops.memberwise.max_pool2d_backward, (torch.randn(2, 3, 3, 3), index, 2, [2, 3, 6, 7]))


def _recorded(x: torch.Tensor, *where: Any) -> fx.GraphModule:
    """Pooling and its gradient, as the recorder writes them down."""
    graph = fx.Graph()
    given_x = graph.placeholder("x")
    own = graph.call_function(torch.ops.aten.mul.Tensor, (given_x, 1.0))
    own.meta["kind"], own.meta["dtype"] = (x.shape, x.stride()), x.dtype
    pooled = graph.call_function(FORWARD, (own, *where))
    out, index = (graph.call_function(pooling.operator.getitem, (pooled, k)) for k in (0, 1))
    kernel, stride, padding, dilation, ceil = (*where, *([], [0, 0], [1, 1], False)[len(where) - 1 :])
    grad = graph.call_function(torch.ops.aten.cos.default, (out,))
    back = graph.call_function(BACKWARD, (grad, own, kernel, stride or kernel, padding, dilation, ceil, index))
    graph.output((out, index, back))
    return fx.GraphModule({}, graph)


KNOWN = {"2": ([2, 2],), "3": ([3, 3], [3, 3]), "spelled out": ([2, 2], [2, 2], [0, 0], [1, 1], False)}
OTHERS = {
    "overlapping": ([3, 3], [2, 2]),
    "padded": ([2, 2], [2, 2], [1, 1]),
    "dilated": ([2, 2], [2, 2], [0, 0], [2, 2]),
    "rounded up": ([2, 2], [2, 2], [0, 0], [1, 1], True),
    "oblong": ([2, 3],),
    "large": ([4, 4],),
}


@pytest.mark.parametrize("kind", [*KNOWN, *OTHERS])
def test_which_windows_it_takes(kind: str) -> None:
    x = torch.randn(2, 3, 13, 13)
    recorded = _recorded(x, *(KNOWN | OTHERS)[kind])
    rewritten = with_pooling(recorded)
    ours = [node for node in rewritten.graph.nodes if "memberwise" in str(node.target)]
    assert len(ours) == (2 if kind in KNOWN else 0)
    for found, expected in zip(rewritten(x), recorded(x), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last),
        torch.randn(2, 3, 8, 8, dtype=torch.bfloat16),
        torch.randn(3, 8, 8),
    ],
    ids=["channels last", "half precision", "no batch"],
)
def test_which_tensors_it_leaves_to_torch(x: torch.Tensor) -> None:
    recorded = _recorded(x, [2, 2])
    assert with_pooling(recorded) is recorded


def test_without_a_compiler_torchs_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(pooling, "_library", missing)
    recorded = _recorded(torch.randn(2, 3, 8, 8), [2, 2])
    assert with_pooling(recorded) is recorded
