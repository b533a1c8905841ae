"""Views and rearrangements: the same move on the dimensions after the member axis."""

from __future__ import annotations

from typing import Any

import torch

from memberwise.engine.layout import extent
from memberwise.engine.signals import Decline
from memberwise.rules.axis import expanded, shift_all, shifted
from memberwise.rules.folding import is_channels_last
from memberwise.rules.registry import register_rule

_aten = torch.ops.aten


@register_rule(_aten.view.default)
def view(info: Any, in_dims: Any, x: torch.Tensor, size: Any) -> Any:
    """torch's batching infers -1 over the whole; here over one member, which is the same."""
    return x.view(x.shape[0], *_inferred(x, size)), 0


@register_rule(_aten._unsafe_view.default)
def unsafe_view(info: Any, in_dims: Any, x: torch.Tensor, size: Any) -> Any:
    """As `view`; autograd made sure that nobody sees the alias."""
    return x.reshape(x.shape[0], *_inferred(x, size)), 0


def _inferred(x: torch.Tensor, size: Any) -> list[int]:
    """`size` with -1 replaced, from one member's element count (M or a dimension may be 0)."""
    size = list(size)
    if -1 in size:
        own = 1
        for count in x.shape[1:]:
            own *= count
        known = 1
        for count in size:
            known *= count if count != -1 else 1
        size[size.index(-1)] = own // known if known else 0
    return size


@register_rule(_aten.expand.default)
def expand(info: Any, in_dims: Any, x: torch.Tensor, size: Any, *, implicit: bool = False) -> Any:
    """New dimensions come after the member axis."""
    missing = len(size) - (x.ndim - 1)
    if missing:
        x = x.view(x.shape[0], *(1,) * missing, *x.shape[1:]) if x.is_contiguous() else _unsqueezed(x, missing)
    return x.expand(x.shape[0], *size), 0


def _unsqueezed(x: torch.Tensor, count: int) -> torch.Tensor:
    for _ in range(count):
        x = x.unsqueeze(1)
    return x


@register_rule(_aten.t.default)
def t(info: Any, in_dims: Any, x: torch.Tensor) -> Any:
    """A vector is its own transpose."""
    if x.ndim > 3:
        return Decline("it takes a matrix", by_member=True)
    return (x.transpose(1, 2) if x.ndim == 3 else x.view_as(x)), 0


@register_rule(_aten.transpose.int)
def transpose(info: Any, in_dims: Any, x: torch.Tensor, dim0: int, dim1: int) -> Any:
    """One dimension further."""
    ndim = x.ndim - 1
    dim0, dim1 = shifted(dim0, ndim), shifted(dim1, ndim)
    return (x.transpose(dim0, dim1) if ndim else x.view_as(x)), 0


@register_rule(_aten.permute.default)
def permute(info: Any, in_dims: Any, x: torch.Tensor, dims: Any) -> Any:
    """One dimension further."""
    return x.permute(0, *shift_all(dims, x.ndim - 1)), 0


@register_rule(_aten.select.int)
def select(info: Any, in_dims: Any, x: torch.Tensor, dim: int, index: int) -> Any:
    """One dimension further."""
    return x.select(shifted(dim, x.ndim - 1), index), 0


@register_rule(_aten.slice.Tensor)
def slice_(info: Any, in_dims: Any, x: torch.Tensor, dim: int = 0, *bounds: Any, **named: Any) -> Any:
    """One dimension further."""
    return _aten.slice.Tensor(x, shifted(dim, x.ndim - 1), *bounds, **named), 0


@register_rule(_aten.unsqueeze.default)
def unsqueeze(info: Any, in_dims: Any, x: torch.Tensor, dim: int) -> Any:
    """One dimension further; the end counts one more than there are."""
    return x.unsqueeze(shifted(dim, x.ndim)), 0


@register_rule(_aten.squeeze.dim)
def squeeze(info: Any, in_dims: Any, x: torch.Tensor, dim: int) -> Any:
    """One dimension further."""
    dim = shifted(dim, x.ndim - 1)
    return (x.squeeze(dim) if x.ndim > 1 else x.view_as(x)), 0


