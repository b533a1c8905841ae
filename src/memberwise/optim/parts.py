"""Parameters of several stacks in one optimizer: each holds some of the members, and so does its parameter group.

The parameters of a `Group` say which members they hold (`members.PART`). A parameter group with parameters of several
stacks becomes one a stack, and what has one value a member goes to those whose member it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from memberwise.members import PART
from memberwise.optim.adoption import count_members, is_shared
from memberwise.optim.group import Column

Part = tuple[tuple[int, ...], int]
"""The members that a parameter holds, and of how many."""


def part_of(parameter: torch.Tensor) -> Part | None:
    """Which members a parameter holds, where it holds some of more; None where there is nothing to tell."""
    found = None if is_shared(parameter) else getattr(parameter, PART, None)
    return found if found and len(found[0]) < found[1] else None


def total(parameters: Iterable[torch.Tensor]) -> int | None:
    """M of the parameters of a group; None if they hold all members, or are not all there."""
    parts = {part for part in map(part_of, parameters) if part is not None}
    held = {member for members, _ in parts for member in members}
    counts = {count for _, count in parts}
    return counts.pop() if len(counts) == 1 and len(held) == max(counts) else None


def parted(raw: Sequence[Mapping[str, Any]], columns: Mapping[str, Column]) -> list[dict[str, Any]]:
    """Parameter groups of which each holds parameters with the same members, and the values of these."""
    return [one for group in raw for one in _parts_of(group, columns)]


def _parts_of(group: Mapping[str, Any], columns: Mapping[str, Column]) -> Iterator[dict[str, Any]]:
    by_part: dict[Part | None, list[int]] = {}
    for position, parameter in enumerate(group["params"]):
        by_part.setdefault(part_of(parameter), []).append(position)
    for part, places in by_part.items() or [(None, [])]:
        out = dict(group)
        for key in ("params", "param_names"):
            if key in group:
                out[key] = [group[key][place] for place in places]
        for column in columns.values() if part else ():
            if column.index is None:
                out[column.key] = own_values(group[column.key], part)
            elif isinstance(group[column.key], Sequence):
                out[column.key] = tuple(own_values(value, part) for value in group[column.key])
        yield out


def own_values(value: Any, part: Part | None) -> Any:
    """Of one value a member, those of a part's members; anything else as it is."""
    if part is None or not hasattr(value, "__len__") or (isinstance(value, torch.Tensor) and not value.ndim):
        return value
    members, count = part
    if len(value) != count:
        return value
    return value[[*members]] if isinstance(value, torch.Tensor) else [value[member] for member in members]


def count_in_parts(named: Sequence[tuple[str, torch.Tensor]]) -> int | None:
    """M, of parameters that may hold parts of the members. Raises ArgumentError (MW404) for what does not fit."""
    count = total(parameter for _, parameter in named)
    if count is None:
        return count_members(named)
    for part in {part_of(parameter) for _, parameter in named}:
        own = [pair for pair in named if part_of(pair[1]) == part]
        count_members(own, len(part[0]) if part else count)
    return count
