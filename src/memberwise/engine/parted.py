"""Where members have parted ways, and for what calls: there they run one by one at once, and do not fail first.

What differs between members may agree later, so the stacked run is tried again, after 16 calls, then 32, and so on.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from memberwise._torch.dispatch import saving_is_watched
from memberwise.engine.lowering import code_of

if TYPE_CHECKING:
    from memberwise.engine.arguments import Arguments

FIRST_WAIT, LONGEST_WAIT = 16, 1024
"""How many calls run member by member before the stacked run is tried again."""
MOST = 256
"""Entries; who calls with ever new shapes is not remembered for ever."""

Place = nn.Module | None
"""A module inside a stack, or None: the whole function."""


@dataclass(slots=True)
class Known:
    """Why members part ways at a place, and for how many calls this is taken for granted."""

    reason: str
    wait: int = FIRST_WAIT
    left: int = FIRST_WAIT


class Parted(dict[tuple[Place, Hashable], Known]):
    """By place and signature, where the members of one stack, or of one function's calls, have parted ways."""

    def note(self, place: Place, signature: Hashable, reason: str) -> None:
        """They have parted ways there, now or again."""
        known = self.get((place, signature))
        if known is None:
            if len(self) >= MOST:
                self.clear()
            self[place, signature] = Known(reason)
            return
        known.reason, known.wait = reason, min(2 * known.wait, LONGEST_WAIT)
        known.left = known.wait

    def of(self, signature: Hashable) -> dict[Place, str]:
        """The places at which a call that begins now runs member by member, and why.

        In a checkpoint those of any signature, and nothing is tried: a recomputation saves what the call has saved.
        """
        if saving_is_watched():
            return {place: known.reason for (place, _), known in self.items()}
        found: dict[Place, str] = {}
        for (place, own), known in self.items():
            if own == signature and known.left:
                known.left -= 1
                found[place] = known.reason
        return found

    def moved(self, twins: dict[nn.Module, nn.Module]) -> Parted:
        """The same for the modules of another stack of this class."""
        moved = Parted()
        for (place, signature), known in self.items():
            if place is None or place in twins:
                twin = None if place is None else twins[place]
                moved[twin, signature] = Known(known.reason, known.wait, known.left)
        return moved


of_functions: weakref.WeakKeyDictionary[Any, Parted] = weakref.WeakKeyDictionary()


def apart(func: Callable[..., Any], arguments: Arguments, randomness: str) -> dict[Place, str]:
    """Where a call that begins now runs member by member, and why: as members differ there, or have parted ways."""
    found: dict[Place, str] = {}
    for slots in arguments.slots:
        for module, reason in slots.retreats.items():
            found[None if module is slots.template else module] = reason
    known = _known_of(func, arguments)
    return found if known is None else known.of(signature_of(func, arguments, randomness)) | found


def _known_of(func: Callable[..., Any], arguments: Arguments) -> Parted | None:
    """What is remembered for such a call, if anything is: by its stack, or by the code of the function."""
    if arguments.slots:
        return arguments.slots[0].parted or None
    return of_functions.get(code_of(func)) if of_functions else None


def memory_of(func: Callable[..., Any], arguments: Arguments) -> Parted:
    """Where to remember it."""
    return arguments.slots[0].parted if arguments.slots else of_functions.setdefault(code_of(func), Parted())


def signature_of(func: Callable[..., Any], arguments: Arguments, randomness: str) -> Hashable:
    """What a call has in common with others: shapes and types, what is stacked, modes; not the number of members."""
    leaves = zip(arguments.leaves, arguments.dims, strict=True)
    return randomness, *(_of_leaf(leaf, dim) for leaf, dim in leaves), *map(_modes, _modules_of(func))


def _of_leaf(leaf: Any, dim: int | None) -> Hashable:
    if isinstance(leaf, torch.Tensor):
        shape = tuple(leaf.shape)
        return shape if dim is None else (*shape[:dim], *shape[dim + 1 :]), leaf.dtype, dim is None
    if isinstance(leaf, bool | str | None):
        return leaf
    template = getattr(leaf, "template", None)  # of a stack's slots
    return type(leaf) if template is None else _modes(template)


def _modes(module: nn.Module) -> Hashable:
    return tuple(each.training for each in module.modules())


def _modules_of(func: Any) -> Iterable[nn.Module]:
    """The modules that a function is, belongs to, or closes over."""
    while isinstance(func, partial):
        func = func.func
    held = [cell.cell_contents for cell in getattr(func, "__closure__", None) or () if _is_filled(cell)]
    return [each for each in (func, getattr(func, "__self__", None), *held) if isinstance(each, nn.Module)]


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
