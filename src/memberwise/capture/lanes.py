"""Chunks on separate cores: a lane a core, in which kernels run on one thread.

Kernels that share their work among threads wait for each other at the end of each, and share caches; chunks of members
need not wait at all. Compiled programs in C++ release Python's lock while they run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from memberwise._torch.openmp import in_team

_SUBNORMAL = 5e-324


def in_lanes(lanes: int, work: Callable[[int], object], count: int) -> None:
    """Call `work` with each of `range(count)`, so many at a time, and wait for all; then raise the first error.

    Each lane computes as the calling thread does: in inference mode or not, subnormal numbers flushed or not.
    """
    inference, flushes = torch.is_inference_mode_enabled(), not _SUBNORMAL * 1.0
    errors: list[BaseException] = []

    def alone(k: int) -> None:
        try:
            torch.set_flush_denormal(flushes)
            with torch.inference_mode(inference), torch.no_grad():
                work(k)
        except BaseException as error:  # there is no caller above it
            errors.append(error)

    in_team(alone, count, lanes)
    if errors:
        raise errors[0]
