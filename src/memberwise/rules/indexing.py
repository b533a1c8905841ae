"""Reads and writes at indices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from memberwise._torch.tracing import tracing
from memberwise.engine.signals import Decline
from memberwise.rules.axis import aligned, expanded, shifted
from memberwise.rules.registry import register_rule

_aten = torch.ops.aten


def _index_fill(info: Any, in_dims: Any, x: torch.Tensor, dim: int, index: torch.Tensor, value: torch.Tensor) -> Any:
    """torch's batching takes one member's value for all: silently wrong in `trace`'s and other gradients."""
    x, index = (expanded(value, at, info.batch_size) for value, at in ((x, in_dims[0]), (index, in_dims[2])))
    ndim = x.ndim - 1
    count = x.shape[shifted(dim, ndim)] if ndim else 1
    rows = torch.zeros(x.shape[0], count, dtype=torch.bool, device=x.device)
    rows.scatter_(1, from_the_start(index.reshape(x.shape[0], -1), count), True)
    mask = rows.view(-1, *(count if k == dim % ndim else 1 for k in range(ndim))) if ndim else rows[:, 0]
    own = value.view(-1, *(1,) * ndim) if in_dims[3] == 0 else value
    return torch.where(mask, own.to(x.dtype), x), 0


def from_the_start(index: torch.Tensor, count: int) -> torch.Tensor:
    """Places counted from the start; what is out of range stays so, and is refused."""
    return torch.where(index < 0, index + count, index)


register_rule(_aten.index_fill.int_Tensor, _index_fill)


@register_rule(_aten.masked_fill.Tensor)
def masked_fill(info: Any, in_dims: Any, x: torch.Tensor, mask: torch.Tensor, value: torch.Tensor) -> Any:
    """A member's value is 0-d, and stays so beside its neighbours: `where` broadcasts it."""
    x, mask, value = aligned((x, mask, value), in_dims)
    return torch.where(mask, value.to(x.dtype), x), 0


@register_rule(_aten.masked_fill_.Tensor)
def masked_fill_(info: Any, in_dims: Any, x: torch.Tensor, mask: torch.Tensor, value: torch.Tensor) -> Any:
    """As `masked_fill`."""
    return x.copy_(masked_fill(info, in_dims, x, mask, value)[0]), 0


@register_rule(_aten.index_fill_.int_Tensor)
def index_fill_(info: Any, in_dims: Any, x: torch.Tensor, dim: int, index: torch.Tensor, value: torch.Tensor) -> Any:
    """As `index_fill`."""
    out = _index_fill(info, in_dims, x, dim, index, value)
    return out if type(out) is Decline else (x.copy_(out[0]), 0)


def _gather(call: Callable[..., Any]) -> Callable[..., Any]:
    """`(x, dim, index, values)`, or without values: each member's own along the dimension after the member axis.

    torch's batching does the same, at 10 us more.
    """

    def rule(info: Any, in_dims: Any, x: torch.Tensor, dim: int, index: torch.Tensor, *rest: Any, **named: Any) -> Any:
        x, index = expanded(x, in_dims[0], info.batch_size), expanded(index, in_dims[2], info.batch_size)
        if x.ndim == 1 or index.ndim == 1:
            return Decline("one number a member")
        if rest and isinstance(rest[0], torch.Tensor):
            rest = (expanded(rest[0], in_dims[3], info.batch_size), *rest[1:])
        return call(x, shifted(dim, x.ndim - 1), index, *rest, **named), 0

    return rule


for _op in (
    *(_aten.gather.default, _aten.scatter.src, _aten.scatter.value, _aten.scatter_add.default),
    *(_aten.scatter_.src, _aten.scatter_.value, _aten.scatter_add_.default),
):
    register_rule(_op, _gather(_op))


def _index_copy(call: Callable[..., Any]) -> Any:
    """One entry of the source a position: a scatter, whose indices may be each member's own. torch has no batching."""

    def rule(
        info: Any,
        in_dims: Any,
        x: torch.Tensor,
        dim: int,
        index: torch.Tensor,
        source: torch.Tensor,
        *how: Any,
        **kw: Any,
    ) -> Any:
        x, source = expanded(x, in_dims[0], info.batch_size), expanded(source, in_dims[3], info.batch_size)
        index = index.reshape(1 if in_dims[2] is None else info.batch_size, -1)
        is_number = x.ndim == 1
        if is_number:
            x, source = x.unsqueeze(1), source.reshape(info.batch_size, -1)
        dim = shifted(dim, x.ndim - 1)
        if x.ndim != source.ndim or index.shape[1] != source.shape[dim] or (is_number and index.shape[1] != 1):
            return Decline("as many indices as entries are expected")
        shape = [1] * x.ndim
        shape[0], shape[dim] = index.shape
        out = call(x, dim, index.view(shape).expand(source.shape), source, *how, **kw)
        return (out.squeeze(1) if is_number else out), 0

    return rule


