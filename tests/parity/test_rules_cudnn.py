"""Rules of operations that only a GPU has."""

from __future__ import annotations

import pytest
import torch

from tests.parity.rule_case import RuleCase, of, positive

_aten = torch.ops.aten


def _forward(*shape: int) -> tuple[object, ...]:
    """x, weight, bias, running mean and variance, whether it trains, momentum, eps."""
    channels = shape[1]
    x, weight, bias, mean, var = (
        of(*shape),
        of(channels),
        of(channels, seed=1),
        of(channels, seed=2),
        positive(channels),
    )
    return *(tensor.cuda() for tensor in (x, weight, bias, mean, var)), True, 0.1, 1e-5


def _backward(*shape: int) -> tuple[object, ...]:
    """What the forward took and kept, for one gradient."""
    x, weight, _, mean, var, *_ = given = _forward(*shape)
    _, saved, invstd, reserve = _aten.cudnn_batch_norm.default(*given)
    return x, of(*shape, seed=5).cuda(), weight, mean, var, saved, invstd, 1e-5, reserve


CASES = [
    RuleCase(
        _aten.cudnn_batch_norm.default,
        lambda: _forward(4, 3, 2, 2),
        options={"state": (3, 4), "stacked": [(0, 1, 2, 3, 4), (0, 3, 4), (1, 3, 4)], "dtypes": (torch.float32,)},
    ),
    RuleCase(
        _aten.cudnn_batch_norm_backward.default,
        lambda: _backward(4, 3, 2, 2),
        options={"stacked": [(0, 1, 2, 3, 4, 5, 6)], "grad": False, "dtypes": (torch.float32,)},
        declines=True,
    ),
]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU on this machine")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rule(case: RuleCase) -> None:
    case.check()
