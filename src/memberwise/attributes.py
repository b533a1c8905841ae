"""What members carry outside their parameters and buffers: kept where it differs, and given back to each.

A stack runs all members through one template, member 0's structure. Plain attributes that hold tensors become
stacked, so that each member runs with its own (unless all hold one and the same object). What else differs is listed
(`differing`), for the stack to show each member its own; and each gets its own back from `unstack()`.
"""

from __future__ import annotations

import copy
import types
import weakref
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from memberwise.errors import StateError, build
from memberwise.form import state
from memberwise.strangers import unstackable
from memberwise.trees import tree_leaves, tree_transpose_map

_STRUCTURE = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training"})
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type, types.FunctionType, torch.dtype, torch.device)
_COMPILED = frozenset({"forward", "__call__", "_compiled_call_impl"})
_CONTAINERS = (dict, list, tuple, set)
WHOLE = ""
"""Stands for the name of an attribute where a whole submodule is of another class."""

Key = tuple[str, str]
"""Path of a submodule, and the name of its attribute."""


class Missing:
    """Stands for an attribute that a member does not have."""


class Hole:
    """Stands for a module of a member, in kept values."""


def filled(module: nn.Module, tensors: Mapping[int, Any]) -> nn.Module:
    """A deep copy of `module` in which the objects with these ids are others; other tensors are copied, cut off."""
    memo: dict[int, Any] = dict(tensors)
    for sub in module.modules():
        for name, value in vars(sub).items():
            for leaf in () if name in _STRUCTURE else tree_leaves(value):
                if isinstance(leaf, torch.Tensor) and not leaf.is_leaf and id(leaf) not in memo:
                    memo[id(leaf)] = leaf.detach().clone()
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        what = f"{type(module).__name__} cannot be copied: {error}"
        do = "Give the class a __deepcopy__, or make the attribute when it is needed"
        raise build(StateError, "MW301", what, do=do) from error


