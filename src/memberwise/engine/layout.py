"""The two changes a member tensor may go through: to per-member memory, and to the memory order of a lone run.

Both replace memory, so every tensor on that memory changes together; `_family` lists them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.graph import increment_version

from memberwise.engine.tensor import MemberTensor
from memberwise.errors import EngineError, fail


def relatives(member: MemberTensor) -> list[MemberTensor]:
    """All living member tensors on the memory of `member`."""
    if member._family is None:
        return [member]
    found = [ref() for ref in member._family]
    return [entry for entry in found if entry is not None]


def extent(size: Any, stride: Any) -> int:
    """Elements from the first to the last of such a view."""
    return 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if 0 not in size else 0


def has_gaps(member: MemberTensor) -> bool:
    """Whether there are elements between a member's first and last that are not its own."""
    return extent(member.shape, member.stride()) > member.numel()


def stay_inside(member: MemberTensor, size: Any, stride: Any, start: int) -> None:
    """Refuse a view that leaves its member's memory; `start` is where member 0's begins in the stacked storage."""
    inner = member._inner
    apart = member._batched and len(inner) > 1 and inner.stride(0) >= extent(inner.shape[1:], inner.stride()[1:])
    start -= (inner if member._root is None else member._root).storage_offset()
    if apart and (start < 0 or start + extent(size, stride) > inner.stride(0)):
        what = f"as_strided({[*size]}, {[*stride]}) from element {start} leaves a member of {inner.stride(0)} elements"
        fail(EngineError, "MW220", what, do="Alone it is an error too")


def _bytes(tensor: torch.Tensor) -> int:
    reach = extent(tensor.shape, tensor.stride())
    return (tensor.storage_offset() + reach) * tensor.element_size() if reach else 0


def promote(member: MemberTensor) -> None:
    """Give each member its own copy of a fresh tensor's memory, before a member's value is written into it.

    The whole storage is copied once a member, and each alias keeps its size, strides and offset in the copy.
    """
    size = member._region.batch_size
    inner = member._inner
    aliases = relatives(member)
    length = -(-max(_bytes(alias._inner) for alias in aliases) // inner.element_size())
    memory = torch.as_strided(inner, (length,), (1,), 0).expand(size, length).clone()
    for alias in aliases:
        seen = alias._inner
        source = memory if seen.dtype == memory.dtype else memory.view(seen.dtype)
        alias._inner = source.as_strided((size, *seen.shape), (source.stride(0), *seen.stride()), seen.storage_offset())
        alias._batched = True


def count_write(member: MemberTensor) -> None:
    """A write through `member` is one to the memory it views."""
    for memory in (member._inner, member._root):
        if memory is not None and not memory.is_inference():
            increment_version(memory)


def relaid(inner: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """A stacked tensor whose member slices have the given strides; a copy, where they have others."""
    if inner.stride()[1:] == strides or inner.numel() == 0:
        return inner
    memory = inner.new_empty_strided(inner.shape, (extent(inner.shape[1:], strides), *strides))
    return memory.copy_(inner)


def settle(member: MemberTensor) -> torch.Tensor:
    """Bring the inner tensor into the declared (contiguous) order, before a view of it is taken; its aliases, too."""
    if member._differs:
        memory = member._inner.contiguous()
        for alias in relatives(member):
            alias._inner = memory if alias is member else memory.detach()
            alias._root = None if alias._root is None else memory
            alias._differs = False
    return member._inner
