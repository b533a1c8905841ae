"""A call for a group: each of its stacks runs its own members, and results come in the members' order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from memberwise._torch.tracing import tracing
from memberwise.engine.flattening import broadcast_dims, flatten, unflatten
from memberwise.engine.outputs import leaf_dims
from memberwise.engine.turns import Split
from memberwise.errors import ArgumentError, fail
from memberwise.trees import Each, tree_leaves, tree_map, tree_transpose_map

Parts = Sequence[tuple[Any, Sequence[int]]]
"""Stacks, and which of the group's members each has."""

classes: set[type] = set()
"""The classes of groups; `__memberwise_parts__()` of one answers its `Parts`."""


def is_group(value: Any) -> bool:
    """Whether a value is a group."""
    return type(value) in classes


def over_parts(
    call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], in_dims: Any, out_dims: Any, name: str
) -> Any:
    """`call(members, *args, **kwargs)` for each stack of the group among the arguments, with its members' share of all.

    Results are stacked at `out_dims`, if all members' have one structure and shape; else they are a list of M.
    """
    given: list[Any] = []
    shapes, counts = [], []
    for arg in args:
        before = len(given)
        shapes.append(flatten(arg, given))
        counts.append(len(given) - before)
    dims = broadcast_dims(in_dims, args, counts)
    if dims is None or not isinstance(in_dims, int | tuple):
        fail(ArgumentError, "MW201", f"{name}: in_dims={in_dims} is not compatible with the structure of the inputs")
    parts = _agreed([leaf.__memberwise_parts__() for leaf in given if is_group(leaf)], name)
    split = Split([members for _, members in parts])
    marked = tree_leaves(kwargs)
    columns = [
        _column(leaf, dim, split, name) for leaf, dim in zip(given + marked, dims + [None] * len(marked), strict=True)
    ]
    versions = [[_version(piece) for piece in column] for column in columns]
    outs = []
    for turn, (_, members) in enumerate(parts):
        own = iter([column[turn] for column in columns])
        own_args = [unflatten(shape, own) for shape in shapes]
        outs.append(call(members, *own_args, **tree_map(lambda _, own=own: next(own), kwargs)))
    for leaf, dim, column, before in zip(given, dims, columns, versions, strict=False):
        unread = tracing() and [_version(piece) for piece in column] == before  # a recording may read no values
        if isinstance(leaf, torch.Tensor) and dim is not None and not unread:
            split.write_back(leaf, column, dim)
    return _joined(outs, split, out_dims, name)


def _version(piece: Any) -> int:
    return piece._version if isinstance(piece, torch.Tensor) and not piece.is_inference() else 0


def _agreed(found: list[Parts], name: str) -> Parts:
    """The parts of one group; of several, as the first has them."""
    first = [[*members] for _, members in found[0]]
    if any([[*members] for _, members in parts] != first for parts in found):
        what = f"{name}: the groups have their members in other stacks"
        fail(ArgumentError, "MW201", what, do="Run each group in a call of its own")
    return found[0]


def _column(leaf: Any, dim: int | None, split: Split, name: str) -> Sequence[Any]:
    """A leaf's share of each part."""
    if is_group(leaf):
        return [stack for stack, _ in leaf.__memberwise_parts__()]
    if isinstance(leaf, Each):
        return [Each(piece, leaf.dim) for piece in _pieces(leaf.value, leaf.dim, split, name)]
    if isinstance(leaf, torch.Tensor) and dim is not None:
        return _pieces(leaf, dim, split, name)
    return [leaf] * len(split.turns)


def _pieces(tensor: torch.Tensor, dim: int, split: Split, name: str) -> Sequence[torch.Tensor]:
    members = len(split.order)
    if not -tensor.ndim <= dim < tensor.ndim or tensor.shape[dim] != members:
        what = f"{name}: expected {members} members in dimension {dim}, got a tensor of shape {tuple(tensor.shape)}"
        fail(ArgumentError, "MW201", what)
    return split.cut(tensor, dim)


def _joined(outs: list[Any], split: Split, out_dims: Any, name: str) -> Any:
    dims = [leaf_dims(name, out, out_dims) for out in outs]
    rows = [tree_leaves(out) for out in outs]
    if len({*map(len, rows)}) == 1 and len({*map(type, outs)}) == 1:
        pairs = zip(zip(*rows, strict=True), zip(*dims, strict=True), strict=True)
        if all(_fit(row, own[0]) for row, own in pairs):
            at = iter(dims[0])
            return tree_transpose_map(lambda row: _join(row, next(at), split), outs)
    found: dict[int, Any] = {}
    for members, out, own in zip(split.turns, outs, dims, strict=True):
        found |= zip(members, _of_members(out, own, len(members)), strict=True)
    return [found[member] for member in sorted(found)]


def _fit(row: tuple[Any, ...], dim: int | None) -> bool:
    """Whether what the parts return in one place can be one result."""
    if not all(isinstance(leaf, torch.Tensor) for leaf in row):
        return not any(isinstance(leaf, torch.Tensor) for leaf in row) and all(leaf == row[0] for leaf in row)
    forms = {(_without(leaf.shape, dim), leaf.dtype, leaf.device) for leaf in row}
    return len(forms) == 1 and dim is not None


def _without(shape: torch.Size, dim: int | None) -> tuple[int, ...]:
    return tuple(size for k, size in enumerate(shape) if dim is None or k != dim % len(shape))


def _join(row: list[Any], dim: int | None, split: Split) -> Any:
    return split.join(row, dim or 0) if isinstance(row[0], torch.Tensor) else row[0]


def _of_members(out: Any, dims: list[int | None], count: int) -> Iterator[Any]:
    """Each member's own result."""
    for place in range(count):
        own = iter(dims)
        yield tree_map(lambda leaf, own=own, place=place: _entry(leaf, next(own), place), out)


def _entry(leaf: Any, dim: int | None, place: int) -> Any:
    return leaf.select(dim, place) if isinstance(leaf, torch.Tensor) and dim is not None else leaf
