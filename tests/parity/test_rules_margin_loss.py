"""Rules of margin losses of classes."""

from __future__ import annotations

import pytest
import torch

from tests.parity.rule_case import RuleCase, case, of, positive, whole

_aten = torch.ops.aten

_margin, _margin_back = _aten.multi_margin_loss.default, _aten.multi_margin_loss_backward.default
_labels, _labels_back = _aten.multilabel_margin_loss_forward.default, _aten.multilabel_margin_loss_backward.default
_targets = torch.tensor([[1, 0, -1, 2], [3, -1, 0, 1]])
_marked = _labels(of(2, 4), _targets, 1)[1]

CASES = [
    *[
        case(
            _margin,
            *(of(4, 3), whole(3, 4), p, 0.9, weight, reduction),
            name=f"p {p}, reduction {reduction}",
            state=(4,),
            batch_dims=(0, 0, None, None, None, None) if reduction == 0 else None,
        )
        for reduction in (0, 1, 2)
        for p, weight in ((1, None), (2, positive(3)))
    ],
    case(_margin, of(3), torch.tensor(1), name="one sample"),
    case(_margin, of(), torch.tensor(0), name="one number"),
    case(_margin_back, of(), of(4, 3), whole(3, 4), 1, 0.9, positive(3), 1, grad=False),
    case(_margin_back, of(4), of(4, 3), whole(3, 4), 2, 0.9, None, 0, name="each", grad=False),
    case(_margin_back, of(), of(3), torch.tensor(1), 1, 1.0, positive(3), 2, name="one sample", grad=False),
    *[case(_labels, of(2, 4), _targets, reduction, name=f"reduction {reduction}") for reduction in (0, 1, 2)],
    case(_labels, of(4), _targets[0], 1, name="one sample"),
    case(_labels, of(), torch.tensor(0), 0, name="one number"),
    case(_labels_back, of(), of(2, 4), _targets, 1, _marked, grad=False),
    case(_labels_back, of(2), of(2, 4), _targets, 0, _marked, name="each", grad=False),
    case(_labels_back, of(), of(4), _targets[0], 2, _marked[0], name="one sample", grad=False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rule(case: RuleCase) -> None:
    case.check()