@register_rule(_aten.squeeze.default)
@register_rule(_aten.squeeze.dims)
def squeeze_several(info: Any, in_dims: Any, x: torch.Tensor, dims: Any = None) -> Any:
    """One dimension further; the member axis stays, of whatever size. Without `dims`, all the others."""
    ndim = x.ndim - 1
    dims = range(1, ndim + 1) if dims is None else shift_all(dims, ndim)
    return (x.squeeze(tuple(dims)) if ndim else x.view_as(x)), 0


@register_rule(_aten.detach.default)
def detach(info: Any, in_dims: Any, x: torch.Tensor) -> Any:
    """The same memory."""
    return x.detach(), 0


@register_rule(_aten.alias.default)
def alias(info: Any, in_dims: Any, x: torch.Tensor) -> Any:
    """The same memory."""
    return x.detach(), 0


@register_rule(_aten.split.Tensor)
def split(info: Any, in_dims: Any, x: torch.Tensor, size: int, dim: int = 0) -> Any:
    """One dimension further."""
    parts = list(x.split(size, shifted(dim, x.ndim - 1)))
    return parts, [0] * len(parts)


@register_rule(_aten.split_with_sizes.default)
def split_with_sizes(info: Any, in_dims: Any, x: torch.Tensor, sizes: Any, dim: int = 0) -> Any:
    """One dimension further."""
    parts = list(x.split_with_sizes(sizes, shifted(dim, x.ndim - 1)))
    return parts, [0] * len(parts)


@register_rule(_aten.unbind.int)
def unbind(info: Any, in_dims: Any, x: torch.Tensor, dim: int = 0) -> Any:
    """One dimension further."""
    parts = list(x.unbind(shifted(dim, x.ndim - 1)))
    return parts, [0] * len(parts)


_IN_ORDER = Decline("memory in channels_last order, in which the result lies alone")


def _may_be_channels_last(x: torch.Tensor) -> bool:
    """Whether members' parts could pass for images with their channels innermost; torch asks this first of all.

    Heads that were transposed (`rotate_half` of Llama and its kin) cannot. What has one channel can, and be contiguous.
    """
    return x.ndim in (5, 6) and x.stride(-1) >= x.stride(2) * x.shape[2]


@register_rule(_aten.cat.default)
def cat(info: Any, in_dims: Any, tensors: Any, dim: int = 0) -> Any:
    """One dimension further; shared tensors are expanded. torch's old empty (0,) tensors are left out."""
    parts = [expanded(t, at, info.batch_size) for t, at in zip(tensors, in_dims[0], strict=True)]
    if any(map(is_channels_last, parts)):
        return _IN_ORDER
    parts = [part for part in parts if part.ndim != 2 or part.shape[1] != 0] or parts[:1]
    if any(map(_may_be_channels_last, parts)):
        return Decline("images may lie channels last, and so does their lone result", by_member=True)
    return torch.cat(parts, shifted(dim, parts[0].ndim - 1)).contiguous(), 0


@register_rule(_aten._chunk_cat.default)
def chunk_cat(info: Any, in_dims: Any, tensors: Any, dim: int, count: int) -> Any:
    """One dimension further."""
    parts = [expanded(t, at, info.batch_size) for t, at in zip(tensors, in_dims[0], strict=True)]
    return _aten._chunk_cat.default(parts, dim + 1 if dim >= 0 else dim, count), 0


@register_rule(_aten.stack.default)
def stack(info: Any, in_dims: Any, tensors: Any, dim: int = 0) -> Any:
    """One dimension further; shared tensors are expanded."""
    parts = [expanded(t, at, info.batch_size) for t, at in zip(tensors, in_dims[0], strict=True)]
    if any(map(is_channels_last, parts)):
        return _IN_ORDER
    return torch.stack(parts, shifted(dim, parts[0].ndim)), 0


@register_rule(_aten.roll.default)
def roll(info: Any, in_dims: Any, x: torch.Tensor, shifts: Any, dims: Any = ()) -> Any:
    """torch's batching rolls the members themselves where each is one number."""
    if x.ndim == 1:
        return x.clone(), 0
    if len(dims) == 0:
        return x.flatten(1).roll(shifts, 1).view(x.shape), 0
    return x.roll(shifts, shift_all(dims, x.ndim - 1)), 0


