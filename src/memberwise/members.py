"""Members travel with all that belongs to them: `select`, and the protocol by which a class takes part.

A class takes part by two methods. `__len__` tells its number of members M. `__select_members__(indices, memo)`
answers a new object that holds the members `indices` (int64, from 0, in that order, maybe repeated); it passes
each of its tensors through `take`, so that parts which hold the same parameter hold the same new one afterwards,
in whichever order they come.
"""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from types import BuiltinFunctionType, FunctionType
from typing import Any, TypeVar

import torch
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer

from memberwise.errors import ArgumentError, fail

T = TypeVar("T")

#: id of an old object -> its successor. (A random stream has one for each place it is copied to.)
Memo = dict[Any, Any]

#: What belongs to no member, and is passed on as it is.
_NEUTRAL = (
    *(type(None), bool, int, float, complex, str, bytes, Enum, type, FunctionType, BuiltinFunctionType),
    *(torch.dtype, torch.device, torch.Size, torch.Generator),
)


def select(state: T, indices: Iterable[int] | torch.Tensor | slice) -> T:
    """The members `indices` of all parts of `state`: new objects, that refer to each other as the old ones do.

    `state` is any nesting of dicts, lists, tuples and dataclasses that hold stacks, member-wise optimizers,
    torch's schedulers of these, tensors of shape (M, ...), lists of M generators, and objects with a
    `__select_members__`. The optimizer of the answer steps the parameters of the answer's stack; what has members
    shares no storage and no random stream with the old. Leaves stay leaves, with their `.grad`; a tensor with a history
    keeps it. Numbers, strings, functions, 0-d tensors and single generators belong to no member and are passed on as
    they are (so hold one number a member in a tensor, not in a list).

    `indices` are ints (negative ones count from the end), one bool a member, or a slice. Members named twice
    become clones of each other, random streams included.

    Raises ArgumentError for indices that name no member (MW410), and for parts of another number of members, or
    of a class that takes no part (MW411).

    >>> import torch
    >>> kept, scores = select((torch.arange(6).view(3, 2), torch.tensor([0.5, 0.25, 0.125])), [2, 0, 0])
    >>> kept.tolist(), scores.tolist()
    ([[4, 5], [0, 1], [0, 1]], [0.125, 0.5, 0.5])
    """
    leaves = list(_leaves(state, "state"))
    path, members = _agreed_size(leaves)
    strangers = [f"{where} has {size}" for where, _, size in leaves if size != members]
    if strangers:
        what = f"expected {members} members everywhere, as {path} has, found: {', '.join(strangers[:10])}"
        fail(ArgumentError, "MW411", what, do="Leave out what has no member axis")
    return _successor(state, positions(indices, members), {})


def take(tensor: torch.Tensor, indices: torch.Tensor, memo: Memo, *, shared: bool = False) -> torch.Tensor:
    """The successor of one tensor: members `indices` of (M, *s), or a copy of all of it if `shared`.

    One object has one successor within a selection. A parameter, or another leaf that requires grad, becomes such
    a leaf with the same attributes and the `.grad` of its members; any other tensor its `index_select`, history
    and all.
    """
    if id(tensor) not in memo:
        is_leaf = isinstance(tensor, torch.nn.Parameter) or (tensor.requires_grad and tensor.is_leaf)
        values = tensor.detach() if is_leaf else tensor
        values = values.clone() if shared else values.index_select(0, indices.to(tensor.device))
        memo[id(tensor)] = _as_leaf(values, tensor) if is_leaf else values
        if is_leaf and tensor.grad is not None:
            memo[id(tensor)].grad = take(tensor.grad, indices, memo, shared=shared)
    return memo[id(tensor)]


def take_streams(generators: Sequence[torch.Generator], indices: torch.Tensor, memo: Memo) -> list[torch.Generator]:
    """The random streams of members `indices`: copies, each from where the old one stands."""
    out = []
    for place, member in enumerate(indices.tolist()):
        old = generators[member]
        if (id(old), place) not in memo:
            memo[id(old), place] = torch.Generator(old.device).set_state(old.get_state())
        out.append(memo[id(old), place])
    return out


def positions(indices: Iterable[int] | torch.Tensor | slice, members: int) -> torch.Tensor:
    """`indices` as an int64 tensor of numbers from 0 to `members` - 1. Raises ArgumentError (MW410).

    >>> positions([True, False, True], 3).tolist(), positions([-1, 0, 0], 3).tolist()
    ([0, 2], [2, 0, 0])
    """
    if isinstance(indices, slice):
        indices = range(members)[indices]
    try:
        chosen = torch.as_tensor(indices if isinstance(indices, torch.Tensor) else list(indices)).cpu()
    except (TypeError, ValueError, RuntimeError):
        chosen = torch.zeros((), dtype=torch.bool)
    if not chosen.numel():
        fail(ArgumentError, "MW410", "indices: expected at least one member, found none")
    if chosen.dtype == torch.bool and chosen.shape == (members,):
        chosen = chosen.nonzero().flatten()
        return chosen if len(chosen) else positions([], members)
    if chosen.ndim != 1 or chosen.dtype == torch.bool or chosen.is_floating_point() or chosen.is_complex():
        fail(ArgumentError, "MW410", f"indices: expected ints, or {members} bools, found {indices!r}")
    strangers = [i for i in chosen.tolist() if not -members <= i < members]
    if strangers:
        fail(ArgumentError, "MW410", f"indices: expected members from 0 to {members - 1}, found {strangers}")
    return chosen.long() % members


