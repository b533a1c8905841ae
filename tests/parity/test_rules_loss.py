"""Rules of losses."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.parity.rule_case import RuleCase, case, of, positive, whole

_aten = torch.ops.aten
pytestmark = pytest.mark.usefixtures("one_thread")

_REDUCTIONS = (0, 1, 2)
_nll, _nll_back = _aten.nll_loss_forward.default, _aten.nll_loss_backward.default
_nll2d, _nll2d_back = _aten.nll_loss2d_forward.default, _aten.nll_loss2d_backward.default
_bce, _bce_back = _aten.binary_cross_entropy.default, _aten.binary_cross_entropy_backward.default
_logits = _aten.binary_cross_entropy_with_logits.default
_classes, _pixels = whole(3, 4), whole(3, 4, 2, 2)

_WITH_GRADIENTS = (
    (_aten.mse_loss.default,),
    (_aten.smooth_l1_loss.default, 0.7),
    (_aten.huber_loss.default, 0.7),
)

CASES = [
    *[
        case(
            _nll,
            *(of(4, 3), _classes, weight, reduction, ignore),
            name=f"reduction {reduction}, ignore {ignore}",
            state=(2,),
            batch_dims=(0, 0, None, None, None),
        )
        for weight, reduction, ignore in itertools.product((None, positive(3)), _REDUCTIONS, (-100, 1))
    ],
    case(_nll, of(3), torch.tensor(1), positive(3), 1, -100, name="one sample", state=(2,)),
    case(_nll, of(3), torch.tensor(1), None, 1, 1, name="one sample, ignored"),
    *[
        case(
            _nll2d,
            *(of(4, 3, 2, 2), _pixels, weight, reduction, 1),
            name=f"reduction {reduction}",
            state=(2,),
            batch_dims=(0, 0, None, None, None),
        )
        for weight, reduction in itertools.product((None, positive(3)), _REDUCTIONS)
    ],
    case(_nll_back, of(), of(4, 3), _classes, None, 1, -100, positive(), state=(3, 6)),
    case(_nll_back, of(4), of(4, 3), _classes, positive(3), 0, 1, positive(), name="each", state=(3, 6)),
    case(_nll_back, of(), of(3), torch.tensor(1), positive(3), 1, -100, positive(), name="one sample", state=(3, 6)),
    case(_nll2d_back, of(), of(4, 3, 2, 2), _pixels, None, 2, -100, positive(), state=(3, 6), thorough=False),
    *[
        case(loss, of(3, 4), of(3, 4, seed=1), reduction, *rest, name=f"reduction {reduction}")
        for loss, *rest in (
            (_aten.mse_loss.default,),
            (_aten.smooth_l1_loss.default, 0.7),
            (_aten.huber_loss.default, 0.7),
        )
        for reduction in _REDUCTIONS
    ],
    *[
        case(_aten.soft_margin_loss.default, of(3, 4), of(3, 4, seed=3), reduction, state=(1,))
        for reduction in _REDUCTIONS
    ],
    case(_aten.mse_loss.default, of(3, 4), of(4), name="other rank"),
    case(_aten.mse_loss.default, of(), of(), name="one number"),
    case(_aten.mse_loss_backward.default, of(3, 4), of(3, 4), of(4), 0),
    case(_aten.mse_loss_backward.default, of(), of(3, 4), of(4), 1),
    case(_aten.smooth_l1_loss_backward.default, of(), of(3, 4), of(3, 4), 1, 0.7),
    case(_aten.huber_loss_backward.default, of(), of(3, 4), of(3, 4), 2, 0.7),
    case(_aten.soft_margin_loss_backward.default, of(), of(3, 4), of(3, 4), 1, state=(2,)),
    case(_bce, positive(3, 4), positive(3, 4, seed=4), positive(4), 1, state=(1, 2)),
    case(_bce, positive(3, 4), positive(3, 4, seed=4), None, 2, name="no weight", state=(1, 2)),
    case(_bce_back, of(), positive(3, 4), positive(3, 4, seed=4), positive(4), 1, grad=False),
    case(_logits, of(3, 4), positive(3, 4), positive(4), positive(4), 1, state=(2, 3)),
    case(_logits, of(3, 4), positive(3, 4), None, None, 0, name="no weight", state=(2, 3)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rule(case: RuleCase) -> None:
    case.check()
