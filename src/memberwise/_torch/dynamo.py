"""Code that `torch.compile` leaves alone: it breaks the graph there, and runs it as it is.

`torch.compiler.disable` does this, but imports the compiler (a second and more) where it decorates, and costs 3 us a
call. Missing is a public way to mark a function at no cost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch._C._dynamo import eval_frame

F = TypeVar("F", bound=Callable[..., Any])

_SKIP = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.SKIP)


def uncompiled(function: F) -> F:
    """Mark `function`: it is never compiled, nor is anything that it calls."""
    eval_frame.set_code_exec_strategy(function.__code__, _SKIP)  # where it is called from code that runs as it is
    function._torchdynamo_disable = True  # type: ignore[attr-defined] # where it is called from compiled code
    function._torchdynamo_disable_msg = "it runs all members by an engine of its own"  # type: ignore[attr-defined] # so
    return function
