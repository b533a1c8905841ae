"""Cross entropy as one node: the loss of class labels, with weights of classes, ignored labels and smoothing."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from memberwise.engine.signals import Decline
from memberwise.rules.axis import expanded, lift
from memberwise.rules.composite import composite, without_kept
from memberwise.rules.loss import MEAN, NONE, REDUCTIONS, SUM, Samples, count, over_members
from memberwise.rules.softmax import is_short, turned

_aten = torch.ops.aten
_NAMES = {number: name for name, number in REDUCTIONS.items()}
_LARGE = 1 << 22


def _signature(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:  # F.cross_entropy's own names
    if target.is_floating_point() or size_average is not None or reduce is not None or reduction not in REDUCTIONS:
        return Decline("class probabilities as target, or a deprecated argument")
    if not 1 <= input.ndim <= 2 or target.shape != input.shape[:-1] or not 0 <= label_smoothing <= 1:
        return Decline("images, or shapes that torch refuses")
    return input, target, weight, REDUCTIONS[reduction], ignore_index, label_smoothing


def _plain(x: Any, target: Any, weight: Any, reduction: int, ignore: int, smoothing: float) -> torch.Tensor:
    options = {"ignore_index": ignore, "reduction": _NAMES[reduction], "label_smoothing": smoothing}
    return F.cross_entropy(x, target, weight, **options)


@composite(F.cross_entropy, signature=_signature)
class CrossEntropy:
    """`-log softmax(x)[target]`, each sample's or reduced; a few classes lie across, `(M, C, N)` (see `softmax`)."""

    plain = _plain
    saves = (1, 2)  # as alone: the labels, and the weights of classes

    @staticmethod
    def forward(info: Any, in_dims: Any, x: Any, target: Any, weight: Any, *rest: Any) -> Any:
        if 0 not in in_dims or x.numel() > _LARGE:  # the node holds its input, which alone is not kept
            return Decline("equal in all members, or so large that its memory counts")
        reduction, ignore, smoothing = rest
        x, target = expanded(x, in_dims[0], info.batch_size), expanded(target, in_dims[1], info.batch_size)
        across = is_short(x, 2)
        logs = torch.log_softmax(turned(x), 1) if across else torch.log_softmax(x, -1)
        if across and weight is None and reduction == MEAN and not smoothing:
            total = count(target[:1] if in_dims[1] is None else target, ignore, logs.dtype)
            return _nll(*_pixels(logs, target), None, NONE, ignore)[0].sum((1, 2)) / total, (logs, total)
        samples = Samples(logs, target, weight, in_dims[2], ignore, across)
        losses = samples.losses()
        if smoothing:
            losses = losses * (1 - smoothing) - _even(samples, logs).mul_(smoothing / x.shape[-1])
        if reduction != MEAN:
            return over_members(losses, reduction), (logs, None)
        total = samples.total()
        return over_members(losses, SUM) / total, (logs, total)

    @staticmethod
    def below(info: Any, in_dims: Any, x: Any, target: Any, weight: Any, *rest: Any) -> Any:
        if weight is not None or rest[2]:
            return Decline("weighted or smoothed, which is computed in place")
        return without_kept(CrossEntropy.forward)(info, in_dims, x, target, weight, *rest)

    @staticmethod
    def backward(info: Any, in_dims: Any, needs: Any, inputs: Any, kept: Any, grad: torch.Tensor) -> Any:
        _, target, weight, reduction, ignore, smoothing = inputs
        logs, total = kept
        target = expanded(target, in_dims[1], info.batch_size)
        across = target.ndim == 2 and is_short(logs.transpose(1, 2), 2) and logs.shape[2] == target.shape[1]
        if across and weight is None and reduction == MEAN and not smoothing:
            each = (grad / total).view(-1, 1, 1).expand(*target.shape, 1)
            unused = logs.new_empty(())  # the total weight: torch reads it for the mean over all members
            found = _nll_backward(each, *_pixels(logs, target), None, NONE, ignore, unused)
            return _aten._log_softmax_backward_data.default(found.squeeze(3), logs, 1, logs.dtype).transpose(
                1, 2
            ), *_NO_MORE
        if reduction != NONE:
            grad = grad if total is None else grad / total
            grad = lift(grad, target.ndim - 1).expand(target.shape)
        samples = Samples(logs, target, weight, in_dims[2], ignore, across)
        found = samples.gradient(grad * (1 - smoothing) if smoothing else grad)
        if smoothing:
            found -= _even_gradient(samples, grad * (smoothing / logs.shape[samples.classes]))
        found = _aten._log_softmax_backward_data.default(found, logs, samples.classes, logs.dtype)
        return found.transpose(1, 2) if across else found, *_NO_MORE


_nll, _nll_backward = _aten.nll_loss2d_forward.default, _aten.nll_loss2d_backward.default
_NO_MORE = (None,) * 5


def _pixels(logs: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Few classes, each sample counted alike, the common case: a member is an image of N pixels."""
    return logs.unsqueeze(3), target.unsqueeze(2)


def _even(samples: Samples, logs: torch.Tensor) -> torch.Tensor:
    """`(M, N)`: the sum over classes that smoothing adds."""
    weights = samples.beside(logs)
    found = (logs if weights is None else logs * weights).sum(samples.classes)
    return found.masked_fill_(samples.ignored, 0)


def _even_gradient(samples: Samples, grad: torch.Tensor) -> torch.Tensor:
    each = grad.masked_fill(samples.ignored, 0).unsqueeze(samples.classes)
    weights = samples.beside(each)
    return each if weights is None else each * weights