class Attributes:
    """Takes one member after the other, and keeps what is its own.

    Attributes:
        kept: for each member, the attributes in which it differs from member 0.
        overlaps: attributes of member 0 that are views of a parameter or buffer, told in words; a stack has copies.
        differing: by (path, name), one value a member of each attribute in which they differ; name "" stands for the
            submodule itself.
    """

    def __init__(self) -> None:
        self.kept: list[dict[Key, Any]] = []
        self.overlaps: list[str] = []
        self.differing: dict[Key, list[Any]] = {}
        self._shown: set[Key] = set()
        self._first: dict[Key, Any] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        self._holes: dict[str, Hole] = {}
        self._kinds: dict[str, Any] = {}
        self._one_object: dict[Key, list[weakref.ref[torch.Tensor]]] = {}
        self._originals: dict[Key, Any] = {}

    def take(self, model: nn.Module) -> None:
        """Look at the next member."""
        modules = dict(model.named_modules(remove_duplicate=False))
        if not self.kept:
            self._tensors = {name: torch.empty(0) for name in state(model)}
            self._holes = {path: Hole() for path in modules}
            self._kinds = {path: _kind(sub) for path, sub in modules.items()}
        tensors = {id(one): self._tensors[name] for name, one in state(model).items() if name in self._tensors}
        memo = {**tensors, **{id(sub): self._holes[path] for path, sub in modules.items() if path in self._holes}}
        values = dict(self._attributes(modules))
        self._note_objects(values)
        found = {key: self._own(key, value, memo) for key, value in values.items()}
        if not self.kept:
            self.overlaps = [*_overlaps(values, state(model))]
            self._first, self.skeleton = found, filled(model, tensors)
            self.kept.append({})
            return
        own = {
            key: value
            for key, value in found.items()
            if not _alike(value, self._first.get(key, Missing)) or self._has_own_tensors(key, value)
        }
        own |= {key: Missing for key in self._first if key not in found and not _within(key, own)}
        for path, name in own:
            if name == WHOLE:
                own[path, name] = filled(modules[path], tensors)
        self.kept.append(own)

    def _own(self, key: Key, value: Any, memo: dict[int, Any]) -> Any:
        """The value cut off from the member; one object in all members (a tokenizer, say) is copied once."""
        if not self.kept:
            self._originals[key] = value
        elif value is self._originals.get(key, Missing):
            return self._first[key]
        return _copied(value, memo)

    def _attributes(self, modules: dict[str, nn.Module]) -> Iterator[tuple[Key, Any]]:
        whole: list[str] = []
        for path, sub in modules.items():
            if any(path.startswith(f"{other}.") for other in whole):
                continue
            if path in self._kinds and _kind(sub) is not self._kinds[path]:
                whole.append(path)
                yield (path, WHOLE), None
            elif path in self._kinds:
                yield from (((path, name), value) for name, value in _own_state(sub) if name not in _STRUCTURE)

    def _note_objects(self, values: Mapping[Key, Any]) -> None:
        """Keep track of attributes whose tensors have been the same objects in all members so far."""
        if not self.kept:
            self._one_object = {key: [*map(weakref.ref, _tensors(value))] for key, value in values.items()}
            return
        for key, refs in [*self._one_object.items()]:
            if refs and [*map(id, _tensors(values.get(key)))] != [id(ref()) for ref in refs]:
                del self._one_object[key]

    def _has_own_tensors(self, key: Key, value: Any) -> bool:
        return key not in self._one_object and bool(_tensors(value))

    def template(self, tensors: Mapping[str, torch.Tensor]) -> tuple[nn.Module, dict[tuple[nn.Module, str], Any]]:
        """Member 0's structure holding these tensors; and the attributes in which all members' tensors are stacked."""
        out = filled(self.skeleton, {id(self._tensors[name]): tensor for name, tensor in tensors.items()})
        modules = dict(out.named_modules(remove_duplicate=False))
        carried: dict[tuple[nn.Module, str], Any] = {}
        alone = self._first if len(self.kept) == 1 else {}
        rows: dict[tuple[int, ...], torch.Tensor] = {}
        for path, name in dict.fromkeys([*alone, *(key for own in self.kept for key in own)]):
            values = [own.get((path, name), self._first.get((path, name), Missing)) for own in self.kept]
            if self._can_stack(values):
                whole = tree_transpose_map(lambda row: _stacked_row(row, rows), values)
                vars(modules[path])[name] = carried[modules[path], name] = whole
                for own in self.kept:
                    own.pop((path, name), None)
        keys = dict.fromkeys(key for own in self.kept for key in own)
        self._first = {key: value for key, value in self._first.items() if key in keys}
        self.differing = {key: self._of_all(key, modules) for key in keys if key[0] in modules}
        del self.skeleton, self._kinds, self._one_object, self._originals
        return out, carried

    def _of_all(self, key: Key, modules: Mapping[str, nn.Module]) -> list[Any]:
        """What each member has there, in the template's terms; of whole submodules, None where it is the template's."""
        first = None if key[1] == WHOLE else self._first.get(key, Missing)
        memo = {id(hole): modules[path] for path, hole in self._holes.items() if path in modules}
        tensors = state(modules[""])
        memo |= {id(hole): tensors[name] for name, hole in self._tensors.items()}
        return [_filled_in(own.get(key, first), memo) for own in self.kept]

    def _can_stack(self, values: list[Any]) -> bool:
        """Whether the values of all members are alike but for the values of tensors, none of which is a parameter."""
        rows = [tree_leaves(value) for value in values]
        holes = {*map(id, self._tensors.values())}
        if len({len(row) for row in rows}) > 1 or not _tensors(values[0]):
            return False
        return all(_can_stack_row(row) and holes.isdisjoint(map(id, row)) for row in zip(*rows, strict=True))

    def hand_over(self, key: Key) -> None:
        """Take note that the stack shows each member its own there; plain values it also gives back itself."""
        self._shown.add(key)
        if all(isinstance(leaf, _PLAIN) for value in self.differing[key] for leaf in tree_leaves(value)):
            for own in self.kept:
                own.pop(key, None)

    def give_back(self, module: nn.Module, member: int, template: nn.Module, tensors: Mapping[str, Any]) -> None:
        """Set in an unstacked `module` what member `member` brought, unless the stack has been set otherwise since."""
        modules = dict(module.named_modules(remove_duplicate=False))
        now = dict(template.named_modules(remove_duplicate=False))
        memo = {id(hole): modules[path] for path, hole in self._holes.items() if path in modules}
        memo |= {id(hole): tensors[name] for name, hole in self._tensors.items() if name in tensors}
        for (path, name), value in self.kept[member].items():
            standing = vars(now[path]).get(name) if path in now else None
            if path not in modules or _is_set(standing, self._first.get((path, name))):
                continue
            if (path, name) in self._shown and not any(hasattr(x, "stands_for_members") for x in tree_leaves(standing)):
                continue
            if name == WHOLE:
                above, _, own = path.rpartition(".")
                modules[above]._modules[own] = filled(value, memo)
            elif value is Missing:
                vars(modules[path]).pop(name, None)
            else:
                vars(modules[path])[name] = copy.deepcopy(value, dict(memo))

    def select(self, members: Sequence[int]) -> Attributes:
        """What these members brought."""
        out = copy.copy(self)
        out.kept = [dict(self.kept[member]) for member in members]
        return out


