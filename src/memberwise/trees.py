"""Nested inputs and outputs: mapping over them, and `each()`, which marks a leaf that holds one entry a member."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Each:
    """A value whose entries along `dim` belong to one member each."""

    value: torch.Tensor
    dim: int = 0


def each(value: torch.Tensor, dim: int = 0) -> Each:
    """Mark a tensor as holding one entry a member: member i sees `value.select(dim, i)`.

    Shapes: `value` is `(M, *s)` for `dim=0`; a member sees `(*s)`.

    >>> import torch
    >>> each(torch.zeros(3, 5)).value.shape
    torch.Size([3, 5])
    """
    return Each(value, dim)


def is_namedtuple(value: Any) -> bool:
    """Whether `value` is an instance of a `NamedTuple` class."""
    return isinstance(value, tuple) and hasattr(value, "_fields")


def tree_map(function: Callable[[Any], Any], value: Any, *, objects: bool = False) -> Any:
    """A structure like `value` with `function` applied to each leaf; what nothing changed in stays the same object.

    Structures are tuples, lists, mappings, dataclasses and their subclasses (Hugging Face's outputs are both of
    the last two); everything else is a leaf. With `objects`, so are objects that keep something in attributes (their
    caches), unless they can be called: of one in which something changed, a copy has it.

    >>> tree_map(lambda leaf: leaf + 1, {"a": [1, 2], "b": (3,)})
    {'a': [2, 3], 'b': (4,)}
    """
    return _mapped(function, value, {} if objects else None)


def _mapped(function: Callable[[Any], Any], value: Any, seen: dict[int, Any] | None) -> Any:
    """`seen`: what objects have become, by their ids; None where they are leaves."""
    if isinstance(value, torch.Tensor) or value is None:
        return function(value)
    if is_namedtuple(value):
        return type(value)(*(_mapped(function, entry, seen) for entry in value))
    if type(value) in (tuple, list) or isinstance(value, tuple | list):
        mapped = [_mapped(function, entry, seen) for entry in value]
        return mapped if type(value) is list else _rebuild_sequence(value, mapped)
    if isinstance(value, Mapping):
        return _rebuild_mapping(value, {key: _mapped(function, entry, seen) for key, entry in value.items()})
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and not isinstance(value, Each):
        return _rebuild_dataclass(value, function, seen)
    if seen is not None and is_open(value):
        return _rebuild_object(value, function, seen)
    return function(value)


def holds_tensors(value: Any) -> bool:
    """Whether a leaf is an object in whose attributes, however deep, tensors are."""
    return is_open(value) and any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value, objects=True))


def is_open(value: Any) -> bool:
    """Whether a leaf keeps something in attributes, and is no code."""
    return hasattr(value, "__dict__") and not callable(value) and not isinstance(value, ModuleType)


def _rebuild_object(value: Any, function: Callable[[Any], Any], seen: dict[int, Any]) -> Any:
    if id(value) in seen:
        return seen[id(value)]
    seen[id(value)] = value  # where it refers to itself
    entries = vars(value)
    mapped = {name: _mapped(function, entry, seen) for name, entry in entries.items()}
    if not all(_is_same(mapped[name], entry) for name, entry in entries.items()):
        seen[id(value)] = out = copy.copy(value)
        vars(out).update(mapped)
    return seen[id(value)]


def _is_same(new: Any, old: Any) -> bool:
    """Whether nothing has changed; lists and dicts are always made anew."""
    if type(old) is list:
        return all(map(_is_same, new, old))
    return new is old or (type(old) is dict and all(_is_same(new[key], old[key]) for key in old))


def _rebuild_sequence(value: Sequence[Any], mapped: list[Any]) -> Any:
    if all(new is old for new, old in zip(mapped, value, strict=True)):
        return value
    return type(value)(mapped)  # type: ignore[call-arg] # every sequence class takes an iterable


def _rebuild_mapping(value: Mapping[Any, Any], mapped: dict[Any, Any]) -> Any:
    if type(value) is dict:
        return mapped
    if all(mapped[key] is value[key] for key in value):
        return value
    out = copy.copy(value)
    for key, entry in mapped.items():
        out[key] = entry  # type: ignore[index] # an immutable mapping cannot carry other tensors
    return out


def _rebuild_dataclass(value: Any, function: Callable[[Any], Any], seen: dict[int, Any] | None) -> Any:
    fields = [field.name for field in dataclasses.fields(value)]
    mapped = {name: _mapped(function, getattr(value, name), seen) for name in fields}
    if all(mapped[name] is getattr(value, name) for name in fields):
        return value
    out = copy.copy(value)
    for name, entry in mapped.items():
        object.__setattr__(out, name, entry)
    return out


def tree_leaves(value: Any, *, objects: bool = False) -> list[Any]:
    """All leaves of a structure, in the order in which `tree_map` meets them.

    >>> tree_leaves({"a": [1, 2], "b": (3,)})
    [1, 2, 3]
    """
    found: list[Any] = []
    tree_map(lambda leaf: found.append(leaf) or leaf, value, objects=objects)
    return found


def tree_transpose_map(function: Callable[[list[Any]], Any], values: Sequence[Any]) -> Any:
    """One structure from several alike: `function` gets the list of corresponding leaves.

    >>> tree_transpose_map(sum, [{"a": 1}, {"a": 2}])
    {'a': 3}
    """
    columns = [tree_leaves(value) for value in values]
    rows = iter(zip(*columns, strict=True))
    return tree_map(lambda _: function(list(next(rows))), values[0])
