"""Lists, dicts and objects that a module is given, when its members run one by one: each finds what is its own.

A cache, or a list of what is to be returned, is one object for all members in a stacked run, and holds member tensors.
Run one by one, each member must see it with its own tensors, and without what the member before has put there; what
all of them leave in it is stacked, in the object itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from memberwise.trees import is_open, tree_leaves, tree_map

Contents = dict[Any, Any]
"""What a holder holds, by key, index or attribute."""


class Holders:
    """All that can be written to among arguments.

    Args:
        values: the arguments.
        own: member i's tensor for a tensor among them.
        stack: one value from one a member.
    """

    def __init__(self, values: Any, own: Callable[[Any, int], Any], stack: Callable[[list[Any]], Any]) -> None:
        self._own, self._stack = own, stack
        self._holders: dict[int, Any] = {}
        self._find(values)
        self._before = {key: _contents(holder) for key, holder in self._holders.items()}
        self._shown = self._before
        self._turns: list[tuple[dict[int, Contents], dict[int, Contents]]] = []

    def _find(self, value: Any) -> None:
        if id(value) in self._holders:
            return
        if _is_holder(value):
            self._holders[id(value)] = value
            for entry in _contents(value).values():
                self._find(entry)
        elif isinstance(value, tuple):
            for entry in value:
                self._find(entry)

    def show(self, member: int) -> None:
        """Let each holder hold what member `member` finds there."""
        self._shown = {
            key: {name: self._of(entry, member) for name, entry in contents.items()}
            for key, contents in self._before.items()
        }
        for key, contents in self._shown.items():
            _put(self._holders[key], contents)

    def _of(self, value: Any, member: int) -> Any:
        """A value as the member sees it; a holder is one object for all."""
        if _is_holder(value):
            return value
        if type(value) is tuple:
            return tuple([self._of(entry, member) for entry in value])
        return tree_map(lambda leaf: self._own(leaf, member), value)

    def collect(self) -> None:
        """Note what the member that is shown has left."""
        self._turns.append((self._shown, {key: _contents(holder) for key, holder in self._holders.items()}))

    def restore(self) -> None:
        """Let each holder hold what it held."""
        for key, contents in self._before.items():
            _put(self._holders[key], contents)

    def finish(self) -> None:
        """Let each holder hold what all members have left, stacked."""
        self.restore()
        for key, holder in self._holders.items():
            turns = [(shown[key], left[key]) for shown, left in self._turns]
            if not all(shown.keys() == left.keys() and _is_same(shown, left, left) for shown, left in turns):
                _put(holder, {name: self._joined(key, name, turns) for name in turns[-1][1]})

    def _joined(self, key: int, name: Any, turns: list[tuple[Contents, Contents]]) -> Any:
        """One entry from the members'; of what is no tensor the last one's stays, as in a loop."""
        if all(name in left and _is_same(shown, left, [name]) for shown, left in turns):
            return self._before[key][name]
        column = [left[name] for _, left in turns if name in left]
        leaves = tree_leaves(column[0], objects=True)
        holds = len(column) == len(turns) and any(isinstance(leaf, torch.Tensor) for leaf in leaves)
        return self._stack(column) if holds else column[-1]


def copied(value: Any, function: Callable[[Any], Any], memo: dict[int, Any]) -> Any:
    """A copy of a list or dict, and of those in it, with `function` applied to each leaf; one object where one was.

    >>> shared: list[int] = []
    >>> copy = copied({"a": shared, "b": [shared]}, lambda leaf: leaf, {})
    >>> copy["a"] is copy["b"][0], copy["a"] is shared
    (True, False)
    """
    if type(value) not in (list, dict):
        return tree_map(function, value)
    if id(value) not in memo:
        memo[id(value)] = made = type(value)()
        _put(made, {key: copied(entry, function, memo) for key, entry in _contents(value).items()})
    return memo[id(value)]


def refilled(holder: Any, value: Any) -> Any:
    """A list or dict that holds what `value`, another one, holds; of other values `value` itself."""
    if type(holder) not in (list, dict) or type(value) is not type(holder) or value is holder:
        return value
    _put(holder, _contents(value))
    return holder


def is_small(value: Any) -> bool:
    """Whether a value is a list or dict that a call can afford to copy."""
    return type(value) in (list, dict) and len(value) <= _MOST


_MOST = 256


def _is_holder(value: Any) -> bool:
    if type(value) in (list, dict):
        return True
    return is_open(value) and not isinstance(value, torch.Tensor | tuple | list | Mapping)


def _contents(holder: Any) -> Contents:
    if type(holder) is list:
        return dict(enumerate(holder))
    return dict(holder if type(holder) is dict else vars(holder))


def _put(holder: Any, contents: Contents) -> None:
    if type(holder) is list:
        holder[:] = contents.values()
        return
    held = holder if type(holder) is dict else vars(holder)
    held.clear()
    held.update(contents)


def _is_same(shown: Contents, left: Contents, names: Iterable[Any]) -> bool:
    return all(name in shown and left[name] is shown[name] for name in names)


@contextmanager
def held_one_by_one(
    values: Any, own: Callable[[Any, int], Any], stack: Callable[[list[Any]], Any]
) -> Iterator[Holders]:
    """Within the block `show(i)` lets the holders among `values` hold what is member i's; then all is stacked again."""
    holders = Holders(values, own, stack)
    try:
        yield holders
    except BaseException:
        holders.restore()
        raise
    holders.finish()
