"""Rules of pooling."""

from __future__ import annotations

import pytest
import torch

from tests.parity.rule_case import RuleCase, case, of

_aten = torch.ops.aten

_flat, _solid = of(2, 3, 5, 5), of(2, 2, 4, 4, 4)
_max2, _max3 = _aten.max_pool2d_with_indices, _aten.max_pool3d_with_indices
_indices2, _indices3 = _max2.default(_flat, [2, 2])[1], _max3.default(_solid, [2, 2, 2])[1]
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
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rule(case: RuleCase) -> None:
    case.check()


def test_members_that_lie_among_the_channels_are_pooled_there() -> None:
    """After a convolution: the same values, and a view of them reaches the pooled tensor itself."""
    from tests.parity.loops import check, numbers

    def pooled(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = torch.max_pool2d(torch.relu(torch.conv2d(x, weight)), 2)
        out.view(-1)[0] += 1
        return out

    check(pooled, numbers(3, 2, 2, 6, 6), numbers(3, 4, 2, 3, 3))
