"""Losses: computed for each sample of all members at once, then summed over each member's own.

torch's batching of an nll loss is a dozen operations: for M = 4, batch 64, 105 us forward and 83 backward, where these
take 39 and 38. Of a pointwise loss it is the same as here, at 12 us more.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch.nn import functional as F

from memberwise.engine.signals import Decline
from memberwise.rules.axis import aligned, expanded, lift
from memberwise.rules.composite import composite, without_kept
from memberwise.rules.registry import register_rule

_aten = torch.ops.aten
NONE, MEAN, SUM = 0, 1, 2


def over_members(value: torch.Tensor, reduction: int) -> torch.Tensor:
    """Losses `(M, *s)` as they are, or their mean or sum `(M)`."""
    if reduction == NONE or value.ndim == 1:
        return value
    dims = tuple(range(1, value.ndim))
    return value.sum(dims) if reduction == SUM else value.mean(dims)


def _pointwise(overload: Any) -> Any:
    """A loss of tensors that broadcast, of which torch takes the first to have the result's shape."""
    defaults, place = _defaults(overload)

    def rule(info: Any, in_dims: Any, *args: Any) -> Any:
        args = (*args, *defaults[len(args) :])
        own = _spread(args[:place], in_dims, info.batch_size)
        return over_members(overload(*own, NONE, *args[place + 1 :]), args[place]), 0

    return rule


def _pointwise_backward(overload: Any) -> Any:
    """Its gradient: of one number a member, spread over that member's losses."""
    defaults, place = _defaults(overload)

    def rule(info: Any, in_dims: Any, *args: Any) -> Any:
        args = (*args, *defaults[len(args) :])
        grad, *own = _spread(args[:place], in_dims, info.batch_size)
        if args[place] == MEAN:
            grad = grad / math.prod(args[1].shape[in_dims[1] == 0 :])
        return overload(grad, *own, NONE, *args[place + 1 :]), 0

    return rule


def _spread(values: Any, dims: Any, size: int) -> list[Any]:
    """Tensors of one shape, `(M, *s)`: some of torch's loss kernels broadcast otherwise than by the rules."""
    dims = (*dims, *(None for _ in values))  # of arguments that torch left out, as they are None
    found = [expanded(v, dim, size) if isinstance(v, torch.Tensor) else v for v, dim in zip(values, dims, strict=False)]
    shapes = {value.shape for value in found if value is not None}
    if len(shapes) == 1:
        return found
    found = aligned(found, [None if value is None else 0 for value in found])
    shape = torch.broadcast_shapes(*(value.shape for value in found if value is not None))
    return [None if value is None else value.expand(shape) for value in found]


def _defaults(overload: Any) -> tuple[list[Any], int]:
    """The default of each argument (torch leaves out what is equal to it), and the place of the reduction."""
    arguments = overload._schema.arguments
    place = next(k for k, argument in enumerate(arguments) if argument.name == "reduction")
    return [argument.default_value for argument in arguments], place


for _name in ("mse_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss", "binary_cross_entropy"):
    _forward, _backward = getattr(_aten, _name).default, getattr(_aten, _name + "_backward").default
    register_rule(_forward, _pointwise(_forward))
    register_rule(_backward, _pointwise_backward(_backward))
_with_logits = _aten.binary_cross_entropy_with_logits.default
register_rule(_with_logits, _pointwise(_with_logits))


def count(target: torch.Tensor, ignore: int, dtype: torch.dtype) -> torch.Tensor:
    """`(M)`: how many of the labels `(M, *s)` count."""
    counted = target != ignore
    if counted.ndim == 1:
        return counted.to(dtype)
    return counted.sum(tuple(range(1, counted.ndim)), dtype=dtype)


