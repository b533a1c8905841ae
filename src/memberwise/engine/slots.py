"""The state of one module inside a call: its parameters and buffers, swapped for member tensors and back.

A `Slots` belongs to a template module whose own `_parameters` and `_buffers` hold the stacked tensors. It finds
the places once, and looks only whether the module is still the one it knows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import nn

from memberwise._torch.recurrent import LISTS, follow, kept_lists, put_back
from memberwise.engine import values
from memberwise.engine.ambient import Region
from memberwise.engine.crossing import enter, leave
from memberwise.engine.holders import copied, is_small, refilled
from memberwise.engine.lowering import Raised
from memberwise.engine.parted import Parted
from memberwise.engine.tensor import MemberTensor
from memberwise.trees import tree_leaves, tree_map

_NONE = id(None)

MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
"""What every module has; a module's own attributes are the others."""


Mode = bool | tuple[bool, ...]
"""Training or evaluation; of a whole model, or of each of its modules."""


def put_in_mode(module: nn.Module, mode: Mode) -> None:
    """As the class's own `train` does it, or each module as it was."""
    if isinstance(mode, bool):
        module.train(mode)
        return
    for sub, own in zip(module.modules(), mode, strict=True):
        sub.training = own


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
"""What a module keeps its hooks in: what they are for is running with its forward."""


def table_of(module: nn.Module, name: str) -> dict[str, Any]:
    """Where a variant stands: a submodule of another class, or other hooks."""
    return vars(module) if name in HOOKS else module._modules


def on_the_tensors_of(first: nn.Module, variant: nn.Module) -> nn.Module:
    """A submodule of another class whose dicts of tensors are those of the template's."""
    twins = dict(first.named_modules())
    pairs = [(module, twins[path]) for path, module in variant.named_modules() if path in twins]
    for module, twin in pairs if variant is not first else ():
        for table in ("_parameters", "_buffers"):
            shared = vars(twin)[table]
            for name in vars(module)[table].keys() - shared.keys():
                shared[name] = None  # what one class has none of, and the other leaves out
            vars(module)[table] = shared
    return variant


@dataclass(slots=True, frozen=True)
class Place:
    """One entry of a module's `_parameters` or `_buffers`."""

    owner: dict[str, Any]
    name: str
    key: str
    shared: bool
    is_parameter: bool


@dataclass(slots=True)
class Swap:
    """What one call put where; `leave` and `restore` take it back."""

    originals: list[Any]
    members: list[Any]
    attributes: list[tuple[nn.Module, dict[str, Any]]]
    recurrent: list[tuple[nn.RNNBase, dict[str, Any]]]
    shown: dict[tuple[nn.Module, str], tuple[Any, Any]]
    leaves: dict[tuple[nn.Module, str], list[Any]]
    copies: dict[int, Any]
    hooks: tuple[list[dict[Any, Any]], list[int]]

    def hide(self) -> None:
        """Put back the attributes that were shown, as far as they still are, and hold, what was shown."""
        for place, (shown, kept) in self.shown.items():
            module, name = place
            if module.__dict__.get(name) is shown and self._is_unwritten(place):
                module.__dict__[name] = kept
        for module, lists in self.recurrent:
            put_back(module, lists)

    def given_back(self, place: tuple[nn.Module, str], found: Any, value: Any) -> Any:
        """The list or dict that an attribute held, with what a call has left in the copy that it was shown."""
        shown, kept = self.shown.get(place, (self, None))
        return refilled(kept, value) if found is shown else value

    def _is_unwritten(self, place: tuple[nn.Module, str]) -> bool:
        before = self.leaves.get(place)
        if before is None:
            return True
        now = tree_leaves(self.shown[place][0])
        return len(now) == len(before) and all(map(is_, now, before))


