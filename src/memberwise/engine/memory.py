"""Freed memory stays with the process: a step's temporaries are M times a lone step's, and come back each step.

glibc hands a block above a threshold (32 MB at most, by its own rule) back to the system as soon as it is freed, and
what is free at the top of the heap above twice as much; the next step then pays for fresh pages, each filled with
zeros. A lone model's results mostly lie below, a stack's above: that was half of an eager step of ten graph networks,
and a quarter of one of a hundred MLPs. torch's allocator for GPUs keeps what is freed likewise.

So both thresholds are raised, for the process. Free memory that it keeps at the top is bounded, by 2 GiB and by a
quarter of the machine's; blocks above 1 GiB go back at once. Where glibc refuses (before 2.35), one block of 32 MB is
made and freed, untouched: its own rule then raises the thresholds to that. Thresholds that were set from outside, and
other allocators, are left as they are.
"""

from __future__ import annotations

import ctypes
import os

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
_LARGEST_BLOCK = 1 << 30
_MOST_AT_THE_TOP = (1 << 31) - 1  # mallopt takes an int
_LARGEST_BY_ITSELF = (32 << 20) - (64 << 10)  # with its header it must not exceed 32 MB

_done = False


def keep_freed() -> None:
    """Let the process keep what a step frees; the first call does it."""
    global _done
    if _done:
        return
    _done = True
    if not _set_from_outside() and not _raised():
        _ = bytes(_LARGEST_BY_ITSELF)  # made and freed


def _set_from_outside() -> bool:
    names = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_")
    return any(name in os.environ for name in names) or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "")


def _raised() -> bool:
    """Whether the C library has `mallopt` and takes both thresholds."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, TypeError, ValueError):  # no glibc, or no Unix
        return False
    top = min(_MOST_AT_THE_TOP, machine // 4)
    return bool(mallopt(_MMAP_THRESHOLD, min(_LARGEST_BLOCK, top)) and mallopt(_TRIM_THRESHOLD, top))
