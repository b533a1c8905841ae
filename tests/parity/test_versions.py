"""A tensor that a backward needs is changed in place: alone torch refuses, and so must the stack, never compute on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from memberwise import vmap
from tests.parity.loops import numbers

pytestmark = pytest.mark.usefixtures("composites")


def _then(out: Any, *changes: Any) -> Any:
    return out


CHANGED: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "result of relu": lambda x, w: F.relu(x * 1).mul_(2),
    "result of exp": lambda x, w: (x * 1).exp().add_(1),
    "view of relu": lambda x, w: (lambda y: _then(y, y.view(-1).mul_(2)))(F.relu(x * 1)),
    "row of a view of relu": lambda x, w: (lambda y: _then(y, y.view(-1)[1:].mul_(2)))(F.relu(x * 1)),
    "relu by foreach": lambda x, w: (lambda y: _then(y, torch._foreach_add_([y], 1.0)))(F.relu(x * 1)),
    "input of linear": lambda x, w: (lambda h: _then(F.linear(h, w), h.mul_(2)))(x * 1),
    "weight of linear": lambda x, w: (lambda v: _then(F.linear(x, v), v.mul_(2)))(w * 1),
    "input of layer_norm": lambda x, w: (lambda h: _then(F.layer_norm(h, (5,)), h.add_(1)))(x * 1),
    "input of matmul": lambda x, w: (lambda h: _then(h @ w, h.zero_()))(x * 1),
}


@pytest.mark.parametrize("name", CHANGED)
def test_refused_as_alone(name: str) -> None:
    func = CHANGED[name]
    x, w = numbers(3, 4, 5), numbers(3, 5, 5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        func(x[0], w[0]).sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        vmap(func)(x, w).sum().backward()