register_rule(_aten.index_copy.default, _index_copy(_aten.scatter.src))
register_rule(_aten.index_copy_.default, _index_copy(_aten.scatter_.src))
register_rule(_aten.index_reduce.default, _index_copy(_aten.scatter_reduce.two))


@register_rule(_aten.unfold_backward.default)
def unfold_backward(info: Any, in_dims: Any, grad: torch.Tensor, sizes: Any, dim: int, size: int, step: int) -> Any:
    """One dimension further. torch has no batching."""
    if not sizes:
        return grad.sum(1), 0
    return _aten.unfold_backward.default(grad, [info.batch_size, *sizes], shifted(dim, len(sizes)), size, step), 0


_MANY_ROWS = 4000
"""Rows from which on the kernels along a first dimension are worth a call a member."""


def _in_turn(x: torch.Tensor, dim: int, index: torch.Tensor) -> bool:
    """Whether members read or add their rows one after the other: along a first dimension torch's kernels on the CPU
    are faster than along another. 10 members, 60,000 rows of 64 each: 6.1 ms to read and 15 to add, and 8.1 and 26.
    """
    return dim == 1 and index.shape[-1:].numel() >= _MANY_ROWS and x.device.type == "cpu" and not tracing()


@register_rule(_aten.index_select.default)
def index_select(info: Any, in_dims: Any, x: torch.Tensor, dim: int, index: torch.Tensor) -> Any:
    """torch's batching does the same, at 12 us more, where few rows are read."""
    if in_dims[2] == 0 or x.ndim == 1:
        return Decline("the index differs between members, or there is one number a member")
    dim = shifted(dim, x.ndim - 1)
    if x.ndim < 3 or not _in_turn(x, dim, index):
        return x.index_select(dim, index), 0
    out = x.new_empty((x.shape[0], index.numel(), *x.shape[2:]))
    for own, found in zip(x.unbind(0), out.unbind(0), strict=True):
        torch.index_select(own, 0, index, out=found)
    return out, 0


def _index_add(make: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`make` gives what is written from what comes in: a copy, or itself."""

    def rule(info: Any, in_dims: Any, x: Any, dim: int, index: Any, source: Any, *, alpha: Any = 1) -> Any:
        x, source = expanded(x, in_dims[0], info.batch_size), expanded(source, in_dims[3], info.batch_size)
        if x.ndim == 1 or x.ndim != source.ndim:
            return Decline("one number a member")
        out, dim = make(x), shifted(dim, x.ndim - 1)
        if in_dims[2] is None and not _in_turn(x, dim, index):
            return out.index_add_(dim, index, source, alpha=alpha), 0
        for k, (own, rows) in enumerate(zip(out.unbind(0), source.unbind(0), strict=True)):
            own.index_add_(dim - 1, index if in_dims[2] is None else index[k], rows, alpha=alpha)
        return out, 0

    return rule


register_rule(_aten.index_add.default, _index_add(torch.clone))
register_rule(_aten.index_add_.default, _index_add(lambda x: x))


@register_rule(_aten.select_backward.default)
def select_backward(info: Any, in_dims: Any, grad: torch.Tensor, size: Any, dim: int, index: int) -> Any:
    """torch's batching does the same, at 14 us more; a loss on an LSTM's last step ends in it."""
    whole = [info.batch_size, *size]
    return _aten.select_backward.default(grad, whole, shifted(dim, len(size)), index), 0


@register_rule(_aten.slice_backward.default)
def slice_backward(info: Any, in_dims: Any, grad: torch.Tensor, size: Any, dim: int, *bounds: Any) -> Any:
    """As `select_backward`."""
    whole = [info.batch_size, *size]
    return _aten.slice_backward.default(grad, whole, shifted(dim, len(size)), *bounds), 0
