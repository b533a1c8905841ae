"""Rules of the CTC loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import memberwise
from memberwise.engine import trace
from tests.parity.loops import check, numbers
from tests.parity.rule_case import RuleCase, case, of, whole

_aten = torch.ops.aten

_log_probs = of(6, 3, 5).log_softmax(-1)
_targets, _lengths, _of_targets = whole(4, 3, 4) + 1, torch.tensor([6, 4, 5]), torch.tensor([2, 1, 4])
_loss, _alpha = _aten._ctc_loss.Tensor(_log_probs, _targets, _lengths, _of_targets)

CASES = [
    case(
        _aten._ctc_loss_backward.Tensor,
        *(of(3), _log_probs, _targets, _lengths, _of_targets, _loss, _alpha, 0),
        grad=False,
        dtypes=(),
        stacked=[(0,)],
        thorough=False,
    ),
]

ALONE = {_aten._ctc_loss.Tensor: "log alpha, its second result, is in part whatever the memory held"}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rule(case: RuleCase) -> None:
    case.check()


_OWN_LENGTHS = torch.tensor([[6, 4, 5], [5, 6, 6], [3, 6, 4]])
_OWN_TARGETS = torch.tensor([[2, 1, 3], [0, 4, 2], [1, 2, 3]])


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("one_after_another", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_lengths_of_each_member(reduction: str, one_after_another: bool, own: bool) -> None:
    """Lengths and targets shared or a member's own, padded or one after another; always by the rule."""
    x, targets = numbers(3, 6, 3, 5), torch.randint(1, 5, (3, 3, 4), generator=torch.Generator().manual_seed(0))
    given = (x, targets.flatten(1)[:, :6] if one_after_another else targets, _OWN_LENGTHS, _OWN_TARGETS)
    dims: tuple[Any, ...] = (0, 0, 0, 0) if own else (0, None, None, None)
    args = [value if dim == 0 else value[0] for value, dim in zip(given, dims, strict=True)]
    _check_by_rule(
        lambda x, *rest: F.ctc_loss(x.log_softmax(-1), *rest, reduction=reduction, zero_infinity=True), args, dims
    )


def test_lengths_that_are_numbers() -> None:
    """torch writes them into a tensor, for the mean."""
    targets = whole(4, 3, 4) + 1
    for function in (F.ctc_loss, torch.ctc_loss):
        _check_by_rule(
            lambda x, function=function: function(x.log_softmax(-1), targets, (6, 6, 5), [2, 3, 4]),
            [numbers(3, 6, 3, 5)],
            (0,),
        )


def _check_by_rule(func: Any, args: Any, dims: Any) -> None:
    with trace.recording() as record:
        check(func, *args, in_dims=dims)
    assert not [entry.op for entry in record.entries.values() if entry.path in ("loop", "retreat")]


def test_one_sequence() -> None:
    check(
        lambda x: F.ctc_loss(x.log_softmax(-1), torch.tensor([1, 2]), torch.tensor(6), torch.tensor(2)),
        numbers(3, 6, 5),
    )


def test_infinite_losses_are_zero_where_asked_for() -> None:
    """Member 1's target is longer than its input."""
    lengths, of_targets, targets = torch.tensor([[4, 4], [2, 4]]), torch.tensor([[3, 2], [3, 2]]), whole(3, 2, 3) + 1
    check(
        lambda x, *own: F.ctc_loss(x.log_softmax(-1), targets, *own, zero_infinity=True),
        *(numbers(2, 4, 2, 4), lengths, of_targets),
    )


def test_lengths_that_do_not_add_up_in_one_member_are_refused_as_alone() -> None:
    """Together the members' lengths would add up."""
    own = torch.tensor([[2, 3], [4, 3]])
    x, targets = of(2, 6, 2, 4).log_softmax(-1), whole(3, 2, 6) + 1
    with pytest.raises(RuntimeError, match="Expected tensor to have size"):
        F.ctc_loss(x[0], targets[0], torch.tensor([6, 6]), own[0])
    with pytest.raises(RuntimeError, match="Expected tensor to have size"):
        memberwise.vmap(F.ctc_loss, (0, 0, None, 0))(x, targets, torch.tensor([6, 6]), own)
