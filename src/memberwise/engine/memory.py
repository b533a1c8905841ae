"""Freed memory stays with the process: a step's temporaries are M times a lone step's, and come back each step.

glibc hands a block above a threshold back to the system as soon as it is freed, and what is free at the top of the
heap above twice as much; the next step then pays for fresh pages (a transformer of d 64, M = 8, on the CPU: 5000 page
faults and 12% of a step, where a lone model's step has none). The threshold rises by itself to the largest block that
was freed so far, up to 32 MB. So one block of that size is freed, once, and never touched: it costs a microsecond, and
lets the process hold up to 64 MB that it would have given back. Other allocators, and a threshold that was set by
`MALLOC_MMAP_THRESHOLD_` or `MALLOC_TRIM_THRESHOLD_`, are left as they are.
"""

from __future__ import annotations

_LARGEST = (32 << 20) - (64 << 10)  # with its header it must not exceed 32 MB

_done = False


def keep_freed() -> None:
    """Let the process keep what a step frees; the first call does it."""
    global _done
    if not _done:
        _done = True
        _ = bytes(_LARGEST)  # made and freed