PART = "_memberwise_part"
"""The attribute, on a parameter of a group, that says which members it holds, and of how many."""


def note_part(parameter: torch.Tensor, members: Sequence[int], count: int) -> None:
    """Say of a parameter that it holds these of `count` members."""
    setattr(parameter, PART, (tuple(members), count))


def local(members: Sequence[int], indices: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """Of `indices`, those among the members of a part: as places in the part, and where in `indices` they stand.

    >>> local([1, 4], torch.tensor([4, 0, 1, 4]))
    (tensor([1, 0, 1]), [0, 2, 3])
    """
    found = [(k, members.index(index)) for k, index in enumerate(indices.tolist()) if index in members]
    return torch.tensor([place for _, place in found], dtype=torch.int64), [k for k, _ in found]


def _as_leaf(values: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    if isinstance(old, torch.nn.Parameter):
        leaf = torch.nn.Parameter(values, old.requires_grad)
        vars(leaf).update(vars(old))
        return leaf
    return values.requires_grad_()


# -- walking through a state


def _leaves(part: Any, path: str) -> Iterator[tuple[str, Any, int]]:
    """Everything in `part` that has members: its path, itself, its number of members."""
    children = _children(part)
    if children is None and not _is_neutral(part):
        yield path, part, _size(part, path)
    for name, child in children or ():
        yield from _leaves(child, path + (f".{name}" if _has_attributes(part) else f"[{name!r}]"))


def _successor(part: Any, indices: torch.Tensor, memo: Memo) -> Any:
    if _is_neutral(part):
        return part
    if id(part) not in memo:
        children = _children(part)
        if children is not None:
            new = [(name, _successor(child, indices, memo)) for name, child in children]
            memo[id(part)] = _rebuilt(part, new)
        elif isinstance(part, torch.Tensor):
            take(part, indices, memo)
        elif _is_streams(part):
            memo[id(part)] = type(part)(take_streams(part, indices, memo))
        else:
            memo[id(part)] = part.__select_members__(indices, memo)
    return memo[id(part)]


def _agreed_size(leaves: list[tuple[str, Any, int]]) -> tuple[str, int]:
    """Where M is known from, and M: from a stack or an optimizer if there is one."""
    stated = [leaf for leaf in leaves if hasattr(leaf[1], "__select_members__")] or leaves
    if not stated:
        fail(ArgumentError, "MW411", "state: expected something that has members, found nothing")
    return stated[0][0], stated[0][2]


# -- the kinds of parts


def _is_neutral(part: Any) -> bool:
    return isinstance(part, _NEUTRAL) or (isinstance(part, torch.Tensor) and part.ndim == 0)


def _is_streams(part: Any) -> bool:
    return isinstance(part, (list, tuple)) and bool(part) and all(isinstance(x, torch.Generator) for x in part)


def _has_attributes(part: Any) -> bool:
    """Whether `part` is a container whose parts are attributes."""
    is_data = dataclasses.is_dataclass(part) and not hasattr(part, "__select_members__")
    return is_data or isinstance(part, LRScheduler)


def _size(part: Any, path: str) -> int:
    if isinstance(part, torch.Tensor) or hasattr(part, "__select_members__") or _is_streams(part):
        return len(part)
    what = f"{path}: expected something that has members, found {type(part).__qualname__}"
    fail(ArgumentError, "MW411", what, do="Leave it out, or give its class __len__ and __select_members__")


def _children(part: Any) -> list[tuple[Any, Any]] | None:
    """The named parts of a container; None for anything else."""
    if hasattr(part, "__select_members__") or _is_streams(part) or _is_neutral(part):
        return None
    if isinstance(part, dict):
        return list(part.items())
    if isinstance(part, (list, tuple)):
        return list(enumerate(part))
    if isinstance(part, LRScheduler):
        return [(name, value) for name, value in vars(part).items() if _concerns_members(value)]
    if dataclasses.is_dataclass(part):
        return [(field.name, getattr(part, field.name)) for field in dataclasses.fields(part)]
    return None


def _concerns_members(value: Any) -> bool:
    """Whether an attribute of a scheduler is its optimizer, a rate with one value a member, or a scheduler."""
    if isinstance(value, list):
        return any(_concerns_members(item) for item in value)
    return isinstance(value, (torch.Tensor, Optimizer, LRScheduler))


def _rebuilt(part: Any, children: list[tuple[Any, Any]]) -> Any:
    """A container of the kind of `part` with other contents."""
    if isinstance(part, tuple):
        values = [value for _, value in children]
        return part._make(values) if hasattr(part, "_make") else type(part)(values)  # type: ignore[attr-defined] # a namedtuple has _make
    new = copy.copy(part)
    for name, value in children:
        object.__setattr__(new, name, value) if _has_attributes(part) else operator.setitem(new, name, value)
    return new
