"""Rules of softmax, whose few classes lie across."""

from __future__ import annotations

import pytest
import torch

from memberwise.rules.softmax import is_short
from tests.parity.rule_case import RuleCase, case, of, positive

_aten = torch.ops.aten

CASES = [
    *[
        case(soft.default, value, dim, False, name=f"shape {tuple(value.shape)} along {dim}")
        for soft in (_aten._softmax, _aten._log_softmax)
        for value, dim in ((of(2, 3, 4), 1), (of(), 0), (of(9, 4), -1), (of(2, 9, 17), 2), (of(4), 0))
    ],
    case(_aten._softmax_backward_data.default, of(3, 4), positive(3, 4), 1, torch.float64),
    case(_aten._softmax_backward_data.default, of(9, 4), positive(9, 4), 1, torch.float64, name="few classes"),
    case(_aten._log_softmax_backward_data.default, of(3, 4), of(3, 4), 0, torch.float64),
    case(_aten._log_softmax_backward_data.default, of(9, 4), of(9, 4), -1, torch.float64, name="few classes"),
    case(_aten._log_softmax_backward_data.default, of(), of(), 0, torch.float64, name="one number"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rule(case: RuleCase) -> None:
    case.check()


def test_few_classes_are_those_that_were_measured() -> None:
    assert is_short(torch.empty(16, 64, 10), 2)
    assert not is_short(torch.empty(16, 64, 16), 2) and not is_short(torch.empty(16, 4, 10), 2)
    assert not is_short(torch.empty(16, 64, 10), 1), "along another dimension it is fast already"
