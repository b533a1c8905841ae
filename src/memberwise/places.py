"""Where a module keeps its tensors: the places that state-dict names lead to, and which of them hold one tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import nn
from torch.nn.utils import parametrize

from memberwise.errors import KindError, fail, text

ABSENT: Final = object()
"""What a place reads where the module has nothing of that name."""


class Attribute:
    """Whatever `getattr(owner, key)` finds."""

    __slots__ = ("key", "owner")

    def __init__(self, owner: nn.Module, key: str) -> None:
        self.owner, self.key = owner, key

    def read(self) -> Any:
        """What is there now."""
        return getattr(self.owner, self.key, ABSENT)

    def write(self, value: Any) -> None:
        """Put `value` there; ABSENT removes what is there."""
        if value is not ABSENT:
            setattr(self.owner, self.key, value)
        elif hasattr(self.owner, self.key):
            delattr(self.owner, self.key)


class Computed(Attribute):
    """A name that a parametrization computes: a value there stands for the result, and hides the property.

    The property belongs to the module's class, so the module is of a subclass for as long. (To assign to the property
    would run the parametrization backwards, under no_grad, and change the module's own parameters.)
    """

    __slots__ = ()

    def read(self) -> Any:
        """The value that hides the property, ABSENT if none does."""
        if self.key in vars(self.owner):
            return vars(self.owner)[self.key]
        return _hidden(type(self.owner)).get(self.key, ABSENT)

    def write(self, value: Any) -> None:
        """Hide the property with `value`; ABSENT shows it again."""
        vars(self.owner).pop(self.key, None)
        kind = type(self.owner)
        values = {**_hidden(kind), self.key: value}
        if value is ABSENT:
            del values[self.key]
        base = kind.__mro__[1] if _hidden(kind) else kind
        self.owner.__class__ = type(kind.__name__, (base,), {_MARK: values, **values}) if values else base


_MARK = "_memberwise_hidden"


def _hidden(kind: type) -> dict[str, Any]:
    return vars(kind).get(_MARK, {})


Entry = tuple[dict[str, Any], str, nn.Module]
"""A parameter or buffer: the table that has it, its key there, and the module whose table it is."""


class Tree:
    """All paths through a module, but for those that lead around a circle of modules.

    Attributes:
        owners: each submodule by path, with a dot at its end; one that two paths lead to, by both.
        entries: each parameter and buffer by name, by every name; also those that are None.
        ties: for the names of tensors that have more than one, all names.
    """

    __slots__ = ("entries", "owners", "ties")

    def __init__(self, module: nn.Module) -> None:
        self.owners: dict[str, nn.Module] = {}
        self.entries: dict[str, Entry] = {}
        self._visit("", module, frozenset())
        ids = [id(table[key]) for table, key, _ in self.entries.values() if table[key] is not None]
        self.ties = self._find_ties() if len({*ids}) < len(ids) else {}

    def _visit(self, path: str, module: nn.Module, above: frozenset[nn.Module]) -> None:
        self.owners[path] = module
        above |= {module}
        for table in (module._parameters, module._buffers):
            for key in table:
                self.entries[path + key] = (table, key, module)
        for name, child in module._modules.items():
            if child is not None and child not in above:
                self._visit(f"{path}{name}.", child, above)

    def _find_ties(self) -> dict[str, tuple[str, ...]]:
        names: dict[int, list[str]] = {}
        for name, tensor in self.tensors():
            names.setdefault(id(tensor), []).append(name)
        return {name: tuple(group) for group in names.values() if len(group) > 1 for name in group}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every name of every parameter and buffer, with the tensor."""
        for name, (table, key, _) in self.entries.items():
            if table[key] is not None:
                yield name, table[key]

    def place(self, name: str) -> Entry | Attribute:
        """Where a name leads; the module need not have anything there yet."""
        if name in self.entries:
            return self.entries[name]
        path, dot, key = name.rpartition(".")
        owner = self.owners.get(path + dot)
        if owner is None:
            owner = self._by_attributes(path)
            for table in (owner._parameters, owner._buffers):
                if key in table:
                    return table, key, owner  # around a circle
        if not key:
            raise KeyError(text("MW110", f"'{name}' does not end in the name of a tensor"))
        return (Computed if parametrize.is_parametrized(owner, key) else Attribute)(owner, key)

    def _by_attributes(self, path: str) -> nn.Module:
        """A module that is no registered submodule, but an attribute or property of one."""
        owner: Any = self.owners[""]
        for step in path.split("."):
            if not hasattr(owner, step):
                raise AttributeError(text("MW110", f"{type(owner).__name__} has no attribute `{step}` (of '{path}')"))
            owner = getattr(owner, step)
            if not isinstance(owner, nn.Module):
                fail(KindError, "MW110", f"'{step}' of '{path}' is a {type(owner).__name__}, expected a module")
        return owner
