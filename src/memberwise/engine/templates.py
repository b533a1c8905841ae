"""Modules that a mapped function calls with members' tensors, by `functional_call`: their plain attributes.

A stack knows its template; of `vmap` of a `functional_call` the engine hears when the call is made. What a half-done
run has left in attributes is put back, and members that run one by one start each from what was there before, as each
has a model of its own. What they leave is a member tensor, as after a stacked run.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from memberwise.engine.crossing import enter, leave
from memberwise.engine.slots import Slots
from memberwise.engine.tensor import MemberTensor
from memberwise.engine.turns import Showing, one_by_one
from memberwise.functional import Watcher


class Before(Watcher):
    """While active, remembers the attributes of the modules that a stacked run calls so, as it finds them."""

    def __init__(self) -> None:
        self._kept: dict[nn.Module, dict[str, Any]] = {}

    def notice(self, module: nn.Module) -> None:
        for each in module.modules():
            if each not in self._kept and not type(each).__module__.startswith("torch.nn."):
                self._kept[each] = dict(each.__dict__)

    def put_back(self) -> None:
        for module, kept in self._kept.items():
            module.__dict__.clear()
            module.__dict__.update(kept)


class Turns(Watcher):
    """The same modules while members run one by one: each sees what is its own."""

    def __init__(self, region: Any, rows: Any, surroundings: ExitStack) -> None:
        self._region, self._rows, self._surroundings = region, rows, surroundings
        self._shown: dict[nn.Module, Showing] = {}
        self._turn = 0
        surroundings.enter_context(self)

    def show(self, turn: int) -> None:
        self._turn = turn
        for shown in self._shown.values():
            shown.show(turn)

    def shown(self) -> Iterable[Showing]:
        """The templates that members have called."""
        return self._shown.values()

    def collect(self) -> None:
        for shown in self._shown.values():
            shown.collect()

    def notice(self, module: nn.Module) -> None:
        if self._turn or module in self._shown:  # one that only later members call is as in a loop
            return
        own_state = frozenset(place.key for place in Slots(module).places)
        slots = Slots(module, own_state, self._region.batch_size)
        slots.find_members()
        turns = one_by_one(slots, self._region.batch_size, self._cut, self._join)
        self._shown[module] = self._surroundings.enter_context(turns)
        self._shown[module].show(0)

    def _cut(self, leaf: torch.Tensor) -> Any:
        if isinstance(leaf, MemberTensor):
            return self._rows.of(leave(leaf, leaf._region))
        return [leaf] * self._region.batch_size

    def _join(self, row: list[torch.Tensor]) -> torch.Tensor:
        return enter([torch.stack(row)], [True], self._region)[0]
