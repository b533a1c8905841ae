"""Lesson: what changes a tensor's shape in place (`t_`, `squeeze_`) changes one object, and none of its views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from memberwise import explain, vmap
from tests.parity.loops import check, numbers

pytestmark = pytest.mark.usefixtures("composites")


def several_moves(x: torch.Tensor) -> Any:
    """As in `torch.quantile` and `torch.stft`."""
    y = x * 2
    y.unsqueeze_(0).transpose_(0, 2).squeeze_(2)
    y[0].mul_(3.0)
    return y, y.sum(0)


def fresh(x: torch.Tensor) -> Any:
    base = torch.zeros(2, 3, dtype=x.dtype)
    base.unsqueeze_(0).transpose_(0, 1)
    base.add_(x[0, :3])
    return base, base[0].mul_(2.0)


def resized(x: torch.Tensor) -> Any:
    with torch.no_grad():
        y = torch.ones(2, dtype=x.dtype).resize_as_(x * 2).fill_(3.0)
    return y * x


STACKED: list[Callable[..., Any]] = [several_moves, fresh]


def has_views(x: torch.Tensor) -> Any:
    y = x * 2
    row = y[0]
    y.t_()
    y[0].mul_(3.0)
    return y, row


def fresh_with_views(x: torch.Tensor) -> Any:
    base = torch.zeros(2, 4, dtype=x.dtype)
    row = base[1]
    base.t_()
    base.add_(x[:, :2])
    return base, row


def is_a_view(x: torch.Tensor) -> Any:
    y = x * 2
    rows = y[1:]
    rows.t_()
    rows.mul_(x[0].sum())
    return y, rows


@pytest.mark.parametrize("func", [*STACKED, resized, has_views, fresh_with_views, is_a_view])
def test_moved(func: Callable[..., Any]) -> None:
    check(func, numbers(3, 4, 4, seed=1))


@pytest.mark.parametrize("func", STACKED)
def test_moved_as_a_stack(func: Callable[..., Any]) -> None:
    assert not {row.path for row in explain(lambda: vmap(func)(numbers(3, 4, 4))).rows} & {"loop", "retreat"}


def test_moved_from_outside() -> None:
    """The memory of the caller's tensor is written, with its gradient; the object that was moved is each member's."""
    state, x = numbers(3, 2, 4, seed=2, grad=False), numbers(3, 4, seed=1)
    alone = state.clone() * x.sum(1).reshape(3, 1, 1)

    def func(x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        row = state[0]
        state.t_().mul_(x.sum())
        return row * 1.0

    out = vmap(func)(x, state)
    torch.testing.assert_close(state, alone)
    torch.testing.assert_close(out, alone[:, 0])
    assert torch.equal(torch.autograd.grad(state.sum(), x)[0] != 0, torch.ones(3, 4, dtype=torch.bool))
