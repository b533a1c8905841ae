"""Reductions: over a member's dimensions, each one further in the stacked tensor.

The gradient of `min()` and `max()` of all values is a composite: alone torch fills it in where the smallest lies, and
for a subclass it multiplies by a mask, by which a gradient that is not finite would reach every value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from memberwise.engine.signals import Decline
from memberwise.rules.axis import expanded, shift_all, shifted
from memberwise.rules.composite import composite
from memberwise.rules.registry import register_rule

_aten = torch.ops.aten


def _over_dims(call: Callable[..., Any]) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Any, x: torch.Tensor, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
        ndim = x.ndim - 1
        dims = shift_all(dim, ndim) if dim else list(range(1, x.ndim))
        if ndim == 0:
            return call(x.unsqueeze(1), [1], False, *args[1:], **kwargs), 0
        return call(x, dims, *args, **kwargs), 0

    return rule


def _over_all(call: Callable[..., Any]) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Any, x: torch.Tensor, **kwargs: Any) -> Any:
        dims = list(range(1, x.ndim))
        return (call(x, dims, **kwargs) if dims else call(x.unsqueeze(1), [1], **kwargs)), 0

    return rule


for _packet in (_aten.sum, _aten.mean):
    register_rule(_packet.default, _over_all(_packet.dim if _packet is _aten.mean else _packet.dim_IntList))
register_rule(_aten.sum.dim_IntList, _over_dims(_aten.sum.dim_IntList))
register_rule(_aten.mean.dim, _over_dims(_aten.mean.dim))
register_rule(_aten.amax.default, _over_dims(_aten.amax.default))
register_rule(_aten.amin.default, _over_dims(_aten.amin.default))


def _of_all(input: torch.Tensor, *rest: Any, **kwargs: Any) -> Any:  # torch.min's own name
    if rest or kwargs:
        return Decline("along a dimension, or of two tensors")
    if not input.is_floating_point() or input.is_cuda:  # where torch multiplies alone, too
        return Decline("no gradient, or torch's own")
    return (input,)


class _Extreme:
    """The smallest or largest of all; several that are equal share the gradient."""

    over: Any

    @classmethod
    def forward(cls, info: Any, in_dims: Any, x: torch.Tensor) -> Any:
        if in_dims[0] is None or x.ndim == 1 or not x.numel():
            return Decline("equal in all members, a single value or none")
        out = cls.over(x, [*range(1, x.ndim)])
        return out, (out,)

    @staticmethod
    def backward(info: Any, in_dims: Any, needs: Any, inputs: Any, kept: Any, grad: torch.Tensor) -> Any:
        x, shape = inputs[0], (-1, *[1] * (inputs[0].ndim - 1))
        where = _lies_at(x, kept[0].view(shape))
        return (torch.where(where, (grad / where.flatten(1).sum(1)).view(shape), 0.0),)

    @staticmethod
    def again(needs: Any, inputs: Any, kept: Any, grad: torch.Tensor) -> Any:
        """Linear in the gradient, and flat in the values."""
        where = _lies_at(inputs[0].detach(), kept[0].detach())
        return (torch.where(where, grad / where.sum(), 0.0),)


@composite(torch.min, torch.Tensor.min, signature=_of_all)
class Smallest(_Extreme):
    """`x.min()`."""

    over = _aten.amin.default


@composite(torch.max, torch.Tensor.max, signature=_of_all)
class Largest(_Extreme):
    """`x.max()`."""

    over = _aten.amax.default


def _lies_at(x: torch.Tensor, extreme: torch.Tensor) -> torch.Tensor:
    """Where the values are the extreme one; NaN is both smallest and largest."""
    return (x == extreme) | (x.isnan() & extreme.isnan())


@register_rule(_aten.renorm.default)
def renorm(info: Any, in_dims: Any, x: torch.Tensor, p: float, dim: int, most: float) -> Any:
    """torch's own formula, of each member's slices; it has no batching."""
    if x.ndim < 3:
        return Decline("at least two dimensions are expected", by_member=True)
    others = [k for k in range(1, x.ndim) if k != shifted(dim, x.ndim - 1)]
    wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else None
    norm = torch.linalg.vector_norm(x, p, others, True, dtype=wide)
    factor = torch.where(norm > most, most / (norm + 1e-7), 1.0)
    return x * factor.to(x.dtype if wide else norm.dtype), 0


def _segments(call: Callable[..., Any], count: int) -> Callable[..., Any]:
    """`lengths` or `offsets` have a row for each place before the axis: with the members, one dimension more."""

    def rule(info: Any, in_dims: Any, *args: Any, axis: int = 0, **kwargs: Any) -> Any:
        own = [expanded(value, dim, info.batch_size) for value, dim in zip(args[:count], in_dims, strict=False)]
        for name in ("lengths", "offsets"):
            value = kwargs.get(name)
            if value is not None and value.ndim == axis + 1:
                kwargs[name] = value.expand(info.batch_size, *value.shape)
        return call(*own, *args[count:], axis=axis + 1, **kwargs), 0

    return rule


register_rule(_aten.segment_reduce.default, _segments(_aten.segment_reduce.default, 1))
register_rule(_aten._segment_reduce_backward.default, _segments(_aten._segment_reduce_backward.default, 3))
