"""One call as several: members in different modes run apart, and `chunk_size` runs so many at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from memberwise.engine.arguments import Arguments
from memberwise.engine.outputs import leaf_dims
from memberwise.engine.slots import Mode, Slots, put_in_mode
from memberwise.engine.turns import Split, in_turns
from memberwise.errors import EngineError, fail
from memberwise.trees import holds_tensors, tree_leaves, tree_map, tree_transpose_map


@dataclass(frozen=True, slots=True)
class Part:
    """Members of one run, and the mode that each of the call's stacks is put in for it (None: as it is)."""

    members: list[int]
    modes: tuple[Mode | None, ...]


def parts(arguments: Arguments, chunk_size: int | None) -> list[Part] | None:
    """How a call is split, or None if all members run at once."""
    stacks = arguments.slots
    if not any([slots.apart for slots in stacks]):
        if chunk_size is None or chunk_size >= arguments.size:
            return None
        return list(_chunks([*range(arguments.size)], chunk_size, (None,) * len(stacks)))
    by_modes: dict[tuple[Mode | None, ...], list[int]] = {}
    for member in range(arguments.size):
        by_modes.setdefault(tuple(slots.apart.get(member) for slots in stacks), []).append(member)
    size = chunk_size or arguments.size
    return [part for modes, members in by_modes.items() for part in _chunks(members, size, modes)]


def _chunks(members: list[int], size: int, modes: tuple[Mode | None, ...]) -> Iterator[Part]:
    for low in range(0, len(members), size):
        yield Part(members[low : low + size], modes)


def in_parts(
    run: Callable[[Arguments, list[int]], Any], found: list[Part], arguments: Arguments, out_dims: Any, name: str
) -> Any:
    """Run each part, and put its outputs where its members belong; `run` gets a part's arguments and members."""
    split = Split([part.members for part in found])
    columns = [
        split.cut(leaf, dim) if dim is not None and isinstance(leaf, torch.Tensor) else [leaf] * len(found)
        for leaf, dim in zip(arguments.leaves, arguments.dims, strict=True)
    ]
    outs: list[Any] = []
    stacks = arguments.slots
    with ExitStack() as stack:
        shown = [
            stack.enter_context(in_turns(slots, split)) for slots in {id(slots): slots for slots in stacks}.values()
        ]
        for turn, part in enumerate(found):
            for showing in shown:
                showing.show(turn)
            with _in_modes(stacks, part.modes):
                own = Arguments(
                    [column[turn] for column in columns], arguments.dims, arguments.build, len(part.members)
                )
                outs.append(run(own, part.members))
            for showing in shown:
                showing.collect()
    for leaf, dim, column in zip(arguments.leaves, arguments.dims, columns, strict=True):
        if dim is not None and isinstance(leaf, torch.Tensor):
            split.write_back(leaf, column, dim)
    return _joined(outs, split, out_dims, name)


@contextmanager
def _in_modes(stacks: list[Slots], modes: Sequence[Mode | None]) -> Iterator[None]:
    before = [(module, module.training) for slots in stacks for module in slots.template.modules()]
    try:
        for slots, mode in zip(stacks, modes, strict=True):
            if mode is not None:
                put_in_mode(slots.template, mode)
        yield
    finally:
        for module, training in before:
            module.training = training


def _joined(outs: list[Any], split: Split, out_dims: Any, name: str) -> Any:
    rows = [tree_leaves(out) for out in outs]
    kinds = {tuple(type(leaf) for leaf in row) for row in rows}
    if len({len(row) for row in rows}) > 1 or (len(kinds) > 1 and any(torch.Tensor in kind for kind in kinds)):
        _cannot_join(f"{name} returns other structures for some members than for others")
    dims = iter(leaf_dims(name, outs[0], out_dims))
    return tree_transpose_map(lambda row: _joined_leaf(row, next(dims), split, name), outs)


def _joined_leaf(row: list[Any], dim: int | None, split: Split, name: str) -> Any:
    if not isinstance(row[0], torch.Tensor):
        if holds_tensors(row[0]):
            columns = iter(zip(*(tree_leaves(value, objects=True) for value in row), strict=True))
            return tree_map(lambda _: _joined_leaf([*next(columns)], dim, split, name), row[0], objects=True)
        return row[0] if all(value is row[0] or value == row[0] for value in row) else _by_member(row, split)
    if dim is None:
        return row[0]
    if len({_without(tuple(piece.shape), dim) for piece in row}) > 1:
        _cannot_join(f"{name} returns tensors of shapes {[tuple(piece.shape) for piece in row]}")
    return split.join(row, dim)


def _without(shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    dim %= len(shape)
    return shape[:dim] + shape[dim + 1 :]


def _by_member(row: list[Any], split: Split) -> list[Any]:
    values = {member: value for members, value in zip(split.turns, row, strict=True) for member in members}
    return [values[member] for member in sorted(values)]


def _cannot_join(what: str) -> None:
    do = "Run the members that differ in separate calls (stack.select)"
    fail(EngineError, "MW203", f"{what}, as members in different modes run apart", do=do)
