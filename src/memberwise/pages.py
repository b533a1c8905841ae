"""Memory of stacked state in huge pages, where the system has any: it is read and written whole, step after step.

Linux gives pages of 2 MB to memory that asks for them, and of 4 kB to all else, each with an address to look up. A
prediction of a thousand MLPs, which reads their half gigabyte of weights once, takes 0.95 of the time in huge ones, and
the step of a thousand small MLPs 0.96.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
from collections.abc import Callable

import torch

_PAGE = 1 << 21
_LEAST = 2 * _PAGE
"""Bytes of a tensor in which there is a whole page, wherever it begins."""


def in_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, whose memory nobody has written to yet. What the system refuses stays as it is.

    >>> in_huge_pages(torch.empty(3)).shape
    torch.Size([3])
    """
    advise = _advise()
    if advise is not None and type(tensor) is torch.Tensor and tensor.device.type == "cpu" and tensor.nbytes >= _LEAST:
        with contextlib.suppress(RuntimeError):  # a wrapper without memory of its own
            begin = -(-tensor.data_ptr() // _PAGE) * _PAGE
            advise(begin, (tensor.data_ptr() + tensor.nbytes - begin) // _PAGE * _PAGE)
    return tensor


@functools.cache
def _advise() -> Callable[[int, int], object] | None:
    """Asks for huge pages, where there are any."""
    try:
        advise, huge = ctypes.CDLL(None).madvise, mmap.MADV_HUGEPAGE
    except (AttributeError, OSError, TypeError):  # another system
        return None
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return lambda begin, size: advise(begin, size, huge)
