"""The moment before an operator of control flow compiles the functions that it is given.

`torch.cond`, `while_loop`, `scan`, `map` and `flex_attention`, called outside of `torch.compile`, first compile what
they are given. They do not ask `__torch_function__`, and under a dispatch mode the compiler passes over the call, but
not over the code below it, fails there, and remembers so for all later calls. Missing is a public way to hear of it
before. All of them set the compiler up by one function, `_set_compilation_env`. It is replaced by one that asks first;
that stays, and where nobody answers it does nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch._higher_order_ops import utils as _utils

_original: Callable[[], Any] = _utils._set_compilation_env
_around: Callable[[], AbstractContextManager[None]] = nullcontext


@contextmanager
def _set_compilation_env() -> Iterator[None]:
    with _around(), _original():
        yield


_utils._set_compilation_env = _set_compilation_env


def around_compiling(around: Callable[[], AbstractContextManager[None]]) -> None:
    """Let operators of control flow compile and run inside `around()`; what it raises reaches who called them."""
    global _around
    _around = around
