"""What a step can reach: the values that it may read without being given them, and the places that hold them.

The walk starts at the step and at its arguments that are neither tensors nor numbers, and follows closures, the
globals that functions name, attributes, modules, optimizers and containers. Library code is not followed. Each
value met becomes one entry of a `Row`; the guards compare rows, and tensors met have a `Place`.
"""

from __future__ import annotations

import collections
import contextlib
import enum
import functools
import importlib
import operator
import random
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler

from memberwise.capture.origins import is_installed, is_library_value, is_opaque, names_in, root
from memberwise.capture.places import Attribute, Item, Place
from memberwise.capture.refusals import Refusal, is_library
from memberwise.capture.standins import Cache, Contents, Members, Prepared
from memberwise.engine.arguments import slots_of
from memberwise.engine.slots import Slots

LIMIT = 20_000
"""How many values are watched at most: to compare them takes half a millisecond a call."""

ARRAY_LIMIT = 1 << 16
"""The size in bytes of a NumPy array that is still compared value for value."""

PLAIN = (
    int, float, complex, str, bytes, type(None), enum.Enum, slice, range,
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
"""Values that hold nothing else: watched, and not followed."""

_CLOSED = (types.BuiltinFunctionType, types.CodeType, torch.Size, torch.ScriptObject, DataLoader, Sampler)
"""Values whose identity is watched, and that are not followed."""

_MODULE_KEYS = frozenset(vars(nn.Module()))
_DERIVED = frozenset({"_flat_weights", "_flat_weight_refs"})
"""Attributes that torch's recurrent modules make anew from their parameters."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Row(NamedTuple):
    """Several values of one holder, read by one call.

    Attributes:
        getter: gives a tuple with the value of each key (a single key stands twice).
        holder: what is read.
        places: one a value.
        size: the holder's length, or -1 where new entries change nothing.
    """

    getter: Callable[[Any], tuple[Any, ...]]
    holder: Any
    places: tuple[Place, ...]
    size: int


def without(row: Row, places: Sequence[Place]) -> Row:
    """The same row, less these places."""
    dropped = set(map(id, places))
    kept = [place for place in row.places if id(place) not in dropped]
    return row if len(kept) == len(row.places) else Row(_getter(kept), row.holder, tuple(kept), row.size)


class Unfollowed:
    """A base for objects within a step's reach that the step does not compute from."""


class Reach:
    """All that was found from `roots`, pairs of a label and a value.

    Attributes:
        rows: every value that is watched.
        places: where each tensor met is held, by `id`.
        tensors: the tensors met.
        stacks: the slots of the stacks met.
        stacked: those of stacks and of our optimizers that have a member axis, at 0.
        generators: random streams of torch met.
        streams: random streams of Python and NumPy met.
        optimizers: objects that prepare themselves for capture.
        refusal: why no recording can stand on this, or None.
    """

    def __init__(self, roots: Iterable[tuple[str, Any]]) -> None:
        self.rows: list[Row] = []
        self.places: dict[int, list[Place]] = {}
        self.tensors: list[torch.Tensor] = []
        self.stacks: list[Slots] = []
        self.stacked: list[torch.Tensor] = []
        self.generators: list[torch.Generator] = []
        self.streams: list[Any] = [random, *_numpy_random()]
        self.optimizers: list[Any] = []
        self.refusal: Refusal | None = None
        self._seen: dict[int, Any] = {}
        self._pending: collections.deque[tuple[str, Any, Place | None]] = collections.deque()
        self._pending.extend((label, value, None) for label, value in roots)
        self._classes: set[type] = set()
        self._modules: dict[str, types.ModuleType] = {}
        self._mentioned: set[str] = set()
        self._held: set[tuple[int, Any]] = set()
        self._watched = 0
        self._walk()

    def objects(self) -> list[Any]:
        """What was met beside plain values and tensors."""
        return list(self._seen.values())

    def _walk(self) -> None:
        while self.refusal is None:
            if not self._pending:
                self._mentioned_in_modules()
            if not self._pending:
                return
            label, value, place = self._pending.popleft()
            if isinstance(value, torch.Tensor):
                self._tensor(label, value, place)
            elif not isinstance(value, PLAIN) and id(value) not in self._seen:
                self._seen[id(value)] = value
                self._follow(label, value)

    def _follow(self, label: str, value: Any) -> None:
        for kinds, follow in _FOLLOW:
            if isinstance(value, kinds):
                follow(self, label, value)
                return
        self._object(label, value)

    def _hold(self, holder: Any, places: list[Place], size: int = -1, *, follow: bool = True) -> None:
        """Watch the values at `places`, all in `holder`, and follow them."""
        places = [place for place in places if (id(holder), place.key) not in self._held]
        self._held |= {(id(holder), place.key) for place in places}
        if not places and size < 0:
            return
        self._watched += len(places)
        if self._watched > LIMIT:
            self.refusal = Refusal("too-large", f"{places[-1].label} is value {self._watched}")
            return
        self.rows.append(Row(_getter(places), holder, tuple(places), size))
        if follow:
            self._pending.extend((place.label, place.read(), place) for place in places)

    def _items(self, holder: Any, keys: Iterable[Any], label: str, *, sized: bool = False) -> None:
        places: list[Place] = [Item(holder, key, f"{label}[{_written(key)}]") for key in keys]
        self._hold(holder, places, len(holder) if sized else -1)

    def _entries(self, holder: Any, keys: Iterable[str], label: str, *, sized: bool = False) -> None:
        """As `_items`, of a namespace: its entries are written with a dot."""
        places: list[Place] = [Item(holder, key, f"{label}.{key}") for key in keys]
        self._hold(holder, places, len(holder) if sized else -1)

    def _tensor(self, label: str, tensor: torch.Tensor, place: Place | None) -> None:
        known = self.places.setdefault(id(tensor), [])
        if place is not None:
            known.append(place)
        if id(tensor) in self._seen:
            return
        self._seen[id(tensor)] = tensor
        self.tensors.append(tensor)

    def _mapping(self, label: str, value: Mapping[Any, Any]) -> None:
        self._items(value, list(value), label, sized=True)
        self._attributes(label, value)

    def _sequence(self, label: str, value: Any) -> None:
        self._items(value, range(len(value)), label, sized=True)
        self._attributes(label, value)

    def _attributes(self, label: str, value: Any, *, sized: bool = True) -> None:
        """What an object has beside its entries."""
        own = getattr(value, "__dict__", None)
        if own is not None:
            ours = root(type(value).__module__) == "memberwise"  # what is private there is derived from the rest
            self._entries(own, [key for key in own if not (ours and key.startswith("_"))], label, sized=not ours)
        slots = [name for kind in type(value).__mro__ for name in _slots(kind) if hasattr(value, name)]
        self._hold(value, [Attribute(value, name, f"{label}.{name}") for name in slots])

    def _tuple(self, label: str, value: tuple[Any, ...]) -> None:
        places = [Item(value, index, f"{label}[{index}]") for index in range(len(value))]
        self._pending.extend((place.label, place.read(), place) for place in places)

    def _set(self, label: str, value: Any) -> None:
        holder = Members(value)
        self._hold(holder, [Attribute(holder, "members", label)], follow=False)

    def _module(self, label: str, value: nn.Module) -> None:
        own = vars(value)
        slots = slots_of(value)
        if slots is not None:
            self.stacks.append(slots)
            self.stacked += [tensor for tensor, held in slots.tensors() if held and tensor is not None]
        skipped = _DERIVED | _MODULE_KEYS - {"training"}
        self._entries(own, [key for key in own if key not in skipped], label, sized=True)
        for name in ("_parameters", "_buffers", "_modules"):
            self._entries(own[name], list(own[name]), label, sized=True)
        for name in _HOOKS:
            self._items(own[name], list(own[name]), f"{label}.{name}", sized=True)
        self._class(label, type(value))

    def _function(self, label: str, value: types.FunctionType) -> None:
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # an empty cell has no contents
                self._hold(cell, [Attribute(cell, "cell_contents", name)])
        self._entries(vars(value), list(vars(value)), label, sized=True)
        defaults = (value.__defaults__, value.__kwdefaults__)
        self._pending.extend((label, held, None) for held in defaults if held)
        file = value.__code__.co_filename
        of_library = is_library_value(value) if file == "<string>" else is_library(file)  # `python -c` has no file
        if not of_library:
            self._globals(value)

    def _globals(self, function: types.FunctionType) -> None:
        """The globals that a function names. Those of installed packages are watched; numbers alone are followed."""
        names, attributes = names_in(function.__code__)
        self._mentioned |= attributes
        space = function.__globals__
        places: list[Place] = [Item(space, name, name) for name in sorted(names) if name in space]
        followed = [place for place in places if not is_library_value(place.read())]
        if is_installed(function):
            followed = [place for place in followed if isinstance(place.read(), PLAIN)]
        self._hold(space, followed)
        self._hold(space, places, follow=False)

    def _namespace(self, label: str, value: types.ModuleType) -> None:
        """A module: what the step's functions name of it, if it is the user's."""
        if not is_library_value(value):
            self._modules[label] = value

    def _mentioned_in_modules(self) -> None:
        """Watch what of users' modules has been named by now, in any function."""
        for label, module in self._modules.items():
            self._entries(vars(module), sorted(self._mentioned & vars(module).keys()), label)

    def _of_numpy(self, label: str, value: Any) -> None:
        """NumPy's arrays and random streams; small arrays are watched, value for value."""
        if hasattr(value, "bit_generator") or hasattr(value, "get_state"):
            self.streams.append(value)
        if not hasattr(value, "tobytes"):
            return
        if value.nbytes > ARRAY_LIMIT:
            self.refusal = Refusal("host-data", f"the NumPy array {label} of {value.nbytes} bytes")
            return
        holder = Contents(value)
        self._hold(holder, [Attribute(holder, "values", label)], follow=False)

    def _method(self, label: str, value: types.MethodType) -> None:
        self._pending.extend([(label, value.__func__, None), (f"{label}.__self__", value.__self__, None)])

    def _partial(self, label: str, value: functools.partial[Any]) -> None:
        self._pending.extend((label, part, None) for part in (value.func, value.args, value.keywords))

    def _cached_function(self, label: str, value: Any) -> None:
        self._pending.append((label, value.__wrapped__, None))
        holder = Cache(value)
        self._hold(holder, [Attribute(holder, "misses", f"the cache of {label}")])

    def _class(self, label: str, value: type) -> None:
        """Values and functions of a class of the user's; classes of libraries do not change."""
        for owner in value.__mro__:
            if owner in self._classes or is_library_value(owner):
                continue
            self._classes.add(owner)
            space = vars(owner)
            keys = [key for key, held in space.items() if _is_own_entry(key, held)]
            self._entries(space, keys, owner.__name__)

    def _generator(self, label: str, value: torch.Generator) -> None:
        self.generators.append(value)

    def _stream(self, label: str, value: Any) -> None:
        self.streams.append(value)

    def _iterator(self, label: str, value: Any) -> None:
        self.refusal = Refusal("iterator", f"{label} is a {type(value).__name__}")

    def _nothing(self, label: str, value: Any) -> None:
        pass

    def _object(self, label: str, value: Any) -> None:
        if root(type(value).__module__) == "numpy":
            self._of_numpy(label, value)
            return
        if is_opaque(type(value)):
            return
        if hasattr(type(value), "capture_state"):
            self._optimizer(label, value)
            return
        self._attributes(label, value)
        self._class(label, type(value))

    def _optimizer(self, label: str, value: Any) -> None:
        """An optimizer that says itself what a recording depends on; its hyperparameters are tensors."""
        self.optimizers.append(value)
        holder = Prepared(value)
        for index, tensor in enumerate(holder.tensors):
            self._tensor(f"{label}.capture_state()[{index}]", tensor, None)
        places: list[Place] = [Attribute(holder, name, f"the {name} of {label}") for name in ("signature", "state")]
        self._hold(holder, places, follow=False)  # one row: a place alone in its row is read twice
        members = value.members
        parameters = [p for group in value.param_groups for p in group["params"]]
        self.stacked += [
            tensor for tensor in (*parameters, *holder.tensors)
            if tensor.ndim and tensor.shape[0] == members and not getattr(tensor, "_memberwise_shared", False)
        ]  # fmt: skip
        for group in value.param_groups:
            self._items(group["params"], range(len(group["params"])), f"{label}.param_groups[]['params']", sized=True)


def _numpy_random() -> list[Any]:
    """NumPy's module of random numbers, which it loads when it is first asked for, if NumPy is there."""
    return [importlib.import_module("numpy.random")] if "numpy" in sys.modules else []


_FOLLOW: tuple[tuple[Any, Callable[[Reach, str, Any], None]], ...] = (
    ((Unfollowed, *_CLOSED), Reach._nothing),
    (nn.Module, Reach._module),
    (types.MethodType, Reach._method),
    (types.FunctionType, Reach._function),
    (functools.partial, Reach._partial),
    (type, Reach._class),
    (types.ModuleType, Reach._namespace),
    (type(functools.lru_cache(lambda: None)), Reach._cached_function),
    (Mapping, Reach._mapping),
    ((list, collections.deque), Reach._sequence),
    (tuple, Reach._tuple),
    ((set, frozenset), Reach._set),
    (torch.Generator, Reach._generator),
    (random.Random, Reach._stream),
    (Iterator, Reach._iterator),
)
"""How a value of each kind is followed; the first kind that fits counts."""


def _getter(places: list[Place]) -> Callable[[Any], tuple[Any, ...]]:
    """One C-level call that reads all places of a holder as a tuple."""
    if not places:
        return tuple  # an empty container gives an empty tuple; only its size is watched
    keys = [place.key for place in places]
    if len(keys) == 1:
        keys = keys * 2
    return (operator.itemgetter if isinstance(places[0], Item) else operator.attrgetter)(*keys)


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def _written(key: Any) -> str:
    return repr(key) if isinstance(key, PLAIN) else f"<{type(key).__name__}>"


def _is_own_entry(key: str, held: Any) -> bool:
    if isinstance(held, PLAIN):
        return not key.startswith("__")
    return isinstance(held, types.FunctionType | list | dict)
