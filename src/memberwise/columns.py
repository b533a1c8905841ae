"""Where one stacked tensor is gathered, member after member, without holding the members.

The number of members of an iterator is known only after the last, and a stack is one block of memory. Growing
that block the usual way (a larger one, and a copy) needs twice the memory for a while; `Growing` takes memory
from the operating system, which can lengthen a block where it lies, or move its pages without copying.
"""

from __future__ import annotations

import mmap
from typing import Any

import torch

from memberwise.pages import in_huge_pages

Plain = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


class Listed:
    """Keeps the members' tensors, then stacks them: for members that live anyway, and for unusual tensors."""

    def __init__(self, first: torch.Tensor, *, copies: bool) -> None:
        self._strides = _member_strides(first) if _is_plain(first) else None
        self._device, self._dtype = first.device, first.dtype
        self._copies = copies
        self._tensors: list[torch.Tensor] = []

    def append(self, tensor: torch.Tensor) -> None:
        """Take the next member's tensor."""
        tensor = tensor.detach().to(self._device, self._dtype)
        self._tensors.append(tensor.clone() if self._copies else tensor)

    def finish(self) -> torch.Tensor:
        """The stacked tensor, `(M, *s)`."""
        if self._strides is None:
            return torch.stack(self._tensors)
        out = _empty(len(self._tensors), self._tensors[0], self._strides)
        return torch.stack(self._tensors, out=out)


class Fixed:
    """A block for a known number of members, filled as they come."""

    def __init__(self, first: torch.Tensor, count: int) -> None:
        self._out = _empty(count, first, _member_strides(first))
        self._filled = 0

    def append(self, tensor: torch.Tensor) -> None:
        """Take the next member's tensor."""
        self._out[self._filled].copy_(tensor.detach())
        self._filled += 1

    def finish(self) -> torch.Tensor:
        """The stacked tensor, `(M, *s)`."""
        return self._out


class Growing:
    """A block in host memory that grows with every member; it moves to the members' device at the end.

    Members of another device pass through the host, so that there too nothing but the stack is held.
    """

    def __init__(self, first: torch.Tensor) -> None:
        self._first = torch.empty_like(first, device="meta")
        self._device = first.device
        self._bytes = first.numel() * first.element_size()
        self._memory = mmap.mmap(-1, self._bytes, **_PRIVATE)
        self._count = 0

    def append(self, tensor: torch.Tensor) -> None:
        """Take the next member's tensor."""
        needed = (self._count + 1) * self._bytes
        if needed > len(self._memory):
            self._memory = _longer(self._memory, needed + needed // 4)  # untouched pages take no memory
        self._view(self._count, 1)[0].copy_(tensor.detach())
        self._count += 1

    def finish(self) -> torch.Tensor:
        """The stacked tensor, `(M, *s)`."""
        return self._view(0, self._count).to(self._device)

    def _view(self, start: int, count: int) -> torch.Tensor:
        first, numel = self._first, self._first.numel()
        flat = torch.frombuffer(self._memory, dtype=first.dtype, count=count * numel, offset=start * self._bytes)
        return flat.as_strided((count, *first.shape), (numel, *first.stride())).detach()


Column = Listed | Fixed | Growing


def column(first: torch.Tensor, *, held: bool = False, count: int | None = None) -> Column:
    """An empty column for tensors like `first`.

    Args:
        first: a tensor like the column's: members' tensors are brought to its device and dtype.
        held: whether the members live on anyway.
        count: how many there will be, if that is known.
    """
    if held or not _is_plain(first):
        return Listed(first, copies=not held)
    if count is not None:
        return Fixed(first, count)
    if first.is_meta or not first.numel():
        return Listed(first, copies=True)
    return Growing(first)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether the tensor is a block of elements, and its bytes are all there is to it."""
    return type(tensor) in Plain and tensor.layout is torch.strided and not tensor.is_quantized


def _member_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides of a dense copy in the tensor's own memory format: a lone kernel's result depends on it."""
    return torch.empty_like(tensor, device="meta").stride()


def _empty(count: int, first: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    sizes = (count, *first.shape)
    return in_huge_pages(torch.empty_strided(sizes, (first.numel(), *strides), dtype=first.dtype, device=first.device))


_PRIVATE: dict[str, Any] = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


def _longer(memory: mmap.mmap, size: int) -> mmap.mmap:
    try:
        memory.resize(size)
    except SystemError:  # no mremap on this system: a larger block, and a copy
        grown = mmap.mmap(-1, size, **_PRIVATE)
        with memoryview(memory) as view:
            grown[: len(memory)] = view
        return grown
    return memory
