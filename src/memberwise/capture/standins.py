"""Stand-ins: what a guard cannot compare by identity, seen as values that stay one object while they are equal."""

from __future__ import annotations

import operator
from typing import Any


class Prepared:
    """An optimizer's own account of what its step depends on, as values that stay one object while they are equal."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.tensors = optimizer.capture_state()
        self.before = optimizer.capture_signature()
        self.held = self._tables()

    def _tables(self) -> list[Any]:
        groups = self.optimizer.param_groups
        return [groups, len(groups), *self.optimizer.state.values()]

    @property
    def signature(self) -> Any:
        now = self.optimizer.capture_signature()
        return self.before if now == self.before else now

    @property
    def state(self) -> Any:
        """Changes when state was loaded, or groups were added."""
        now = self._tables()
        same = len(now) == len(self.held) and all(map(operator.is_, now, self.held))
        return self.held if same else now


class Cache:
    """What a function with `functools.lru_cache` has in it: nothing new, as long as it never misses."""

    def __init__(self, function: Any) -> None:
        self.function = function

    @property
    def misses(self) -> int:
        return self.function.cache_info().misses


class Members:
    """A set, seen as a value that is one object as long as the set holds the same."""

    def __init__(self, held: Any) -> None:
        self.held = held
        self.before = frozenset(held)

    @property
    def members(self) -> frozenset[Any]:
        return self.before if self.held == self.before else frozenset(self.held)


class Contents:
    """A NumPy array, seen as a value that is one object as long as the array holds the same."""

    def __init__(self, array: Any) -> None:
        self.array = array
        self.before = self._now()

    def _now(self) -> tuple[Any, ...]:
        return self.array.shape, self.array.dtype, self.array.tobytes()

    @property
    def values(self) -> tuple[Any, ...]:
        now = self._now()
        return self.before if now == self.before else now
