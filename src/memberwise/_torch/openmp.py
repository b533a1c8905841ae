"""Python functions on the threads that torch's kernels share their work among.

Missing is a public way to get at those threads: others would compete with them, for between two kernels they spin, a
core each. A kernel that is called on one of them is told that it has one thread.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

from memberwise._torch.building import built

_SOURCE = """
#include <omp.h>
namespace at { int get_num_threads(); }

extern "C" void memberwise_in_team(void (*work)(int), int count, int threads) {
#pragma omp parallel num_threads(threads)
    {
        at::get_num_threads();   // torch sets a thread's number when it is first asked for; it has been asked now
        omp_set_num_threads(1);  // ends with this region
#pragma omp for schedule(static, 1)
        for (int k = 0; k < count; k++) work(k);
    }
}
"""

_Work = ctypes.CFUNCTYPE(None, ctypes.c_int)


def in_team(work: Callable[[int], object], count: int, threads: int) -> None:
    """Call `work`, which must not raise, with each of `range(count)`; thread t takes t, t + threads, and so on.

    Raises what Inductor does where it cannot build the few lines of C++ that it takes.
    """
    _library().memberwise_in_team(_Work(work), count, threads)


@functools.cache
def _library() -> Any:
    return built(_SOURCE)
