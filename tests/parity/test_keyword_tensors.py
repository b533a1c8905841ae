"""Tensors that an operation takes by keyword have a member axis too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.parity.loops import check, numbers

pytestmark = pytest.mark.filterwarnings("ignore:.*MW206")

_TOLERANCES = torch.tensor([0.1, 0.9, 2.0], dtype=torch.float64)
_SORTED = torch.rand(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

PROGRAMS: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...], bool]] = {
    "pinv": (lambda a, t: torch.linalg.pinv(a, rtol=t), (numbers(3, 4, 4), _TOLERANCES), True),
    "matrix_rank": (
        lambda a, t: torch.linalg.matrix_rank(a, rtol=t),
        (numbers(3, 4, 4, grad=False), _TOLERANCES),
        False,
    ),
    "searchsorted": (
        lambda values, order, x: torch.searchsorted(values, x, sorter=order),
        (_SORTED, _SORTED.argsort(-1), numbers(3, 4, grad=False)),
        False,
    ),
    "histogram": (
        lambda x, weight: torch.histogram(x, 4, range=(0.0, 1.0), weight=weight).hist,
        (_SORTED, _SORTED.flip(1)),
        False,
    ),
}


@pytest.mark.parametrize("shared", ["none", "first", "last"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_keyword_tensors(name: str, shared: str) -> None:
    func, args, gradients = PROGRAMS[name]
    dims: list[int | None] = [0] * len(args)
    if shared != "none":
        place = 0 if shared == "first" else len(args) - 1
        args = tuple(
            arg[0].detach().requires_grad_(arg.requires_grad) if k == place else arg for k, arg in enumerate(args)
        )
        dims[place] = None
    check(func, *args, in_dims=dims, gradients=gradients)
