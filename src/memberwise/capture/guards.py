"""Guards: whether everything that a recording took for granted is still so. The fast half runs in C."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch

from memberwise.capture.places import Place
from memberwise.capture.reach import PLAIN, Row, without

_call: Any = operator.call  # as `map` takes it; its own type ties the function's parameters to the call's


class Change(NamedTuple):
    """One watched value that is another one now."""

    place: Place | None
    before: Any
    now: Any
    what: str


class Guards:
    """The values of rows at one moment, and whether they still stand.

    Values are compared by identity. A new object that is equal (`lr = 0.1` set again) is taken over by `settle`.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        read = [row for row in rows if row.places]
        self._getters = [row.getter for row in read]
        self._holders = [row.holder for row in read]
        self._empty = [row.holder for row in rows if row.size == 0]
        sized = [row for row in rows if row.size > 0]
        self._sized = [row.holder for row in sized]
        self._sizes = [row.size for row in sized]
        self._values: list[Any] = []
        self.take()

    def take(self) -> None:
        """Take the values of now as those to hold."""
        self._values = [*chain.from_iterable(map(_call, self._getters, self._holders)), None]

    def hold(self) -> bool:
        """Whether each value is the object it was."""
        try:
            now = chain.from_iterable(map(_call, self._getters, self._holders))
            return (
                all(map(operator.is_, chain(now, (None,)), self._values))
                and list(map(len, self._sized)) == self._sizes
                and not any(self._empty)
            )
        except (LookupError, AttributeError, ValueError):
            return False

    def changes(self) -> Iterator[Change]:
        """Each value that is not what it was, equal ones left out."""
        position = 0
        for row in self.rows:
            width = max(len(row.places), 2) if row.places else 0
            before = self._values[position : position + width]
            position += width
            if row.size >= 0 and len(row.holder) != row.size:
                label = row.places[0].label if row.places else "an empty container"
                yield Change(None, row.size, len(row.holder), f"the container of {label} has other entries")
                continue
            yield from _row_changes(row, before)

    def without(self, places: Sequence[Place]) -> Guards:
        """The same guards, less these places."""
        rows = [without(row, places) for row in self.rows]
        return Guards([row for row in rows if row.places or row.size >= 0])

    def settle(self) -> list[Change]:
        """All changes; if there are none, equal values of now are taken as those to hold."""
        found = list(self.changes())
        if not found:
            self.take()
        return found


def _row_changes(row: Row, before: Sequence[Any]) -> Iterator[Change]:
    for place, held in zip(row.places, before, strict=False):  # a single value stands twice
        try:
            now = place.read()
        except (LookupError, AttributeError, ValueError):
            yield Change(None, held, None, f"{place.label} is gone")
            continue
        if now is not held and not equal(now, held):
            yield Change(place, held, now, f"{place.label} was {_shown(held)}, is {_shown(now)}")


def equal(now: Any, before: Any) -> bool:
    """Whether a plain value was replaced by an equal one of the same type; other objects are never equal."""
    if type(now) is not type(before) or isinstance(now, torch.Tensor):
        return False
    if isinstance(now, float | complex):
        return repr(now) == repr(before)  # nan equals nan, 0.0 is not -0.0
    if isinstance(now, tuple):
        return len(now) == len(before) and all(a is b or equal(a, b) for a, b in zip(now, before, strict=True))
    return isinstance(now, PLAIN) and bool(now == before)


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value) if isinstance(value, int | float | complex | str | None) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."
