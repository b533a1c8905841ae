"""torch's functions that are written in Python of other ones, run such that those are overridden one by one.

Such a function asks for overrides of itself first; what then runs it, runs it without any further ones, and torch has
no public way to go on inside. That takes a function of the same code which asks nothing: its names are those of torch's
module, but for the question.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch.nn import functional as F


def _no(*_: Any) -> bool:
    return False


_ASKS = {"has_torch_function": _no, "has_torch_function_unary": _no, "has_torch_function_variadic": _no}


class _Names(dict[str, Any]):
    """The names of a module as they are when they are asked for, so that one that someone replaces is found."""

    def __init__(self, module: Any) -> None:
        super().__init__(_ASKS)
        self._module = module.__dict__

    def __missing__(self, name: str) -> Any:
        return self._module[name]


def inside(function: Any) -> Callable[..., Any]:
    """`function`, one of torch.nn.functional, with overrides of what it calls and none of itself."""
    copy = FunctionType(function.__code__, _Names(F), function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
