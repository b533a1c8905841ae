"""Rules of interpolation."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.parity.loops import check, numbers
from tests.parity.rule_case import RuleCase, case, of

_aten = torch.ops.aten

_SPACES = {"1d": (4,), "2d": (3, 5), "3d": (3, 2, 4)}


def _twice(space: tuple[int, ...]) -> list[int]:
    return [2 * size for size in space]


CASES = [
    *[
        case(
            getattr(_aten, f"_upsample_nearest_exact{name}").default,
            *(of(2, 3, *space), [2 * size - 1 for size in space]),
            batch_dims=(0, None),
        )
        for name, space in _SPACES.items()
    ],
    *[
        case(
            getattr(_aten, f"_upsample_nearest_exact{name}_backward").default,
            *(of(2, 3, *_twice(space)), _twice(space), [2, 3, *space], *[2.0] * len(space)),
        )
        for name, space in _SPACES.items()
    ],
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rule(case: RuleCase) -> None:
    case.check()


def test_the_order_of_channels_last_is_kept() -> None:
    """As alone: what lies so gives a result that lies so."""

    def doubled(x: torch.Tensor) -> torch.Tensor:
        out = F.interpolate(x.contiguous(memory_format=torch.channels_last), scale_factor=2.0, mode="nearest-exact")
        assert out.is_contiguous(memory_format=torch.channels_last)
        return out

    check(doubled, numbers(3, 2, 4, 3, 5))