class Samples:
    """The samples of all members in one batch, for torch's nll losses.

    Args:
        x: log-probabilities: `(M, N, C, *s)`, `(M, C)` of one sample a member, or `(M, C, N)`.
        target: classes, `(M, N, *s)`, or `(M)`.
        weight: of each class: shared `(C)`, or `(M, C)`, or None.
        w_dim: whether the weight is stacked.
        ignore: the class that does not count.
        across: whether `x` is `(M, C, N)`: then a member is an image of N pixels.
    """

    def __init__(self, x: Any, target: Any, weight: Any, w_dim: Any, ignore: int, across: bool = False) -> None:
        self.x, self.target, self.weight, self.w_dim, self.ignore = x, target, weight, w_dim, ignore
        self.across = across
        self.lead = 2 if target.ndim > 1 else 1
        self.classes = 1 if across else self.lead
        self.kind = "nll_loss2d" if across or x.ndim == 5 else "nll_loss"

    @functools.cached_property
    def ignored(self) -> torch.Tensor:
        """`(M, N, *s)`: the samples that do not count."""
        return self.target == self.ignore

    def fold(self, value: torch.Tensor) -> torch.Tensor:
        """`(M, N, *s)` as `(M * N, *s)`; across, as `(M, N, 1)`."""
        if self.across:
            return value.unsqueeze(-1)
        return value.reshape(math.prod(value.shape[: self.lead]), *value.shape[self.lead :])

    def _arguments(self) -> tuple[Any, ...]:
        shared = self.weight if self.w_dim is None else None
        return self.fold(self.x), self.fold(self.target), shared, NONE, self.ignore

    def losses(self) -> torch.Tensor:
        """`(M, N, *s)`, the loss of each sample, 0 where it is ignored."""
        call = getattr(_aten, self.kind + "_forward").default
        found = call(*self._arguments())[0].view(self.target.shape)
        return found if self.w_dim is None else found * self.each()

    def gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """Of the shape of `x`, from the gradient of each sample's loss, `(M, N, *s)`."""
        call = getattr(_aten, self.kind + "_backward").default
        grad = grad if self.w_dim is None else grad * self.each()
        unused = grad.new_empty(())  # the total weight: torch reads it for the mean only
        return call(self.fold(grad), *self._arguments(), unused).view(self.x.shape)

    def each(self) -> torch.Tensor:
        """The weight of each sample, `(M, N, *s)`, 0 where it is ignored."""
        known = self.target.masked_fill(self.ignored, 0)
        if self.w_dim is None:
            return self.weight[known].masked_fill_(self.ignored, 0)
        found = self.weight.gather(1, known.view(known.shape[0], -1)).view(known.shape)
        return found.masked_fill_(self.ignored, 0)

    def total(self) -> torch.Tensor:
        """`(M)`: the weight of all of a member's samples that count."""
        if self.weight is None:
            return count(self.target, self.ignore, self.x.dtype)
        return over_members(self.each(), SUM)

    def beside(self, like: torch.Tensor) -> torch.Tensor | None:
        """The classes' weights, to broadcast against `(M, N, C)` or, across, `(M, C, N)`."""
        if self.weight is None:
            return None
        found = self.weight if self.w_dim is None else lift(self.weight, like.ndim - 1)
        return found.unsqueeze(-1) if self.across and self.w_dim is None else self._turn(found)

    def _turn(self, value: torch.Tensor) -> torch.Tensor:
        return value.transpose(1, 2) if self.across else value


def _nll_forward(info: Any, in_dims: Any, x: Any, target: Any, weight: Any, reduction: int, ignore: int) -> Any:
    x, target = expanded(x, in_dims[0], info.batch_size), expanded(target, in_dims[1], info.batch_size)
    samples = Samples(x, target, weight, in_dims[2], ignore)
    losses = samples.losses()
    if reduction == NONE:
        return (losses, x.new_zeros(x.shape[0])), 0
    total, out = samples.total(), over_members(losses, SUM)
    return (out / total if reduction == MEAN else out, total), 0


def _nll_backward(info: Any, in_dims: Any, grad: Any, x: Any, target: Any, weight: Any, *rest: Any) -> Any:
    reduction, ignore, total = rest
    dims = in_dims[0], in_dims[1], in_dims[2], in_dims[6]
    full = (expanded(value, dim, info.batch_size) for value, dim in zip((grad, x, target, total), dims, strict=True))
    grad, x, target, total = full
    if reduction != NONE:
        grad = grad / total if reduction == MEAN else grad
        grad = lift(grad, target.ndim - 1).expand(target.shape)
    return Samples(x, target, weight, in_dims[3], ignore).gradient(grad), 0


for _kind in ("nll_loss", "nll_loss2d"):
    register_rule(getattr(_aten, _kind + "_forward").default, _nll_forward)
    register_rule(getattr(_aten, _kind + "_backward").default, _nll_backward)


REDUCTIONS = {"none": NONE, "mean": MEAN, "sum": SUM}
_NAMES = {number: name for name, number in REDUCTIONS.items()}


def _mse_signature(
    input: Any, target: Any, size_average: Any = None, reduce: Any = None, reduction: str = "mean", weight: Any = None
) -> Any:  # F.mse_loss's own names
    if size_average is not None or reduce is not None or weight is not None or reduction not in REDUCTIONS:
        return Decline("a weight, or a deprecated argument")
    if input.shape != target.shape or input.dtype != target.dtype or input.is_complex():
        return Decline("complex, or input and target of other shape or type, of which torch warns")
    if reduction == "none" and not (input.is_contiguous() and target.is_contiguous()):
        return Decline("the result keeps an order that is not contiguous")
    return input, target, REDUCTIONS[reduction]


def _mse(x: torch.Tensor, target: torch.Tensor, reduction: int) -> torch.Tensor:
    return F.mse_loss(x, target, reduction=_NAMES[reduction])


@composite(F.mse_loss, signature=_mse_signature)
class MseLoss:
    """The squared difference; by single operations it takes 110 us more, as torch expands both sides first."""

    plain = _mse

    @staticmethod
    def forward(info: Any, in_dims: Any, x: torch.Tensor, target: torch.Tensor, reduction: int) -> Any:
        if 0 not in in_dims:
            return Decline("equal in all members")
        x, target = expanded(x, in_dims[0], info.batch_size), expanded(target, in_dims[1], info.batch_size)
        return over_members(_aten.mse_loss.default(x, target, NONE), reduction), ()

    below = staticmethod(without_kept(forward))

    @staticmethod
    def backward(info: Any, in_dims: Any, needs: Any, inputs: Any, kept: Any, grad: torch.Tensor) -> Any:
        x, target, reduction = inputs
        size = info.batch_size
        x, target = expanded(x, in_dims[0], size), expanded(target, in_dims[1], size)
        if reduction == MEAN:
            grad = grad / math.prod(x.shape[1:])
        found = _aten.mse_loss_backward.default(lift(grad, x.ndim - 1), x, target, NONE)
        return found if needs[0] else None, -found if needs[1] else None, None
