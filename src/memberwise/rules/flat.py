"""Reads and writes among all of a member's values, by number or by mask: a member's values are a row.

torch has no batching for these.
"""

from __future__ import annotations

from typing import Any

import torch

from memberwise.engine.signals import Decline
from memberwise.rules.axis import aligned, expanded
from memberwise.rules.indexing import from_the_start
from memberwise.rules.registry import register_rule

_aten = torch.ops.aten


def _row(value: torch.Tensor, dim: int | None, size: int) -> torch.Tensor:
    return expanded(value, dim, size).reshape(size, -1)


@register_rule(_aten.take.default)
def take(info: Any, in_dims: Any, x: torch.Tensor, index: torch.Tensor) -> Any:
    """A gather."""
    row, places = (_row(value, dim, info.batch_size) for value, dim in zip((x, index), in_dims, strict=True))
    shape = index.shape if in_dims[1] is None else index.shape[1:]
    return row.gather(1, from_the_start(places, row.shape[1])).view(info.batch_size, *shape), 0


@register_rule(_aten.put.default)
def put(info: Any, in_dims: Any, x: torch.Tensor, index: torch.Tensor, source: torch.Tensor, add: bool = False) -> Any:
    """A scatter."""
    values = zip((x, index, source), in_dims, strict=False)
    row, places, given = (_row(value, dim, info.batch_size) for value, dim in values)
    if places.shape != given.shape or row.dtype != given.dtype or not x.is_contiguous():
        return Decline("as many values of one type as indices are expected, and memory in order", by_member=True)
    out = (row.scatter_add if add else row.scatter)(1, from_the_start(places, row.shape[1]), given)
    return out.view(expanded(x, in_dims[0], info.batch_size).shape), 0


def _broadcast(info: Any, dims: Any, *values: torch.Tensor) -> Any:
    """`(M, *s)` of each, with one shape."""
    full = [expanded(value, dim, info.batch_size) for value, dim in zip(values, dims, strict=True)]
    return torch.broadcast_tensors(*aligned(full, [0] * len(full)))


def _numbers(mask: torch.Tensor, others: int) -> torch.Tensor:
    """The number of each true value in its row, the first being 0; of what is false, `others`."""
    return torch.where(mask, mask.cumsum(1) - 1, others)


@register_rule(_aten.masked_scatter.default)
def masked_scatter(info: Any, in_dims: Any, x: torch.Tensor, mask: torch.Tensor, source: torch.Tensor) -> Any:
    """A gather by the numbers of the true values."""
    if mask.dtype is not torch.bool or x.dtype != source.dtype or not source.numel():
        return Decline("a mask of no truth values, two types, or nothing to give", by_member=True)
    x, mask = _broadcast(info, in_dims[:2], x, mask)
    found = _row(source, in_dims[2], info.batch_size).gather(1, _numbers(_row(mask, 0, info.batch_size), 0))
    return torch.where(mask, found.view(mask.shape), x).contiguous(), 0


@register_rule(_aten.masked_scatter_backward.default)
def masked_scatter_backward(info: Any, in_dims: Any, grad: torch.Tensor, mask: torch.Tensor, sizes: Any) -> Any:
    """A scatter by the numbers of the true values; all others go to one more place, which is left out."""
    grad, mask = _broadcast(info, in_dims[:2], grad, mask)
    count = torch.Size(sizes).numel()
    places = _numbers(_row(mask, 0, info.batch_size), count).clamp(max=count)
    out = grad.new_zeros(info.batch_size, count + 1).scatter(1, places, _row(grad, 0, info.batch_size))
    return out[:, :count].reshape(info.batch_size, *sizes), 0


@register_rule(_aten.index_put.default)
def index_put(
    info: Any, in_dims: Any, x: torch.Tensor, indices: Any, values: torch.Tensor, accumulate: bool = False
) -> Any:
    """One value for all places of a mask, as in `x[mask] = value`: a choice by the mask."""
    used = [k for k, index in enumerate(indices) if index is not None]
    mask, dim = indices[used[-1]], in_dims[1][used[-1]]
    if len(used) > 1 or mask.dtype is not torch.bool:
        return Decline("several indices, or numbers")
    own = mask.shape[dim is not None :]
    x = expanded(x, in_dims[0], info.batch_size)
    behind = x.ndim - 1 - used[0] - len(own)
    if x.shape[used[0] + 1 : x.ndim - behind] != own or values.dtype != x.dtype:
        return Decline("a mask of the tensor's shape is expected, and values of its type", by_member=dim is not None)
    at = values.ndim - behind - 1  # the values' dimension for the places
    if at >= (in_dims[2] is not None):
        if values.shape[at] != 1:
            return Decline("a value a place; how many there are depends on the mask", by_member=dim is not None)
        values = values.reshape(*values.shape[:at], *(1,) * len(own), *values.shape[at + 1 :])
    mask = mask.reshape(*mask.shape, *(1,) * behind)
    x, mask, values = aligned((x, mask, values), (0, dim, in_dims[2]))
    return torch.where(mask, x + values if accumulate else values, x), 0


_MOST = 1 << 22
"""Comparisons at once; torch sorts where there are many."""


@register_rule(_aten.isin.Scalar_Tensor)
@register_rule(_aten.isin.Tensor_Tensor)
def isin(
    info: Any, in_dims: Any, elements: Any, test: torch.Tensor, *, assume_unique: bool = False, invert: bool = False
) -> Any:
    """Each element beside each of its own member's values."""
    if not isinstance(elements, torch.Tensor):
        return _row(test == elements, 0, info.batch_size).any(1) ^ invert, 0
    if elements.dtype is torch.bool or not elements.is_contiguous() or elements.numel() * test.numel() > _MOST:
        return Decline("truth values, memory that torch refuses, or too many comparisons", by_member=True)
    test = test.reshape(-1) if in_dims[1] is None else _row(test, 0, info.batch_size)
    elements, test = aligned((elements.unsqueeze(-1), test), in_dims)
    return (elements == test).any(-1) ^ invert, 0
