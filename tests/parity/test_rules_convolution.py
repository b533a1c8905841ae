"""Rules of convolutions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from memberwise.rules import convolution
from tests.parity.rule_case import RuleCase, case, of

_aten = torch.ops.aten

_conv, _back = _aten.convolution.default, _aten.convolution_backward.default
_BATCH = {"batch_dims": (0, *(None,) * 8)}
_plain = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
_strided = ([2, 2], [1, 0], [1, 1])
_solid = ([1] * 3, [0] * 3, [1] * 3)
_all = [True, True, True]

CASES = [
    case(_conv, of(2, 4, 5, 5), of(6, 4, 3, 3), of(6), *_plain, **_BATCH),
    case(
        _conv, of(2, 4, 5, 5), of(6, 2, 3, 3), None, [2, 2], [1, 0], [1, 1], False, [0, 0], 2, name="groups", **_BATCH
    ),
    case(_conv, of(2, 4, 5, 5), of(4, 3, 3, 3), of(3), *_strided, True, [1, 0], 1, name="up", **_BATCH),
    case(_conv, of(2, 4, 5), of(4, 3, 3), of(6), [2], [1], [1], True, [1], 2, name="up, groups", **_BATCH),
    case(_conv, of(2, 4, 5), of(6, 4, 3), of(6), [1], [1], [2], False, [0], 1, name="1d, dilated", **_BATCH),
    case(
        _conv, of(2, 2, 3, 3, 3), of(2, 2, 2, 2, 2), of(2), *([k] * 3 for k in (1, 0, 1)), False, [0] * 3, 1, name="3d"
    ),
    case(_back, of(2, 6, 5, 5), of(2, 4, 5, 5), of(6, 4, 3, 3), [6], *_plain, _all),
    case(_back, of(2, 6, 5, 5), of(2, 4, 5, 5), of(6, 2, 3, 3), [6], *_plain[:5], 2, _all, name="groups"),
    case(_back, of(2, 3, 5, 5), of(2, 4, 5, 5), of(4, 3, 3, 3), [3], *_plain[:3], True, [0, 0], 1, _all, name="up"),
]


@pytest.mark.parametrize("apart", [False, True], ids=["grouped", "by member"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rule(case: RuleCase, apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "_is_grouped", lambda *_: not apart)
    case.check()


def test_large_odd_channels_run_apart_on_cpu() -> None:
    """The sizes that were measured: whole blocks of eight channels grouped, others only while they are small."""

    def grouped(channels: int, other: int, batch: int, side: int = 16, **options: Any) -> bool:
        x, weight = torch.empty(8, batch, channels, side, side), torch.empty(8, other, channels, 3, 3)
        return convolution._is_grouped(x, weight, [1, 1], False)

    assert grouped(8, 16, 32) and grouped(32, 64, 32) and grouped(1, 8, 32)
    assert not grouped(12, 24, 32) and not grouped(3, 8, 32)
    assert grouped(3, 8, 8)


@pytest.mark.parametrize("apart", [False, True], ids=["grouped", "by member"])
def test_channels_last_inputs_and_weights(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules leave them to the ladder; values and gradients are the loop's."""
    from tests.parity.loops import check, numbers

    monkeypatch.setattr(convolution, "_is_grouped", lambda *_: not apart)

    def through(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x, weight = (value.contiguous(memory_format=torch.channels_last) for value in (x, weight))
        out = torch.conv2d(x, weight, padding=1)
        out = torch.batch_norm(out, None, None, None, None, True, 0.1, 1e-5, False)
        return torch.max_pool2d(out, 2)

    check(through, numbers(3, 2, 3, 6, 6), numbers(3, 4, 3, 3, 3))
