"""Rules of pooling."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from memberwise.rules import pooling
from tests.parity.rule_case import RuleCase, case, of, positive

_aten = torch.ops.aten

_flat, _solid = of(2, 3, 5, 5), of(2, 2, 4, 4, 4)
_max2, _max3 = _aten.max_pool2d_with_indices, _aten.max_pool3d_with_indices
_indices2, _indices3 = _max2.default(_flat, [2, 2])[1], _max3.default(_solid, [2, 2, 2])[1]
_frac2, _frac3 = _aten.fractional_max_pool2d.default, _aten.fractional_max_pool3d.default
_window2 = ([2, 2], [2, 2], [0, 0], [1, 1], False)
_window3 = ([2, 2, 2], [2, 2, 2], [0, 0, 0], [1, 1, 1], False)
_mean2, _mean3 = ([2, 2], [2, 2], [0, 0], False, True, None), ([2, 2, 2], [2, 2, 2], [0, 0, 0], False, True, None)

CASES = [
    case(_max2.default, _flat, [2, 2], batch_dims=(0, None)),
    case(_max2.default, of(3, 5, 5), [3, 3], [2, 2], [1, 1], name="no batch"),
    case(_max3.default, _solid, [2, 2, 2]),
    case(_aten.avg_pool2d.default, _flat, [2, 2], [1, 1], batch_dims=(0, None, None)),
    case(_aten.avg_pool3d.default, _solid, [2, 2, 2]),
    case(_aten._adaptive_avg_pool2d.default, _flat, [2, 2], batch_dims=(0, None)),
    case(_aten._adaptive_avg_pool3d.default, _solid, [2, 2, 2]),
    case(_aten.adaptive_max_pool2d.default, _flat, [2, 2], batch_dims=(0, None)),
    case(_aten.adaptive_max_pool3d.default, _solid, [2, 2, 2]),
    case(_aten.max_pool2d_with_indices_backward.default, of(2, 3, 2, 2), _flat, *_window2, _indices2),
    case(_aten.max_pool3d_with_indices_backward.default, of(2, 2, 2, 2, 2), _solid, *_window3, _indices3),
    case(_aten.avg_pool2d_backward.default, of(2, 3, 2, 2), _flat, *_mean2),
    case(_aten.avg_pool3d_backward.default, of(2, 2, 2, 2, 2), _solid, *_mean3),
    case(_aten._adaptive_avg_pool2d_backward.default, of(2, 3, 2, 2), _flat),
    case(_aten._adaptive_avg_pool3d_backward.default, of(2, 2, 2, 2, 2), _solid),
    case(
        _aten.adaptive_max_pool2d_backward.default,
        *(of(2, 3, 2, 2), _flat, _aten.adaptive_max_pool2d.default(_flat, [2, 2])[1]),
    ),
    case(
        _aten.adaptive_max_pool3d_backward.default,
        *(of(2, 2, 2, 2, 2), _solid, _aten.adaptive_max_pool3d.default(_solid, [2, 2, 2])[1]),
        thorough=False,  # torch reads indices from other memory wrongly
    ),
    case(_aten.max_unpool2d.default, _max2.default(_flat, [2, 2])[0], _indices2, [5, 5], batch_dims=(0, 0, None)),
    case(_aten.max_unpool2d.default, of(3, 2, 2), _indices2[0], [5, 5], name="no batch"),
    case(_frac2, _flat, [2, 2], [3, 3], positive(2, 3, 2), state=(3,), thorough=False),
    case(_frac2, of(3, 5, 5), [2, 2], [3, 3], positive(2, 3, 2), name="no batch", state=(3,), thorough=False),
    case(_frac3, _solid, [2, 2, 2], [2, 2, 2], positive(2, 2, 3), state=(3,), thorough=False),
    case(
        _aten.fractional_max_pool2d_backward.default,
        *(of(2, 3, 3, 3), _flat, [2, 2], [3, 3], _frac2(_flat, [2, 2], [3, 3], positive(2, 3, 2))[1]),
        thorough=False,  # as above
    ),
    case(
        _aten.fractional_max_pool3d_backward.default,
        *(of(2, 2, 2, 2, 2), _solid, [2] * 3, [2] * 3, _frac3(_solid, [2] * 3, [2] * 3, positive(2, 2, 3))[1]),
        thorough=False,  # as above
    ),
    case(_aten.max_unpool3d.default, of(2, 2, 2, 2, 2), _indices3, [4, 4, 4], [2, 2, 2], [0, 0, 0]),
]

HALVED = [
    case(_max2.default, of(2, 3, 4, 6), [2, 2], batch_dims=(0, None)),
    case(_max2.default, of(2, 3, 4, 6), [2], [2], [0], 1, False),
    case(_max2.default, of(3, 4, 6), [2, 2], name="no batch"),
    case(_max2.default, (of(2, 3, 6, 6) * 2).round(), [2, 2], [2, 2], name="equal values"),
]
UNHALVED = {
    "odd": (of(2, 3, 5, 6), [2, 2]),
    "overlapping": (of(2, 3, 6, 6), [2, 2], [1, 1]),
    "wide": (of(2, 3, 6, 6), [2, 3]),
    "padded": (of(2, 3, 6, 6), [2, 2], [2, 2], [1, 1]),
    "dilated": (of(2, 3, 6, 6), [2, 2], [2, 2], [0, 0], [2, 2]),
    "ceiled": (of(2, 3, 5, 6), [2, 2], [2, 2], [0, 0], [1, 1], True),
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rule(case: RuleCase) -> None:
    case.check()


@pytest.mark.parametrize("case", HALVED, ids=str)
def test_windows_of_two_by_two(case: RuleCase, monkeypatch: pytest.MonkeyPatch) -> None:
    served = []
    by_halves = pooling.by_halves
    monkeypatch.setattr(pooling, "_MANY", 0)
    monkeypatch.setattr(pooling, "by_halves", lambda x: served.append(x) or by_halves(x))
    case.check()
    assert served


@pytest.mark.parametrize("name", UNHALVED)
def test_other_windows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooling, "_MANY", 0)
    monkeypatch.setattr(pooling, "by_halves", None)
    case(_max2.default, *UNHALVED[name]).check()


def test_equal_values_and_nan_in_windows_of_two_by_two() -> None:
    """All 4 ** 4 windows of four values: the first of equal ones counts, the last NaN, and nothing else."""
    values = torch.tensor([-1.0, 0.0, 2.0, float("nan")], dtype=torch.float64)
    windows = torch.cartesian_prod(values, values, values, values).view(1, -1, 2, 2)
    expected, places = _max2.default(windows, [2, 2])
    ours, own_places = pooling.by_halves(windows)
    assert torch.equal(places, own_places)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


def test_members_that_lie_among_the_channels_are_pooled_there() -> None:
    """After a convolution: the same values, and a view of them reaches the pooled tensor itself."""
    from tests.parity.loops import check, numbers

    def pooled(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = torch.max_pool2d(torch.relu(torch.conv2d(x, weight)), 2)
        out.view(-1)[0] += 1
        return out

    check(pooled, numbers(3, 2, 2, 6, 6), numbers(3, 4, 2, 3, 3))


def test_one_sample_that_all_members_share_is_pooled_in_three_dimensions() -> None:
    """torch's backward reads places of maxima that lie expanded out of bounds."""
    from tests.parity.loops import check, numbers

    check(
        lambda weight, x: F.adaptive_max_pool3d(x, 2) * weight,
        numbers(3, 1, 1, 1, 1),
        numbers(2, 4, 4, 5),
        in_dims=(0, None),
    )
