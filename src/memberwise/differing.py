"""What members differ in outside their tensors, put where a stack's calls find it: each member runs with its own.

Numbers and strings become `MemberValue`s, which code computes with and compares by value. What code may tell apart
otherwise (`if self.limit is None`), functions, hooks and submodules of other classes are each member's own only where
it runs alone, so that the module that holds them is told to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from memberwise._torch.modules import forward_hooks
from memberwise.attributes import WHOLE, Attributes, Missing
from memberwise.engine.slots import HOOKS, MODULE_ATTRIBUTES, Slots, on_the_tensors_of
from memberwise.engine.values import is_own, own
from memberwise.trees import tree_leaves, tree_transpose_map

_BY_EQUALITY = (int, float, complex, str, bytes)
"""Values that code compares with `==`; a bool is an int, and is not among them."""


def settle(slots: Slots, attributes: Attributes, settings: Mapping[str, Sequence[Any]]) -> list[str]:
    """Put in place what members differ in; answers which settings make modules run member by member.

    Args:
        slots: of the stack.
        attributes: what each member brought.
        settings: what bears on the result, by path, as `differences` found it: other attributes that differ
            (caches, names) make no module run by members.
    """
    modules = dict(slots.template.named_modules(remove_duplicate=False))
    slow: list[str] = []
    for (path, name), values in attributes.differing.items():
        parent = modules[path.rpartition(".")[0]]
        found = [*_below(f"{path}.{name}".strip(".") if name != WHOLE else path, settings)]
        if name == WHOLE:
            parent = _settle_variants(slots, parent, path.rpartition(".")[2], values)
        elif name in HOOKS:
            found = [*_below(f"{path}.(forward hooks)".strip("."), settings)]
            if found:
                slots.variants[modules[path], name] = values
        else:
            parent = modules[path] if not any(value is None for value in values) else parent
            if not _settle_value(slots, modules[path], name, values, bool(found)):
                found = []
            if (modules[path], name) in slots.settings:
                attributes.hand_over((path, name))
        for setting in found:
            slots.retreats.setdefault(parent, f"its members differ in '{setting}'")
        slow += found
    return slow


def _below(path: str, settings: Iterable[str]) -> Iterator[str]:
    """The settings that a path leads to."""
    return (setting for setting in settings if setting == path or setting.startswith((f"{path}.", f"{path}[")))


def _settle_value(slots: Slots, module: nn.Module, name: str, values: Sequence[Any], matters: bool) -> bool:
    """One attribute; answers whether code may tell the members' values apart other than by `==`."""
    known = Missing not in values and (matters or (len({*map(type, values)}) == 1 and all(map(_is_open, values))))
    if name in MODULE_ATTRIBUTES or not known:
        return False
    whole = merged(values)
    leaves = [value for leaf in tree_leaves(whole) if is_own(leaf) for value in leaf._values]
    if leaves:
        vars(module)[name] = whole
        slots.settings.add((module, name))
    return not all(isinstance(value, _BY_EQUALITY) and not isinstance(value, bool) for value in leaves)


def _is_open(value: Any) -> bool:
    """Whether it can be seen what is in it; of the rest (a lock, a file) one serves all, as it says nothing."""
    return isinstance(value, (*_BY_EQUALITY, list, tuple, dict, torch.Tensor)) or hasattr(value, "__dict__")


def merged(values: Sequence[Any]) -> Any:
    """One structure from the members', with a MemberValue where they differ."""
    rows = [tree_leaves(value) for value in values]
    alike = {(type(value), len(row)) for value, row in zip(values, rows, strict=True)}
    keys = {tuple(value) for value in values if isinstance(value, dict)}
    return tree_transpose_map(own, values) if len(alike) == 1 and len(keys) < 2 else own(values)


def _settle_variants(slots: Slots, parent: nn.Module, name: str, values: Sequence[nn.Module | None]) -> nn.Module:
    """Submodules of other classes, on the stack's tensors; answers the module that runs member by member.

    An `nn.Sequential` only calls them; another parent may look at their classes and attributes.
    """
    first = parent._modules[name]
    assert first is not None
    own = [first if one is None else on_the_tensors_of(first, one) for one in values]
    slots.variants[parent, name] = own
    is_called_only = type(parent) is nn.Sequential and not any(hook for one in own for hook in forward_hooks(one))
    return first if is_called_only else parent
