"""Rules of losses."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

import memberwise
from tests.parity.loops import check, numbers
from tests.parity.rule_case import RuleCase, case, of, positive, whole

_aten = torch.ops.aten

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
    *[
        case(
            F.cross_entropy,
            *(of(count, 3), whole(3, count), weight),
            name=f"{count} samples, {reduction}, ignore {ignore}, smoothing {smoothing}",
            state=(2,),
            batch_dims=(0, 0, None),
            reduction=reduction,
            ignore_index=ignore,
            label_smoothing=smoothing,
        )
        for count, weight in ((4, None), (9, None), (9, positive(3)))
        for reduction, ignore, smoothing in itertools.product(("none", "mean", "sum"), (-100, 1), (0.0, 0.1))
    ],
    case(F.cross_entropy, of(3), torch.tensor(1), positive(3), name="one sample", state=(2,), label_smoothing=0.2),
    case(F.cross_entropy, of(9, 9), whole(9, 9), name="as many classes as samples"),
    *[
        case(
            F.mse_loss,
            *(of(4, 3), of(4, 3, seed=3)),
            name=reduction,
            declines=reduction == "none",
            batch_dims=(0, 0),
            reduction=reduction,
        )
        for reduction in ("none", "mean", "sum")
    ],
    case(F.mse_loss, of(), of(), name="one number"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rule(case: RuleCase) -> None:
    case.check()


@pytest.mark.parametrize("count", [4, 9])
@pytest.mark.parametrize("label", [3, -1])
def test_a_label_out_of_range_is_refused(count: int, label: int) -> None:
    """As alone, and never another member's class."""
    labels = whole(3, 2, count)
    labels[0, 1] = label
    with pytest.raises(IndexError):
        memberwise.vmap(F.cross_entropy)(of(2, count, 3), labels)


@pytest.mark.parametrize("kind", ["probabilities", "images", "size_average"])
def test_what_the_composite_declines(kind: str) -> None:
    """It goes down the ladder, and is the loop's."""
    if kind == "probabilities":
        check(lambda x, y: F.cross_entropy(x, y.softmax(1), label_smoothing=0.1), numbers(3, 4, 5), numbers(3, 4, 5))
    elif kind == "images":
        check(F.cross_entropy, numbers(3, 2, 5, 2, 2), whole(5, 3, 2, 2, 2))
    else:
        with pytest.warns(UserWarning, match="size_average"):
            check(lambda x, y: F.cross_entropy(x, y, size_average=False), numbers(3, 4, 5), whole(5, 3, 4))
