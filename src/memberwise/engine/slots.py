"""The state of one module inside a call: its parameters and buffers, swapped for member tensors and back.

A `Slots` belongs to a template module whose own `_parameters` and `_buffers` hold the stacked tensors. It finds
the places once, and looks only whether the module is still the one it knows.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from memberwise.engine.ambient import Region
from memberwise.engine.crossing import enter, leave
from memberwise.engine.tensor import MemberTensor
from memberwise.trees import tree_leaves, tree_map


@dataclass(slots=True, frozen=True)
class Place:
    """One entry of a module's `_parameters` or `_buffers`."""

    owner: dict[str, Any]
    name: str
    key: str
    shared: bool


@dataclass(slots=True)
class Swap:
    """What one call put where; `leave` and `restore` take it back."""

    originals: list[Any]
    members: list[Any]
    attributes: list[tuple[nn.Module, dict[str, Any]]]


class Slots:
    """Parameters and buffers of `template`, stacked, to be shown as one member's.

    Args:
        template: the module; its parameters and buffers are `(M, *s)`, those in `shared` have their own shape.
        shared: state-dict keys of what has no member axis.
    """

    def __init__(self, template: nn.Module, shared: frozenset[str] = frozenset()) -> None:
        self.template = template
        self.shared = shared
        self.window: tuple[int, int] | None = None
        self.retreats: dict[nn.Module, str] = {}
        self.carried: dict[tuple[int, str], Any] = {}
        self._places: list[Place] = []
        self._modules: list[nn.Module] = []
        self._custom: list[nn.Module] = []
        self._shape: list[Any] = []

    def narrowed(self, low: int, high: int) -> Slots:
        """The same slots showing members `low` to `high` only."""
        out = copy.copy(self)
        out.window = (low, high)
        return out

    @property
    def places(self) -> list[Place]:
        """Every place, found anew only if the module tree has changed."""
        if self._shape != [*map(_outline, self._modules)] or not self._modules:
            self._find()
        return self._places

    def _find(self) -> None:
        self._modules, self._places, self._custom = [], [], []
        for prefix, module in self.template.named_modules():
            self._modules.append(module)
            if not type(module).__module__.startswith("torch.nn."):
                self._custom.append(module)
            for owner in (module._parameters, module._buffers):
                for name in owner:
                    key = f"{prefix}.{name}" if prefix else name
                    self._places.append(Place(owner, name, key, key in self.shared))
        self._shape = [*map(_outline, self._modules)]

    def size(self) -> int | None:
        """M, or None if there is no stacked tensor."""
        for place in self.places:
            value = place.owner.get(place.name)
            if value is not None and not place.shared:
                return value.shape[0] if self.window is None else self.window[1] - self.window[0]
        return None

    def tensors(self) -> list[tuple[Any, bool]]:
        """`(tensor or None, stacked)` of each place, cut to the window."""
        found = [(place.owner.get(place.name), not place.shared) for place in self.places]
        if self.window is None:
            return found
        low, high = self.window
        return [(t[low:high] if held and t is not None else t, held) for t, held in found]

    def enter(self, region: Region) -> Swap:
        """Show member tensors in every place; one object, where one object stood (ties)."""
        places = self.places
        originals = [place.owner.get(place.name) for place in places]
        unique: dict[int, int] = {}
        tensors: list[torch.Tensor] = []
        stacked: list[bool] = []
        for (tensor, held), original in zip(self.tensors(), originals, strict=True):
            if tensor is not None and id(original) not in unique:
                unique[id(original)] = len(tensors)
                tensors.append(tensor)
                stacked.append(held)
        entered = enter(tensors, stacked, region)
        members = [None if one is None else entered[unique[id(one)]] for one in originals]
        for place, original, member in zip(places, originals, members, strict=True):
            if member is not None:
                if isinstance(original, nn.Parameter):
                    member._is_param = True  # isinstance(weight, nn.Parameter) holds inside, as it does alone
                place.owner[place.name] = member
        swap = Swap(originals, members, [])
        for module in self._custom:
            self._carry_in(module, region)
            swap.attributes.append((module, dict(module.__dict__)))
        return swap

    def _carry_in(self, module: nn.Module, region: Region) -> None:
        """Show a tensor that a former call left in an attribute as a member tensor again."""
        if not self.carried:
            return
        for name, value in module.__dict__.items():
            kept = self.carried.get((id(module), name))
            if kept is not None and kept is value:
                module.__dict__[name] = tree_map(lambda leaf: _as_member(leaf, region), value)

    def leave(self, swap: Swap, region: Region) -> None:
        """Put the stacked tensors back; what the module assigned to a place or an attribute is kept, stacked."""
        for place, original, member in zip(self._places, swap.originals, swap.members, strict=True):
            now = place.owner.get(place.name)
            if now is member:
                place.owner[place.name] = original
            elif isinstance(now, torch.Tensor):
                self._keep_assigned(place, original, now, region)
        for module, before in swap.attributes:
            for name, value in module.__dict__.items():
                if before.get(name) is not value or (id(module), name) in self.carried:
                    self._carry_out(module, name, value, region)

    def _keep_assigned(self, place: Place, original: Any, now: torch.Tensor, region: Region) -> None:
        if self.window is None:
            place.owner[place.name] = leave(now, region)
            return
        place.owner[place.name] = original  # a window of it changed: write that window
        with torch.no_grad():
            original[self.window[0] : self.window[1]].copy_(leave(now, region))

    def _carry_out(self, module: nn.Module, name: str, value: Any, region: Region) -> None:
        if not isinstance(value, torch.Tensor | list | tuple | dict) or name.startswith("_"):
            return
        if any(isinstance(leaf, MemberTensor) for leaf in tree_leaves(value)):
            kept = tree_map(lambda leaf: leave(leaf, region) if isinstance(leaf, MemberTensor) else leaf, value)
            module.__dict__[name] = kept
            self.carried[id(module), name] = kept

    def restore(self, swap: Swap) -> None:
        """Undo: every place and attribute as it was before the call."""
        for place, original in zip(self._places, swap.originals, strict=True):
            place.owner[place.name] = original
        for module, before in swap.attributes:
            module.__dict__.clear()
            module.__dict__.update(before)


def _outline(module: nn.Module) -> Any:
    return len(module._parameters), len(module._buffers), *map(id, module._modules.values())


def _as_member(leaf: Any, region: Region) -> Any:
    if isinstance(leaf, torch.Tensor) and leaf.ndim and leaf.shape[0] == region.batch_size:
        return enter([leaf], [True], region)[0]
    return leaf
