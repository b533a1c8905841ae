"""The table of rules: how one operation runs for all members at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Rule = Callable[..., Any]

RULES: dict[Any, Rule] = {}
"""ATen overload -> rule `(info, in_dims, *args, **kwargs) -> (out, out_dims)`, or a `Decline`."""

LONE_CONTIGUOUS: set[Any] = set()
"""Operations whose lone result is contiguous, whatever their arguments' layout: so is what a member sees."""

COMPOSITES: dict[Any, Rule] = {}
"""Torch function -> composite rule `(region, args, kwargs) -> out`, or a `Decline`. For speed alone."""

SETTINGS: dict[Any, Rule] = {}
"""Torch function -> the same as a formula in which numbers may differ from member to member, or a `Decline`."""

_listeners: list[Callable[[Any], None]] = []
_enabled = True


def register_rule(op: Any, rule: Rule | None = None) -> Any:
    """Put a rule into the table; `memberwise.register_rule`, for users, looks at what it is given.

    Raises:
        ValueError: the operation has a rule already.
    """
    if rule is None:
        return lambda given: register_rule(op, given)
    key = getattr(op, "_opoverload", op)
    if key in RULES:
        raise ValueError(f"{key} has a rule already; a second one would hide it.")
    RULES[key] = rule
    for tell in _listeners:
        tell(key)
    return rule


def register_composite(*functions: Any) -> Callable[[Rule], Rule]:
    """Register a composite rule for torch functions (`F.linear`, ...)."""

    def add(rule: Rule) -> Rule:
        for function in functions:
            if function in COMPOSITES:
                raise ValueError(f"{function} has a composite rule already; a second one would hide it.")
            COMPOSITES[function] = rule
        return rule

    return add


def register_settings(function: Any) -> Callable[[Rule], Rule]:
    """Register the formula of a torch function whose numbers may differ from member to member."""

    def add(rule: Rule) -> Rule:
        if function in SETTINGS:
            raise ValueError(f"{function} has a formula already; a second one would hide it.")
        SETTINGS[function] = rule
        return rule

    return add


def on_change(listener: Callable[[Any], None]) -> None:
    """Call `listener(op)` when a rule is registered later."""
    _listeners.append(listener)


def composite_for(function: Any) -> Rule | None:
    """The composite rule of a torch function, unless they are switched off."""
    return COMPOSITES.get(function) if _enabled else None


def composites_enabled() -> bool:
    """Whether composite rules are in use."""
    return _enabled


@contextmanager
def composites_disabled() -> Iterator[None]:
    """Answer every operation by the rules alone: the parity suite runs once so, once with composites."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before
