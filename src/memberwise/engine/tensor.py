"""MemberTensor: shows the shape of one member's tensor, holds the tensors of all M in one.

Two facts about a member tensor may change during its life, both through `memberwise.engine.layout`:
whether its inner tensor has a member axis (`_batched`), and in what memory order it lies (`_differs`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from memberwise._torch.dispatch import DisableTorchFunctionSubclass, make_wrapper
from memberwise.engine.signals import part_ways

if TYPE_CHECKING:
    from memberwise.engine.ambient import Region


class MemberTensor(torch.Tensor):
    """A tensor that stands for M; `_inner` is `(M, *shape)`, or `shape` while all members hold the same.

    Attributes:
        _inner: the stacked tensor.
        _region: the call it was made in, which knows M, the member streams and the nesting level.
        _batched: whether `_inner` has the member axis.
        _differs: whether one member's slice of `_inner` lies in another order than declared (contiguous).
        _outside: whether its memory was there before the call: writes are undone on retreat.
        _family: all member tensors on the same memory, while that memory may have to be replaced.
        _root: the inner tensor of what this is a view of.
        _viewed: whether a view was taken of it.
        _lowered: whether autograd follows `_inner` and not this tensor, see `memberwise.engine.lowering`.
        _bypassed: whether a layer took it while it was lowered.
    """

    of_memberwise = True
    stands_for_members = True
    _inner: torch.Tensor
    _region: Region
    _batched = True
    _differs = False
    _outside = False
    _family: list[Any] | None = None
    _viewed = False
    _root: torch.Tensor | None = None
    _lowered = False
    _bypassed = False

    # Set by `memberwise.engine.dispatch`, which imports this module (as `engine.function` sets __torch_function__).
    _on_dispatch: Callable[..., Any]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return MemberTensor._on_dispatch(func, args, kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        held = "" if self._batched else ", equal in all members"
        return f"MemberTensor(shape={tuple(self.shape)}, dtype={self.dtype}, M={self._region.batch_size}{held})"


def wrap(inner: torch.Tensor, region: Region, offset: int | None = None) -> MemberTensor:
    """The member tensor of a stacked `(M, *s)` tensor; declares the layout of the first member's slice."""
    if inner.layout is not torch.strided:
        _refuse_layout(inner, region)
    plain = offset is None and inner.is_contiguous()
    strides = None if plain else inner.stride()[1:]  # to spell them out costs as much as all the rest
    out = make_wrapper(
        region.tensor_class, inner.shape[1:], strides, offset, None, inner.dtype, torch.strided, inner.device
    )
    out._inner = inner
    out._region = region
    return out


def wrap_contiguous(inner: torch.Tensor, region: Region) -> MemberTensor:
    """As `wrap`, where the lone result is contiguous and one member's slice of `inner` may not be."""
    if inner.layout is not torch.strided:
        return wrap(inner, region)
    out = make_wrapper(region.tensor_class, inner.shape[1:], None, None, None, inner.dtype, torch.strided, inner.device)
    out._inner = inner
    out._region = region
    if not inner.is_contiguous():
        out._differs = inner.numel() > 0 and not inner[0].is_contiguous()
    return out


def _refuse_layout(inner: torch.Tensor, region: Region) -> None:
    part_ways(region, f"a result has layout {inner.layout}, which no member tensor can show")


def wrap_view(inner: torch.Tensor, source: MemberTensor) -> MemberTensor:
    """The member tensor of a view of `source._inner`: same memory, same fate."""
    source._viewed = True
    batched = source._batched
    with DisableTorchFunctionSubclass():  # in a backward pass it is no operation of the member's either
        offset = source.storage_offset() + inner.storage_offset() - source._inner.storage_offset()
    out = make_wrapper(
        type(source),
        inner.shape[1:] if batched else inner.shape,
        None if source._differs else inner.stride()[1:] if batched else inner.stride(),
        offset if offset > 0 else None,
        None,
        inner.dtype,
        torch.strided,
        inner.device,
    )
    out._inner = inner
    out._region = source._region
    out._root = source._inner if source._root is None else source._root
    if not batched:
        out._batched = False
    if source._outside:
        out._outside = True
    if source._differs:
        out._differs = True
        if source._family is None:
            _join(source, [])
    if source._family is not None:
        _join(out, source._family)
    return out


def wrap_unbatched(inner: torch.Tensor, region: Region, *, outside: bool = False) -> MemberTensor:
    """The member tensor of a value that is equal in all members, as a fresh tensor is.

    What is not strided stays as it is: a wrapper of a sparse tensor aborts the process inside autograd.
    """
    if inner.layout is not torch.strided or inner.is_nested:
        return inner  # type: ignore[return-value] # a plain tensor, which operations take as shared
    out = make_wrapper(
        region.tensor_class,
        inner.shape,
        inner.stride(),
        (inner.storage_offset() or None) if outside else None,
        None,
        inner.dtype,
        torch.strided,
        inner.device,
    )
    out._inner = inner
    out._region = region
    out._batched = False
    if outside:
        out._outside = True
    else:
        _join(out, [])
    return out


def _join(member: MemberTensor, family: list[Any]) -> None:
    family.append(weakref.ref(member))
    member._family = family


def stacked(value: torch.Tensor, region: Region) -> torch.Tensor:
    """`(M, *s)` of any tensor: a member tensor's inner one, or a shared value expanded."""
    if isinstance(value, MemberTensor):
        if value._batched:
            return value._inner
        value = value._inner
    return value.expand(region.batch_size, *value.shape)
