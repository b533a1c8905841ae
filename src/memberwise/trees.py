"""Nested inputs and outputs: mapping over them, and `each()`, which marks a leaf that holds one entry a member."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
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


def tree_map(function: Callable[[Any], Any], value: Any) -> Any:
    """A structure like `value` with `function` applied to each leaf; what nothing changed in stays the same object.

    Structures are tuples, lists, mappings, dataclasses and their subclasses (Hugging Face's outputs are both of
    the last two); everything else is a leaf.

    >>> tree_map(lambda leaf: leaf + 1, {"a": [1, 2], "b": (3,)})
    {'a': [2, 3], 'b': (4,)}
    """
    if isinstance(value, torch.Tensor) or value is None:
        return function(value)
    if is_namedtuple(value):
        return type(value)(*(tree_map(function, entry) for entry in value))
    if type(value) in (tuple, list) or isinstance(value, tuple | list):
        mapped = [tree_map(function, entry) for entry in value]
        return mapped if type(value) is list else _rebuild_sequence(value, mapped)
    if isinstance(value, Mapping):
        return _rebuild_mapping(value, {key: tree_map(function, entry) for key, entry in value.items()})
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and not isinstance(value, Each):
        return _rebuild_dataclass(value, function)
    return function(value)


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


def _rebuild_dataclass(value: Any, function: Callable[[Any], Any]) -> Any:
    fields = [field.name for field in dataclasses.fields(value)]
    mapped = {name: tree_map(function, getattr(value, name)) for name in fields}
    if all(mapped[name] is getattr(value, name) for name in fields):
        return value
    out = copy.copy(value)
    for name, entry in mapped.items():
        object.__setattr__(out, name, entry)
    return out


def tree_leaves(value: Any) -> list[Any]:
    """All leaves of a structure, in the order in which `tree_map` meets them.

    >>> tree_leaves({"a": [1, 2], "b": (3,)})
    [1, 2, 3]
    """
    found: list[Any] = []
    tree_map(lambda leaf: found.append(leaf) or leaf, value)
    return found


def tree_transpose_map(function: Callable[[list[Any]], Any], values: Sequence[Any]) -> Any:
    """One structure from several alike: `function` gets the list of corresponding leaves.

    >>> tree_transpose_map(sum, [{"a": 1}, {"a": 2}])
    {'a': 3}
    """
    columns = [tree_leaves(value) for value in values]
    rows = iter(zip(*columns, strict=True))
    return tree_map(lambda _: function(list(next(rows))), values[0])
