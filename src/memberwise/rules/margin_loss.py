"""Margin losses of classes: computed for each sample of all members at once, then summed over each member's own.

torch has no batching rule for them.
"""

from __future__ import annotations

from typing import Any

import torch

from memberwise.rules.axis import expanded
from memberwise.rules.loss import MEAN, NONE, over_members
from memberwise.rules.registry import register_rule

_aten = torch.ops.aten


def _spread(grad: torch.Tensor, dim: Any, like: torch.Tensor, reduction: int) -> torch.Tensor:
    """The gradient of each sample's loss, `(M * N)`, from that of the losses, or of one number a member."""
    grad = expanded(grad, dim, like.shape[0])
    has_batch = like.ndim == 3
    if not has_batch or reduction == NONE:
        return grad.reshape(-1)
    grad = grad / like.shape[1] if reduction == MEAN else grad
    return grad.unsqueeze(1).expand(like.shape[:2]).reshape(-1)


def _rows(scores: torch.Tensor) -> torch.Tensor:
    """`(M * N, C)` of scores or targets; a member's single number is one sample of one class."""
    return scores.reshape(-1, scores.shape[-1] if scores.ndim > 1 else 1)


def _weights(weight: Any, dim: Any, target: torch.Tensor) -> torch.Tensor | None:
    """Each sample's own, `(M * N)`, where members have weights of their own: `(M, C)` at `(M, N)` or `(M)`."""
    if weight is None or dim is None:
        return None
    return weight.gather(1, target.view(target.shape[0], -1)).view(-1)


@register_rule(_aten.multi_margin_loss.default)
def multi_margin_loss(
    info: Any,
    in_dims: Any,
    x: Any,
    target: Any,
    p: Any = 1,
    margin: Any = 1,
    weight: Any = None,
    reduction: int = MEAN,
) -> Any:
    """A weight multiplies a sample's loss."""
    size = info.batch_size
    x, target = expanded(x, in_dims[0], size), expanded(target, in_dims[1], size)
    own = _weights(weight, (*in_dims, None, None, None)[4], target)
    folded = _rows(x), target.reshape(-1)
    losses = _aten.multi_margin_loss.default(*folded, p, margin, weight if own is None else None, NONE)
    return over_members((losses if own is None else losses * own).view(target.shape), reduction), 0


@register_rule(_aten.multi_margin_loss_backward.default)
def multi_margin_loss_backward(
    info: Any,
    in_dims: Any,
    grad: Any,
    x: Any,
    target: Any,
    p: Any,
    margin: Any,
    weight: Any = None,
    reduction: int = MEAN,
) -> Any:
    """As `multi_margin_loss`."""
    size = info.batch_size
    x, target = expanded(x, in_dims[1], size), expanded(target, in_dims[2], size)
    own = _weights(weight, (*in_dims, None, None)[5], target)
    grad = _spread(grad, in_dims[0], x, reduction)
    folded = _rows(x), target.reshape(-1)
    grad = grad if own is None else grad * own
    weight = weight if own is None else None
    return _aten.multi_margin_loss_backward.default(grad, *folded, p, margin, weight, NONE).view(x.shape), 0


@register_rule(_aten.multilabel_margin_loss_forward.default)
def multilabel_margin_loss(info: Any, in_dims: Any, x: Any, target: Any, reduction: int) -> Any:
    """Beside the losses it gives which classes are targets."""
    size = info.batch_size
    x, target = expanded(x, in_dims[0], size), expanded(target, in_dims[1], size)
    folded = _rows(x), _rows(target)
    losses, marked = _aten.multilabel_margin_loss_forward.default(*folded, NONE)
    return (over_members(losses.view(x.shape[: max(x.ndim - 1, 1)]), reduction), marked.view(target.shape)), 0


@register_rule(_aten.multilabel_margin_loss_backward.default)
def multilabel_margin_loss_backward(
    info: Any, in_dims: Any, grad: Any, x: Any, target: Any, reduction: int, marked: Any
) -> Any:
    """As `multilabel_margin_loss`."""
    size, dims = info.batch_size, (in_dims[1], in_dims[2], in_dims[4])
    x, *rest = (expanded(value, dim, size) for value, dim in zip((x, target, marked), dims, strict=True))
    grad = _spread(grad, in_dims[0], x, reduction)
    target, marked = map(_rows, rest)
    folded = grad, _rows(x), target, NONE, marked
    return _aten.multilabel_margin_loss_backward.default(*folded).view(x.shape), 0
