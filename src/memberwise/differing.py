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
from memberwise.engine.values import by_identity, is_own, own
from memberwise.settings import is_by_the_way
from memberwise.trees import tree_leaves, tree_transpose_map


def settle(slots: Slots, attributes: Attributes, settings: Mapping[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    """Put in place what members differ in; answers what of it makes modules run member by member, one value each.

    Args:
        slots: of the stack.
        attributes: what each member brought.
        settings: what bears on the result, by path, as `differences` found it: other attributes that differ
            (caches, names) make no module run by members.
    """
    modules = dict(slots.template.named_modules(remove_duplicate=False))
    slow: dict[str, tuple[Any, ...]] = {}
    for (path, name), values in attributes.differing.items():
        whole = f"{path}.{name}".strip(".")
        parent = modules[path.rpartition(".")[0]]
        if name == WHOLE:
            found = [*_below(path, settings)]
            parent = _settle_variants(slots, parent, path.rpartition(".")[2], values)
        elif name in HOOKS:
            found = [*_below(f"{path}.(forward hooks)".strip("."), settings)]
            if found:
                slots.variants[modules[path], name] = values
        else:
            found = [*_below(whole, settings)]
            matters = bool(found) or not is_by_the_way(name)
            told_apart = _settle_value(slots, modules[path], name, values, matters)
            if (modules[path], name) in slots.settings:
                attributes.hand_over((path, name))
            parent = parent if any(value is None for value in values) else modules[path]
            found = (found or [whole]) if told_apart else []
        for setting in found:
            slots.retreats.setdefault(parent, f"its members differ in '{setting}'")
            slow[setting] = settings.get(setting, tuple(values))
    attributes.differing = {}
    return slow


def _below(path: str, settings: Iterable[str]) -> Iterator[str]:
    """The settings that a path leads to."""
    return (setting for setting in settings if setting == path or setting.startswith((f"{path}.", f"{path}[")))


def _settle_value(slots: Slots, module: nn.Module, name: str, values: Sequence[Any], matters: bool) -> bool:
    """One attribute; answers whether code may tell the members' values apart other than by `==`."""
    if name in MODULE_ATTRIBUTES or any(value is Missing for value in values) or not all(map(_is_open, values)):
        return False
    if not matters and len({*map(type, values)}) > 1:
        return False
    whole = merged(values)
    leaves = [value for leaf in tree_leaves(whole) if is_own(leaf) for value in leaf._values]
    if leaves:
        vars(module)[name] = whole
        slots.settings.add((module, name))
    return any(map(by_identity, leaves))


def _is_open(value: Any) -> bool:
    """Whether it can be seen what is in it; of the rest (a lock, a file, the places of a stack inside of each member)
    one serves all, as it says nothing."""
    if isinstance(value, Slots):
        return False
    return isinstance(value, _OPEN) or by_identity(value) or hasattr(value, "__dict__") or hasattr(value, "__array__")


_OPEN = (int, float, complex, str, bytes, type(None), list, tuple, dict, set, frozenset, range, slice, torch.Tensor)


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
