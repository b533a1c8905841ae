"""A recording rewritten to fewer views computes the same, whatever views, copies and writes it has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memberwise.capture.views import with_fewer_views
from tests.parity.test_capture_layout import recorded

Step = tuple[str, int, int]


def _halves(x: torch.Tensor, dim: int) -> torch.Tensor:
    """An even dimension as two."""
    size = x.shape[dim]
    return x.unflatten(dim, (2, size // 2)) if size % 2 == 0 and x.ndim < 6 else x


def _joined(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Two neighbouring dimensions as one."""
    return x if dim + 1 >= x.ndim else x.flatten(dim, dim + 1)


def _written(x: torch.Tensor, part: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    part(x).mul_(0.5)
    return x


STEPS: dict[str, Callable[[torch.Tensor, int, int], torch.Tensor]] = {
    "exchange": lambda x, a, b: x.transpose(a, b),
    "one more": lambda x, a, _: x.unsqueeze(a) if x.ndim < 6 else x,
    "one less": lambda x, a, _: x.squeeze(a),
    "halves": lambda x, a, _: _halves(x, a),
    "joined": lambda x, a, _: _joined(x, a),
    "sine": lambda x, *_: x.sin(),
    "copy": lambda x, *_: x.clone(),
    "in order": lambda x, *_: x.contiguous(),
    "sum": lambda x, a, _: x + x.mean(a, keepdim=True),
    "written": lambda x, *_: _written(x, lambda x: x),
    "written in part": lambda x, a, _: _written(x, lambda x: x.select(a, 0)),
}


def _program(steps: list[Step], again: list[int]) -> Callable[[torch.Tensor, torch.Tensor], Any]:
    """Steps on one tensor; some meet what an earlier one left, if the shapes are the same."""

    def run(x: torch.Tensor, y: torch.Tensor) -> Any:
        values = [x * 1, y * 1]
        for k, (name, a, b) in enumerate(steps):
            now = values[-1]
            values.append(STEPS[name](now, a % now.ndim, b % now.ndim))
            other = values[again[k % len(again)] % len(values)]
            if other.shape == values[-1].shape:
                values.append(values[-1] * other)
        return values[-1], values[len(values) // 2]

    return run


@pytest.mark.parametrize("copies", [False, True])
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(list(STEPS)), st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12
    ),
    again=st.lists(st.integers(0, 30), min_size=1, max_size=4),
)
def test_fewer_views(copies: bool, steps: list[Step], again: list[int]) -> None:
    module, inputs = recorded(_program(steps, again), (2, 3, 4), (2, 3, 4))
    rewritten = with_fewer_views(module, inputs, copies)
    own, others = [x.clone() for x in inputs], [x.clone() for x in inputs]
    for ours, theirs in zip((*rewritten(*others), *others), (*module(*own), *own), strict=True):
        assert ours.shape == theirs.shape
        assert torch.equal(ours, theirs)