class Slots:
    """Parameters and buffers of `template`, stacked, to be shown as one member's.

    Args:
        template: the module; its parameters and buffers are `(M, *s)`, those in `shared` have their own shape.
        shared: state-dict keys of what has no member axis.
        members: M, if it is known; else the first stacked tensor tells it.

    Attributes:
        generators: one random stream a member, or None; a call that brings none of its own draws from them.
        apart: members that are in another mode than the template, and in which; a tuple has one of each module.
        carried: stacked tensors that calls left in plain attributes, by (module, attribute).
        retreats: modules that run member by member in all calls, as members differ in them, and why.
        parted: where its members have parted ways.
        settings: plain attributes, by (module, attribute), in which a `MemberValue` stands.
        variants: submodules (or hooks), by (parent, name), of which members have others: one a member, on the same
            tensors. Only a run by members shows them.
        raised: functions that are called with all tensors raised.
        aliases: plain attributes, by (module, attribute), that lead to parameters or buffers.
        holders: plain attributes that are lists or dicts: a call shows copies, and writes back what it leaves in them.
        lock: held by the thread in which a call shows members in the template.
    """

    def __init__(self, template: nn.Module, shared: frozenset[str] = frozenset(), members: int | None = None) -> None:
        self.template = template
        self.shared = shared
        self.members = members
        self.generators: Sequence[torch.Generator] | None = None
        self.apart: dict[int, Mode] = {}
        self.retreats: dict[nn.Module, str] = {}
        self.settings: set[tuple[nn.Module, str]] = set()
        self.variants: dict[tuple[nn.Module, str], list[Any]] = {}
        self.parted = Parted()
        self.raised = Raised()
        self.carried: dict[tuple[nn.Module, str], Any] = {}
        self.aliases: list[tuple[nn.Module, str]] = []
        self.holders: dict[tuple[nn.Module, str], None] = {}
        self.lock = threading.RLock()
        self._modules: list[nn.Module] = []

    @property
    def places(self) -> list[Place]:
        """Every place, found anew only if the module tree has changed."""
        if not self._modules or not self._is_current():
            self._find()
        return self._places

    def _is_current(self) -> bool:
        return (
            [*map(len, self._owners)] == self._lengths
            and [*chain.from_iterable(self._owners)] == self._names
            and [*chain.from_iterable(map(dict.values, self._children))] == self._kids
        )

    def _find(self) -> None:
        self._modules, self._places = [], []
        for prefix, module in self.template.named_modules():
            self._modules.append(module)
            for owner in (module._parameters, module._buffers):
                for name in owner:
                    key = f"{prefix}.{name}" if prefix else name
                    self._places.append(Place(owner, name, key, key in self.shared, owner is module._parameters))
        self._entries = [(place.owner, place.name) for place in self._places]
        self._stacked = [not place.shared for place in self._places]
        self._owners = [owner for module in self._modules for owner in (module._parameters, module._buffers)]
        self._children = [module._modules for module in self._modules]
        self._lengths = [*map(len, self._owners)]
        self._names = [*chain.from_iterable(self._owners)]
        self._kids = [*chain.from_iterable(map(dict.values, self._children))]
        self._custom = [module for module in self._modules if not type(module).__module__.startswith("torch.nn.")]
        self._hooks = [
            hooks for module in self._modules for hooks in (module._forward_pre_hooks, module._forward_hooks)
        ]
        self._recurrent = [module for module in self._modules if isinstance(module, nn.RNNBase)]
        self.aliases = self._find_aliases()
        self.holders = dict.fromkeys(
            (module, name)
            for module in self._custom
            for name, value in vars(module).items()
            if name not in MODULE_ATTRIBUTES and is_small(value)
        )

    def _find_aliases(self) -> list[tuple[nn.Module, str]]:
        """The plain attributes that lead to parameters or buffers: `self.weights = [self.a.weight, ...]`."""
        tensors = {id(owner[name]) for owner, name in self._entries} - {_NONE}
        return [
            (module, name)
            for module in self._modules
            for name, value in vars(module).items()
            if name not in MODULE_ATTRIBUTES and not (isinstance(module, nn.RNNBase) and name in LISTS)
            if not tensors.isdisjoint(map(id, tree_leaves(value)))
        ]

    def find_members(self) -> None:
        """Note which attributes hold member tensors, or values of each member's own, that former runs have left."""
        for place, value, leaves in attributes_of(self.template):
            if any(isinstance(leaf, MemberTensor) for leaf in leaves):
                self.carried[place] = value
            if any(map(values.is_own, leaves)):
                self.settings.add(place)

    def __getstate__(self) -> dict[str, Any]:
        names = "template shared members generators apart retreats parted carried settings variants"
        kept = {name: self.__dict__[name] for name in names.split()}
        return {"_modules": [], "aliases": [], "holders": {}, **kept}  # places are found again

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock=threading.RLock(), raised=Raised())

    def watched_modules(self) -> list[nn.Module]:
        """The modules whose attributes a call may change: torch's own do so only by hooks."""
        return self._modules if any(self._hooks) else self._custom

    def size(self) -> int | None:
        """M, or None if there is no stacked tensor to tell it."""
        if self.members is not None:
            return self.members
        stacked = (tensor for tensor, held in self.tensors() if held and tensor is not None)
        return next((tensor.shape[0] for tensor in stacked), None)

    @property
    def differs(self) -> bool:
        """Whether members differ outside their tensors."""
        standing = [vars(module).get(name) for module, name in self.settings]
        return bool(self.variants) or any(map(values.is_own, tree_leaves(standing)))

    def tensors(self) -> list[tuple[Any, bool]]:
        """`(tensor or None, stacked)` of each place."""
        return [(place.owner[place.name], not place.shared) for place in self.places]

    def enter(self, region: Region, former: Swap | None = None) -> Swap:
        """Show member tensors in every place; one object, where one object stood (ties).

        `former`: a call whose member tensors are shown again, where a place still holds what it held then.
        """
        places = self.places
        originals = [owner[name] for owner, name in self._entries]
        if not originals:
            members: list[Any] = originals
        elif former is not None:
            known = {id(one): member for one, member in zip(former.originals, former.members, strict=True)}
            members = self._enter_unique(originals, region, known)
        elif len({*map(id, originals), _NONE}) > len(originals):
            members = enter(originals, self._stacked, region, lowered=region.lowers)
        else:
            members = self._enter_unique(originals, region, {}, lowered=region.lowers)
        recurrent = [(module, kept_lists(module)) for module in self._recurrent]
        attributes = [(module, module.__dict__.copy()) for module in self.watched_modules()]
        for place, member in zip(places, members, strict=True):
            if member is not None:
                if place.is_parameter:
                    member._is_param = True  # isinstance(weight, nn.Parameter) holds inside, as it does alone
                place.owner[place.name] = member
        for module in self._recurrent:
            follow(module)
        swap = Swap(originals, members, attributes, recurrent, {}, {}, {}, (self._hooks, [*map(len, self._hooks)]))
        if self.aliases:
            own = {id(one): member for one, member in zip(originals, members, strict=True)}
            for place in self.aliases:
                self._show(swap, place, lambda leaf: own.get(id(leaf), leaf))
        for place, kept in self.carried.items():
            if place[0].__dict__.get(place[1]) is kept:
                self._show(swap, place, lambda leaf: _as_member(leaf, region))
        for place in self.settings:
            self._show(swap, place, lambda leaf: values.bound(leaf, region))
        for place in self.holders:
            if place not in swap.shown and is_small(place[0].__dict__.get(place[1])):
                self._show(swap, place, lambda leaf: leaf)
        return swap

    def _enter_unique(
        self, originals: list[Any], region: Region, known: dict[int, Any], *, lowered: bool = False
    ) -> list[Any]:
        """Member tensors where some places hold one object, or none, or what is known by its id."""
        unique = {id(one): one for one in originals if one is not None and id(one) not in known}
        stacked = {id(one): held for one, held in zip(originals, self._stacked, strict=True)}
        entered = enter([*unique.values()], [stacked[key] for key in unique], region, lowered=lowered)
        members = known | dict(zip(unique, entered, strict=True))
        return [None if one is None else members[id(one)] for one in originals]

    def _show(self, swap: Swap, place: tuple[nn.Module, str], as_member: Callable[[Any], Any]) -> None:
        """Show a plain attribute that holds stacked tensors, or what members differ in, as one member's."""
        module, name = place
        now = module.__dict__.get(name)
        _, kept = swap.shown.get(place, (None, now))
        module.__dict__[name] = shown = copied(now, as_member, swap.copies)
        swap.shown[place] = shown, kept
        if type(shown) in (list, dict):
            swap.leaves[place] = tree_leaves(shown)

    def leave(self, swap: Swap, region: Region) -> None:
        """Put the stacked tensors back; what the module assigned to a place or an attribute is kept, stacked."""
        for (owner, name), original, member in zip(self._entries, swap.originals, swap.members, strict=True):
            now = owner.get(name)
            if now is member:
                owner[name] = original
            elif isinstance(now, torch.Tensor):
                owner[name] = leave(now, region)
        swap.hide()
        for module, before in swap.attributes:
            now = module.__dict__
            if len(now) != len(before) or not all(map(is_, now.values(), before.values())):
                for name in now.keys() - MODULE_ATTRIBUTES:
                    if before.get(name) is not now[name]:
                        self._carry_out(module, name, swap, region)

    def _carry_out(self, module: nn.Module, name: str, swap: Swap, region: Region) -> None:
        """Keep what has members' values in it, all of its tensors stacked."""
        value = found = module.__dict__[name]
        self.carried.pop((module, name), None)
        if any(map(values.is_own, tree_leaves(value))):
            value = values.bound(value, None)
            self.settings.add((module, name))
        stacked = any(isinstance(leaf, MemberTensor) for leaf in tree_leaves(value))
        if stacked:
            value = tree_map(lambda leaf: leave(leaf, region) if isinstance(leaf, torch.Tensor) else leaf, value)
        if is_small(value):
            self.holders[module, name] = None
            value = swap.given_back((module, name), found, value)
        module.__dict__[name] = value
        if stacked:
            self.carried[module, name] = value

    @contextmanager
    def again(self, swap: Swap, region: Region) -> Iterator[None]:
        """Within the block the members of a former call, while a checkpoint of that call is recomputed."""
        now = self.enter(region, swap)
        try:
            yield
        finally:
            self.leave(now, region)

    def restore(self, swap: Swap) -> None:
        """Undo: every place and attribute as it was before the call."""
        for place, original in zip(self._places, swap.originals, strict=True):
            place.owner[place.name] = original
        swap.hide()
        for module, before in swap.attributes:
            module.__dict__.clear()
            module.__dict__.update(before)
        take_back(zip(*swap.hooks, strict=True))


def take_back(hooks: Iterable[tuple[dict[Any, Any], int]]) -> None:
    """Remove the hooks that have been registered since there were so many."""
    for registered, before in hooks:
        for key in [*registered][before:]:
            del registered[key]


def attributes_of(module: nn.Module) -> Iterator[tuple[tuple[nn.Module, str], Any, list[Any]]]:
    """`((owner, name), value, what the value holds)` of the plain attributes of a module and those inside of it."""
    for owner in module.modules():
        for name, value in vars(owner).items():
            if name not in MODULE_ATTRIBUTES:
                yield (owner, name), value, tree_leaves(value)


def _as_member(leaf: Any, region: Region) -> Any:
    return enter([leaf], [True], region)[0] if isinstance(leaf, torch.Tensor) else leaf