@register_rule(_aten.flip.default)
def flip(info: Any, in_dims: Any, x: torch.Tensor, dims: Any) -> Any:
    """torch's batching takes a member without dimensions for one that has them."""
    return x.clone() if x.ndim == 1 else x.flip(shift_all(dims, x.ndim - 1)), 0


@register_rule(_aten.as_strided.default)
def as_strided(info: Any, in_dims: Any, x: torch.Tensor, size: Any, stride: Any, offset: Any = None) -> Any:
    """torch's batching takes the member axis anywhere, and copies; here each member has its own stretch of
    memory, `x.stride(0)` long, laid out as the lone tensor is (`engine.layout.settle`)."""
    start = x.storage_offset() if offset is None else offset
    return x.as_strided((x.shape[0], *size), (x.stride(0), *stride), start), 0


@register_rule(_aten.new_empty_strided.default)
def new_empty_strided(info: Any, in_dims: Any, x: torch.Tensor, size: Any, stride: Any, **kwargs: Any) -> Any:
    """Each member gets the memory that these strides ask for; torch's batching refuses some layouts."""
    length = extent(size, stride)
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    flat = x.new_empty((info.batch_size, length), **kwargs)
    return flat.as_strided((info.batch_size, *size), (length, *stride)), 0


@register_rule(_aten.as_strided_scatter.default)
def as_strided_scatter(
    info: Any, in_dims: Any, x: torch.Tensor, src: torch.Tensor, size: Any, stride: Any, offset: Any = None
) -> Any:
    """torch's batching strides over the members' memory as if it were one member's: silently wrong."""
    begin = 0 if offset is None else offset - x.storage_offset()
    x = expanded(x, in_dims[0], info.batch_size)
    lead = max(-begin, 0)
    room = lead + max(extent(x.shape[1:], x.stride()[1:]), begin + extent(size, stride))
    memory = x.new_empty((info.batch_size, room))
    out = memory.as_strided(x.shape, (room, *x.stride()[1:]), lead).copy_(x)
    memory.as_strided((x.shape[0], *size), (room, *stride), lead + begin).copy_(src)
    return out, 0


def _of_a_matrix(call: Any) -> Any:
    def rule(info: Any, in_dims: Any, x: torch.Tensor, diagonal: int = 0) -> Any:
        """torch's batching takes the members of vectors for the rows of one matrix."""
        return (call(x, diagonal), 0) if x.ndim > 2 else Decline("it takes a matrix", by_member=True)

    return rule


for _triangle in (_aten.tril.default, _aten.triu.default):
    register_rule(_triangle, _of_a_matrix(_triangle))


def _new(name: str) -> Any:
    def rule(info: Any, in_dims: Any, x: torch.Tensor, size: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs = {key: value for key, value in kwargs.items() if value is not None}
        return getattr(x, name)((info.batch_size, *size), *args, **kwargs), 0

    return rule


register_rule(_aten.new_zeros.default, _new("new_zeros"))
register_rule(_aten.new_ones.default, _new("new_ones"))
register_rule(_aten.new_empty.default, _new("new_empty"))
register_rule(_aten.new_full.default, _new("new_full"))


COPIES = {
    _aten.as_strided_copy.default: as_strided,
    _aten.permute_copy.default: permute,
    _aten.squeeze_copy.default: squeeze_several,
    _aten.squeeze_copy.dim: squeeze,
    _aten.squeeze_copy.dims: squeeze_several,
    _aten.t_copy.default: t,
    _aten.transpose_copy.int: transpose,
    _aten.unsqueeze_copy.default: unsqueeze,
}
"""Views into memory of their own, in order: torch's batching has none of these, or strides over other members."""


def _copied(view_rule: Any) -> Any:
    def rule(info: Any, in_dims: Any, *args: Any) -> Any:
        answer = view_rule(info, in_dims, *args)
        if isinstance(answer, Decline):
            return answer
        return answer[0].clone(memory_format=torch.contiguous_format), 0

    return rule


for _copy, _view in COPIES.items():
    register_rule(_copy, _copied(_view))