def _filled_in(value: Any, memo: dict[int, Any]) -> Any:
    """A kept value with modules and tensors in its holes."""
    if value is Missing or isinstance(value, _PLAIN):
        return value
    if isinstance(value, nn.Module):
        return filled(value, memo)
    try:
        return copy.deepcopy(value, dict(memo))
    except Exception:  # what no copy can be made of is passed on as it is
        return value


def _own_state(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """A module's attributes, but for a compiled forward: it belongs to this module alone, and its copies have none."""
    values = vars(module)
    if not _COMPILED.isdisjoint(values):
        values = {name: value for name, value in values.items() if name not in _COMPILED - module.__getstate__().keys()}
    yield from values.items()


def _kind(module: nn.Module) -> Any:
    if isinstance(module, fx.GraphModule):
        return fx.GraphModule
    return parametrize.type_before_parametrizations(module)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """A copy cut off from the member; `memo` keeps what is one object in two attributes one object."""
    if isinstance(value, _PLAIN):
        return value
    if type(value) in _CONTAINERS and not value:
        return copy.copy(value)  # a module has ten dicts of hooks, most of them empty
    for leaf in tree_leaves(value):
        if isinstance(leaf, torch.Tensor) and id(leaf) not in memo:
            memo[id(leaf)] = leaf.detach().clone()
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # what no copy can be made of is passed on as it is
        return value


def _alike(a: Any, b: Any, depth: int = 8) -> bool:
    """Whether two values are sure to be equal; functions and objects, by what is in them."""
    if a is b:
        return True
    if type(a) is not type(b) or not depth:
        return False
    if isinstance(a, torch.Tensor):
        alike = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and a.layout == b.layout
        return alike and unstackable(a) is None and torch.equal(a, b)
    if isinstance(a, list | tuple):
        pairs = zip_longest(a, b, fillvalue=Missing)  # a class may refuse `len`
        return all(_alike(x, y, depth - 1) for x, y in pairs)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_alike(a[key], b[key], depth - 1) for key in a)
    if isinstance(a, types.FunctionType):
        return a.__code__ == b.__code__ and _alike(_captured(a), _captured(b), depth - 1)
    if isinstance(a, types.MethodType):
        return _alike((a.__func__, a.__self__), (b.__func__, b.__self__), depth - 1)
    if isinstance(a, nn.Module):  # each one's own, in what a function has captured
        return True
    if type(a).__eq__ is object.__eq__ and hasattr(a, "__dict__"):
        return _alike(vars(a), vars(b), depth - 1)
    if isinstance(a, weakref.ref):
        return True
    try:
        same = a == b
        return bool(same.all() if hasattr(same, "all") else same) or bool(a != a and b != b)
    except Exception:  # a class may refuse to be compared
        return False


def _captured(function: types.FunctionType) -> tuple[Any, ...]:
    """Defaults, and what stands in the closure."""
    cells = [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]
    return function.__defaults__, function.__kwdefaults__, cells


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, _PLAIN) or (type(value) in _CONTAINERS and not value):
        return []
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _overlaps(values: Mapping[Key, Any], tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    known = {id(tensor) for tensor in tensors.values()}
    owners = {memory: name for name, tensor in tensors.items() if (memory := _memory(tensor))}
    for (path, name), value in values.items():
        for leaf in _tensors(value):
            if id(leaf) not in known and _memory(leaf) in owners:
                yield f"attribute '{f'{path}.{name}'.lstrip('.')}' lies in the memory of '{owners[_memory(leaf)]}'"


def _memory(tensor: torch.Tensor) -> int:
    """Where a tensor's memory begins; 0 if it has none."""
    has_one = tensor.layout is torch.strided and not tensor.is_meta and not is_lazy(tensor)
    return tensor.untyped_storage().data_ptr() if has_one else 0


def _can_stack_row(row: tuple[Any, ...]) -> bool:
    first = row[0]
    if not isinstance(first, torch.Tensor):
        return all(_alike(one, first) for one in row)
    same = all(type(one) is type(first) and one.shape == first.shape and one.dtype == first.dtype for one in row)
    return same and unstackable(first) is None


def _stacked_row(row: list[Any], known: dict[tuple[int, ...], torch.Tensor]) -> Any:
    if not isinstance(row[0], torch.Tensor):
        return row[0]
    key = (*map(id, row),)
    if key not in known:
        known[key] = torch.stack(row)
    return known[key]


def _is_set(now: Any, first: Any) -> bool:
    """Whether an attribute has been given another plain value since."""
    return isinstance(now, _PLAIN) and isinstance(first, _PLAIN) and not _alike(now, first)


def _within(key: Key, own: Mapping[Key, Any]) -> bool:
    path = key[0]
    return any(name == WHOLE and (path == other or path.startswith(f"{other}.")) for other, name in own)
