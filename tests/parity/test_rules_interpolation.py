"""Rules of interpolation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from memberwise.engine.tensor import MemberTensor
from memberwise.rules.folding import is_among_channels
from memberwise.rules.interpolation import WAYS
from tests.parity.loops import check, numbers
from tests.parity.rule_case import RuleCase, case, of

_aten = torch.ops.aten

_SPACES = {"1d": (4,), "2d": (3, 5), "3d": (3, 2, 4)}


def _twice(space: tuple[int, ...]) -> list[int]:
    return [2 * size for size in space]


def _space(way: str) -> tuple[int, ...]:
    return next(space for name, space in _SPACES.items() if name in way)


def _aligned(way: str) -> tuple[bool, ...]:
    """`align_corners`, of the ways that have it."""
    return () if "nearest" in way else (False,)


def _dtypes(way: str) -> dict[str, Any]:
    """What torch's kernels of antialiasing take."""
    return {"dtypes": (torch.float32,)} if way.endswith("aa") else {}


CASES = [
    *[
        case(
            getattr(_aten, way).default,
            *(of(2, 3, *_space(way)), [2 * size - 1 for size in _space(way)], *_aligned(way)),
            batch_dims=(0, None, *[None] * len(_aligned(way))),
            **_dtypes(way),
        )
        for way in WAYS
    ],
    *[
        case(
            getattr(_aten, f"{way}_backward").default,
            *(of(2, 3, *_twice(_space(way))), _twice(_space(way)), [2, 3, *_space(way)]),
            *(*_aligned(way), *[2.0] * len(_space(way))),
            **_dtypes(way),
        )
        for way in WAYS
    ],
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rule(case: RuleCase) -> None:
    case.check()


@pytest.mark.parametrize("mode", ["nearest-exact", "bilinear"])
def test_the_order_of_channels_last_is_kept(mode: str) -> None:
    """As alone: what lies so gives a result that lies so."""

    def doubled(x: torch.Tensor) -> torch.Tensor:
        out = F.interpolate(x.contiguous(memory_format=torch.channels_last), scale_factor=2.0, mode=mode)
        assert out.is_contiguous(memory_format=torch.channels_last)
        return out

    check(doubled, numbers(3, 2, 4, 3, 5))


MODES = ("nearest", "nearest-exact", "bilinear", "bicubic")


@pytest.mark.parametrize("mode", MODES)
def test_what_lies_among_the_channels_stays_there(mode: str) -> None:
    """Between convolutions nothing is copied, in forward and in backward."""
    lies: list[bool] = []

    def note(x: torch.Tensor) -> None:
        if isinstance(x, MemberTensor):
            assert x.is_contiguous()
            lies.append(is_among_channels(x._inner))

    def between(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        hidden = F.conv2d(x, first)
        out = F.interpolate(hidden, scale_factor=2.0, mode=mode)
        note(out)
        if hidden.requires_grad:
            hidden.register_hook(note)
        return F.conv2d(out, second)

    check(between, numbers(3, 2, 4, 5, 6), numbers(3, 8, 4, 3, 3), numbers(3, 4, 8, 3, 3))
    assert lies and all(lies)
