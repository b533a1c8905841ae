"""Arguments to flat leaves and back, at the speed a call needs: tuples, lists and dicts here, the rest by torch.

torch's `tree_flatten` and `tree_unflatten` take 70 us for the two dicts of a small model, these 8.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from memberwise._torch.pytree import broadcast_to_and_flatten, tree_flatten, tree_unflatten
from memberwise.trees import Each

_LEAVES = frozenset((int, float, bool, str, type(None), Each))

Shape = Any
"""None for a leaf; else `(type, keys, shapes)`, or torch's spec for what torch alone knows."""


def flatten(value: Any, leaves: list[Any]) -> Shape:
    """Append the leaves of `value`; return what `unflatten` needs to build it again."""
    kind = type(value)
    if kind in _LEAVES or isinstance(value, torch.Tensor) or hasattr(kind, "__memberwise_slots__"):
        leaves.append(value)
        return None
    if kind is dict:
        return dict, tuple(value), [flatten(entry, leaves) for entry in value.values()]
    if kind is tuple or kind is list:
        return kind, None, [flatten(entry, leaves) for entry in value]
    found, spec = tree_flatten(value)
    leaves.extend(found)
    return None if spec.is_leaf() else spec


def unflatten(shape: Shape, leaves: Iterator[Any]) -> Any:
    """A structure from its shape and its leaves, in order."""
    if shape is None:
        return next(leaves)
    if type(shape) is not tuple:
        return tree_unflatten([next(leaves) for _ in range(shape.num_leaves)], shape)
    kind, keys, shapes = shape
    if kind is dict:
        return {key: unflatten(entry, leaves) for key, entry in zip(keys, shapes, strict=True)}
    return kind([unflatten(entry, leaves) for entry in shapes])


def broadcast_dims(in_dims: Any, args: tuple[Any, ...], counts: list[int]) -> list[Any] | None:
    """One entry of `in_dims` for each leaf of `args`; `counts[k]` leaves are of argument k. None if they differ."""
    if isinstance(in_dims, int):
        return [in_dims] * sum(counts)
    if len(in_dims) == len(counts) and all(dim is None or type(dim) is int for dim in in_dims):
        return [dim for dim, count in zip(in_dims, counts, strict=True) for _ in range(count)]
    return broadcast_to_and_flatten(in_dims, tree_flatten(args)[1])
