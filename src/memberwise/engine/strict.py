"""Strict mode: an error of a rule that no member raises alone is raised, where the call would run by members instead.

A call that raises is undone and tried member by member, so that what it raises is what a lone run raises. That is right
for users, and hides a broken rule from who writes one: results are right, and slow.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from memberwise._torch.functorch import restored_keys
from memberwise.engine.slices import member_slice
from memberwise.errors import EngineError, MemberwiseError, build
from memberwise.generators import global_generators, restoring

_enabled = os.environ.get("MEMBERWISE_STRICT", "") not in ("", "0")


@contextmanager
def strict(enabled: bool = True) -> Iterator[None]:
    """Raise what a rule raises and no member raises alone [MW211], in place of running member by member.

    For tests of rules, one's own above all. The environment variable `MEMBERWISE_STRICT=1` does so for a whole process.

    >>> import torch, memberwise
    >>> @torch.library.custom_op("memberwise_doc::half", mutates_args=())
    ... def half(x: torch.Tensor) -> torch.Tensor:
    ...     return x / 2
    >>> @memberwise.register_rule(half)
    ... def half_rule(info, in_dims, x):
    ...     return x.halve(), 0
    >>> with strict():
    ...     memberwise.vmap(half)(torch.ones(3, 2))
    Traceback (most recent call last):
    memberwise.errors.EngineError: the rule of memberwise_doc::half raised AttributeError: ...
    """
    global _enabled
    before, _enabled = _enabled, enabled
    try:
        yield
    finally:
        _enabled = before


def blame(
    error: Exception, name: str, func: Callable[..., Any] | None, size: int, values: Any, dims: Any, kwargs: Any
) -> None:
    """In strict mode: raise for an `error` of a rule, unless `func`, the operation, raises one for a member alone.

    `func` is None for a layer's backward, which has no lone form, and nothing to refuse.
    """
    if not _enabled or isinstance(error, MemberwiseError) or (func and _raises(func, size, values, dims, kwargs)):
        return
    what = f"the rule of {name} raised {type(error).__name__}: {error}; no member raises it alone, with in_dims {dims}"
    raise build(EngineError, "MW211", what, do="Mend the rule, or let it return Decline(reason)") from error


def _raises(func: Callable[..., Any], size: int, values: Any, dims: Any, kwargs: Any) -> bool:
    try:
        with restored_keys(), restoring(global_generators()):
            for i in range(size):
                func(*[member_slice(value, dim, i) for value, dim in zip(values, dims, strict=True)], **kwargs)
    except Exception:  # whatever it is: the lone run's error is what the call will raise
        return True
    return False
