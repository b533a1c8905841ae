"""The base of the member-wise optimizers: a `torch.optim.Optimizer` over tensors with a leading M.

What is here is what an optimizer is between its steps: groups, state that is saved, copied and selected, and the
tensors that a captured step needs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, ClassVar, Self

import torch
from torch.optim.optimizer import ParamsT

from memberwise._torch.hooks import copy_hooks
from memberwise.errors import ArgumentError, fail
from memberwise.members import Memo, local, note_part, take
from memberwise.optim.adoption import SHARED, fit_state, is_shared
from memberwise.optim.group import Group, name_of
from memberwise.optim.parts import count_in_parts, part_of, parted
from memberwise.optim.stepping import SteppingOptimizer, begin
from memberwise.optim.values import plain, selected

_TORCH_OPTIONS = ("maximize", "foreach", "capturable", "differentiable", "fused")


class MemberOptimizer(SteppingOptimizer):
    """An optimizer that treats each member as its own optimizer would. See `SGD`, `Adam` and `AdamW`."""

    options: ClassVar[tuple[str, ...]] = ()
    members: int | None = None
    _ready = False

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        if defaults["differentiable"]:
            fail(ArgumentError, "MW403", "differentiable: expected False, found True")
        self._forget()
        super().__init__(params, defaults)
        self.param_groups = self._adopted(self.param_groups)
        self._check(self.param_groups)
        self.defaults = deepcopy(self._group(defaults, self.members, ()).plain())
        self._ready = True

    def _complaints(self, group: Group) -> Iterator[str]:
        """What is wrong with the values of a new group taken together."""
        return iter(())

    # -- what a captured step needs

    def capture_state(self) -> list[torch.Tensor]:
        """Every tensor a step reads and writes beside parameters and gradients, made now if it was not.

        In this order, group by group: the hyperparameters, (M,) each, then what is kept for each parameter that
        requires grad. The objects stay the same from call to call while `capture_signature()` is the same (unless
        state is loaded), and are written in place; making them changes no result. `step()` under `make_fx` uses
        these objects, reads no value on the host, and records pointwise operators only.
        """
        out = []
        for group in self.param_groups:
            kept = self._kept(group)
            if group["params"]:
                out += group.materialise(group["params"][0].device)
            for param in group["params"]:
                if kept and param.requires_grad:
                    begin(self.state[param], param, kept)
                    out += [self.state[param][name] for name in kept]
        return out

    def sync_hyperparameters(self) -> None:
        """Bring the tensors of `capture_state()` up to `param_groups`: before each call of a captured step."""
        self._taken.clear()  # a compiled graph writes counts, and no version counter tells
        for group in self.param_groups:
            group.sync()

    def capture_signature(self) -> Hashable:
        """What a captured step depends on beside tensors' values: record anew if it differs."""
        return tuple(
            (
                self._kept(group),
                *(group[option] for option in (*self.options, "maximize")),
                *(param.requires_grad for param in group["params"]),
            )
            for group in self.param_groups
        )

    # -- groups and state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. Raises ArgumentError (MW401 to MW404), and adds nothing, if the group does not fit."""
        super().add_param_group(param_group)
        if self._ready:
            before, self.members = self.members, None
            try:
                groups = self._adopted([self.param_groups.pop()], self.param_groups)
                self._check(groups)
            except ArgumentError:
                self.members = before
                raise
            self.param_groups += groups

    def state_dict(self) -> dict[str, Any]:
        """As torch's; a hyperparameter with one value a member is an (M,) tensor."""
        out = super().state_dict()
        out["param_groups"] = [{key: plain(value) for key, value in g.items()} for g in out["param_groups"]]
        return out

    def __getstate__(self) -> dict[str, Any]:
        shared = [group.shared for group in self.param_groups]
        parts = [[part_of(param) for param in group["params"]] for group in self.param_groups]
        groups = [group.plain() for group in self.param_groups]
        return {**super().__getstate__(), "param_groups": groups, "shared": shared, "parts": parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        for group, flags in zip(state["param_groups"], state.pop("shared", ()), strict=False):
            for param in (p for p, flag in zip(group["params"], flags, strict=True) if flag):
                setattr(param, SHARED, True)  # copies of parameters lose their attributes
        for group, parts in zip(state["param_groups"], state.pop("parts", ()), strict=False):
            for param, part in zip(group["params"], parts, strict=True):
                if part is not None:
                    note_part(param, *part)
        self.defaults = state.get("defaults") or self.defaults
        groups = self._adopted([{**self.defaults, **group} for group in state["param_groups"]])
        kept = defaultdict(dict, fit_state(state["state"], groups))
        super().__setstate__({**state, "state": kept, "param_groups": groups})
        self._forget()
        self._ready = True

    def _adopted(self, raw: list[dict[str, Any]], beside: Sequence[Group] = ()) -> list[Group]:
        """Groups as torch made them, as member-wise ones that fit `beside` others; sets M."""
        known = [("", param) for group in beside for param in group["params"]]
        named = [(f"group {i}: {name_of(g, j)}", p) for i, g in enumerate(raw) for j, p in enumerate(g["params"])]
        self.members = count_in_parts([*known, *named])
        groups = [self._of_part(g) for g in parted(raw, self.columns)]
        storages: set[int] = set()
        for group in (*beside, *groups):
            group.unalias(storages)
        return groups

    def _of_part(self, entries: Mapping[str, Any]) -> Group:
        part = part_of(entries["params"][0]) if entries["params"] else None
        members = len(part[0]) if part else self.members
        return self._group(entries, members, tuple(map(is_shared, entries["params"])))

    def _group(self, entries: Mapping[str, Any], members: int | None, shared: tuple[bool, ...]) -> Group:
        return Group(entries, self.columns, self.options + _TORCH_OPTIONS, members, shared)

    def _check(self, groups: list[Group]) -> None:
        texts = [f"group {i}: {x}" for i, g in enumerate(groups) for x in (*g.complaints(), *self._complaints(g))]
        if texts:
            fail(ArgumentError, "MW402", "; ".join(texts))

    # -- members

    def __len__(self) -> int:
        """M, the number of members; 0 if every parameter is shared."""
        return self.members or 0

    def __bool__(self) -> bool:
        return True

    def __select_members__(self, indices: torch.Tensor, memo: Memo) -> Self:
        """An optimizer of the same class over the successors of the parameters, with the members' state."""
        groups, state = [], {}
        for group in self.param_groups:
            part = part_of(group["params"][0]) if group["params"] else None
            own, places = local(part[0], indices) if part else (indices, [*range(len(indices))])
            if not places:
                continue
            entries = selected(group.plain(), own, group.members or 0)
            entries["params"] = []
            for old, shared in zip(group["params"], group.shared, strict=True):
                param = take(old, own, memo, shared=shared)
                if part:
                    note_part(param, places, len(indices))
                entries["params"].append(param)
                if old in self.state:
                    kept = self.state[old].items()
                    state[param] = {name: take(value, own, memo, shared=shared) for name, value in kept}
            groups.append(entries)
        new = type(self).__new__(type(self))
        new.__setstate__(
            {"defaults": selected(self.defaults, indices, len(self)), "state": state, "param_groups": groups}
        )
        copy_hooks(self, new)
        return new
