"""Places: where a tensor is held, so that a later call can look it up again and put a new one there."""

from __future__ import annotations

from typing import Any


class Place:
    """A place that holds a value. `label` is how a reader would write it."""

    __slots__ = ("key", "label", "owner")

    def __init__(self, owner: Any, key: Any, label: str) -> None:
        self.owner = owner
        self.key = key
        self.label = label

    def read(self) -> Any:
        """What is there now."""
        raise NotImplementedError

    def write(self, value: Any) -> None:
        """Put `value` there."""
        raise NotImplementedError


class Item(Place):
    """`owner[key]`: a dict's or a list's entry, and so a module's parameter, buffer or attribute."""

    __slots__ = ()

    def read(self) -> Any:
        return self.owner[self.key]

    def write(self, value: Any) -> None:
        self.owner[self.key] = value


class Attribute(Place):
    """`owner.key`: an entry of an object with slots, a closure's cell, a function's defaults."""

    __slots__ = ()

    def read(self) -> Any:
        return getattr(self.owner, self.key)

    def write(self, value: Any) -> None:
        setattr(self.owner, self.key, value)
