"""The base of the member-wise optimizers: a `torch.optim.Optimizer` over tensors with a leading M.

A subclass is a table of hyperparameters, the names of what it keeps for a parameter, and two updates: `_fused`,
one kernel for a list of tensors with one set of values, and `_formula`, plain operators on one stacked tensor
with (M,) hyperparameters. The first is what runs; the second stands in where the first cannot (another device,
dtype or layout, a tensor subclass, a dispatch mode that watches) and is what `make_fx` records.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch.autograd.graph import increment_version
from torch.optim.optimizer import Optimizer, ParamsT

from memberwise._torch import fused
from memberwise._torch.hooks import copy_hooks
from memberwise._torch.tracing import tracing, watched
from memberwise.errors import ArgumentError, EngineError, fail
from memberwise.members import Memo, take
from memberwise.optim.adoption import SHARED, count_members, fit_state, is_shared, new_count
from memberwise.optim.group import Column, Group, name_of
from memberwise.optim.runs import Layout, Split
from memberwise.optim.values import plain, selected

#: A parameter, its gradient, and what is kept for it, in the order of `_kept`: the step count comes first.
Row = tuple[torch.Tensor, ...]

_TORCH_OPTIONS = ("maximize", "foreach", "capturable", "differentiable", "fused")
_PLAIN_TYPES = {torch.Tensor, torch.nn.Parameter}
_CAPTURE = "Call capture_state() before tracing, and make its tensors inputs of the graph"


class Alike(NamedTuple):
    """What the rows of one bucket have in common, and must have to share a kernel."""

    fusable: bool
    shared: bool
    counts: tuple[float, ...]
    device: torch.device
    dtype: torch.dtype


class MemberOptimizer(Optimizer):
    """An optimizer that treats each member as its own optimizer would. See `SGD`, `Adam` and `AdamW`."""

    columns: ClassVar[Mapping[str, Column]] = {}
    options: ClassVar[tuple[str, ...]] = ()
    members: int | None = None
    _ready = False

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        if defaults["differentiable"]:
            fail(ArgumentError, "MW403", "differentiable: expected False, found True")
        self._forget()
        super().__init__(params, defaults)
        self.param_groups: list[Any] = self._adopted(self.param_groups)
        self._check(self.param_groups)
        self.members = self.param_groups[0].members
        self.defaults = deepcopy(self._group(defaults, self.members, ()).plain())
        self._ready = True

    # -- what a subclass says

    def _kept(self, group: Group) -> tuple[str, ...]:
        """The names of what is kept for each parameter of `group`: none, or "step" and more."""
        raise NotImplementedError

    def _fused(self, group: Group, lists: list[list[torch.Tensor]], taken: float, **values: float) -> None:
        """Update tensors of one set of values. `lists` are rows, transposed, with 0-d step counts.

        The step under way is counted already; `taken` are those before it.
        """
        raise NotImplementedError

    def _formula(self, group: Group, row: Row, **values: torch.Tensor) -> None:
        """Update one parameter, with (M,) values and counts, () if it is shared; the step is counted already."""
        raise NotImplementedError

    def _increment(self, group: Group, device: torch.device) -> torch.Tensor | None:
        """What a step adds to the members' counts: None for 1, or (M,) numbers."""
        return None

    def _complaints(self, group: Group) -> Iterator[str]:
        """What is wrong with the values of a new group taken together."""
        return iter(())

    # -- a step

    @torch.compiler.disable(reason="use memberwise.compile, which captures the whole step")
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]  # any loss
        """Update every parameter that has a gradient, each member as if it were alone.

        `closure`, if given, is called first, to compute the loss again; its value is returned.
        Raises EngineError (MW405), and changes nothing, if a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            work = [(group, self._buckets(group, _with_gradients(group))) for group in self.param_groups]
            for group, buckets in work:
                for alike, rows in buckets.items():
                    self._update(group, alike, [list(column) for column in zip(*rows, strict=True)])
        return loss

    def _buckets(self, group: Group, found: list[tuple[torch.Tensor, bool]]) -> dict[Alike, list[Row]]:
        """The rows of a group, by what lets them share kernels. Under `make_fx` no value is read."""
        traced = tracing()
        fast = group["fused"] is not False and not watched()
        if not traced:
            group.sync()
        kept = self._kept(group)
        buckets: dict[Alike, list[Row]] = {}
        for param, shared in found:
            row = self._row(param, kept, traced)
            counts = self._counts(row[2]) if kept and not traced else ()
            alike = Alike(fast and _can_fuse(row[0], row[1]), shared, counts, param.device, param.dtype)
            if alike in buckets:
                buckets[alike].append(row)
            else:
                buckets[alike] = [row]
        return buckets

    def _row(self, param: torch.Tensor, kept: tuple[str, ...], traced: bool) -> Row:
        state = self.state[param]
        if kept and kept[-1] not in state:
            if traced:
                fail(EngineError, "MW406", "expected an optimizer whose state is made, found none", do=_CAPTURE)
            _begin(state, param, kept)
        row = (param, param.grad, *[state[name] for name in kept])
        return tuple(map(_as_real, row)) if param.is_complex() else row  # type: ignore[return-value]  # has grad

    def _counts(self, step: torch.Tensor) -> tuple[float, ...]:
        """The steps taken: one number a member, or a single one if all have taken as many."""
        version, counts = self._taken.get(step, (-1, ()))
        if version != step._version:
            listed = step.reshape(-1).tolist()
            counts = tuple(listed if len(set(listed)) > 1 else listed[:1])
            self._taken[step] = (step._version, counts)
        return counts

    def _update(self, group: Group, alike: Alike, lists: list[list[torch.Tensor]]) -> None:
        split = group.split(alike.counts) if alike.fusable else None
        if len(lists) > 2:
            self._count(group, alike, lists[2])
        # On an accelerator, a launch of a fused kernel costs what a launch of a plain operator does.
        if split and (alike.device.type == "cpu" or len(split.calls) <= 2 * len(lists[0])):
            return self._call(group, alike, split, lists)
        values = self._tensors(group, alike.device)
        if alike.shared:
            values = {name: tensor[0] for name, tensor in values.items()}
        for row in zip(*lists, strict=True):
            self._formula(group, row, **values)

    def _count(self, group: Group, alike: Alike, steps: list[torch.Tensor]) -> None:
        increment = self._increment(group, alike.device)
        if increment is None and not tracing():
            fused.count_(steps)
            after = tuple([count + 1 for count in alike.counts])
            self._taken.update((step, (step._version, after)) for step in steps)
            return
        if increment is not None and alike.shared:
            increment = increment[0]
        for step in steps:
            step.add_(1 if increment is None else increment)

    def _call(self, group: Group, alike: Alike, split: Split, lists: list[list[torch.Tensor]]) -> None:
        """One call of the fused kernel for each set of values."""
        (layout, calls), counts = split, alike.counts
        steps = [lists.pop(2)[0].reshape(-1)] if len(lists) > 2 else []
        if len(calls) == 1:
            hands = [[tensors] for tensors in lists]
        else:
            keep = not alike.dtype.is_complex  # views of views are new objects each time
            runs = [[self._runs(x, layout, keep and i != 1) for x in xs] for i, xs in enumerate(lists)]
            hands = [layout.deal(column, len(calls)) for column in runs]
        for call, (params, grads, *kept) in zip(calls, zip(*hands, strict=True), strict=True):
            place = call.first if len(counts) > 1 else 0
            own_steps = [[step[place]] * len(params) for step in steps]
            self._fused(group, [params, grads, *own_steps, *kept], counts[place] if counts else 0, **call.values)
        increment_version(lists[0])  # the kernels do not, and an older graph would use the new values in silence

    def _runs(self, tensor: torch.Tensor, layout: Layout, keep: bool) -> Sequence[torch.Tensor]:
        """The runs of a stacked tensor; kept while it has the same storage, since views cost more than kernels."""
        if not keep:
            return layout.cut(tensor)
        known, address, runs = self._views.get(tensor, (None, 0, ()))
        if known is not layout or address != tensor.data_ptr():
            runs = layout.cut(tensor)
            self._views[tensor] = (layout, tensor.data_ptr(), runs)
        return runs

    def _tensors(self, group: Group, device: torch.device) -> dict[str, torch.Tensor]:
        if not tracing():
            group.materialise(device)
        elif not group.tensors:
            fail(EngineError, "MW406", "expected hyperparameters as tensors, found none", do=_CAPTURE)
        return group.tensors

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
                    _begin(self.state[param], param, kept)
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
            groups = self._adopted([self.param_groups.pop()], self.param_groups)
            self._check(groups)
            self.members = groups[0].members
            self.param_groups += groups

    def state_dict(self) -> dict[str, Any]:
        """As torch's; a hyperparameter with one value a member is an (M,) tensor."""
        out = super().state_dict()
        out["param_groups"] = [{key: plain(value) for key, value in g.items()} for g in out["param_groups"]]
        return out

    def __getstate__(self) -> dict[str, Any]:
        shared = [group.shared for group in self.param_groups]
        groups = [group.plain() for group in self.param_groups]
        return {**super().__getstate__(), "param_groups": groups, "shared": shared}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        for group, flags in zip(state["param_groups"], state.pop("shared", ()), strict=False):
            for param in (p for p, flag in zip(group["params"], flags, strict=True) if flag):
                setattr(param, SHARED, True)  # copies of parameters lose their attributes
        self.defaults = state.get("defaults") or self.defaults
        groups = self._adopted([{**self.defaults, **group} for group in state["param_groups"]])
        kept = defaultdict(dict, fit_state(state["state"], groups))
        super().__setstate__({**state, "state": kept, "param_groups": groups})
        self.members = groups[0].members
        self._forget()
        self._ready = True

    def _forget(self) -> None:
        """Start without what was seen of the state: it may be other state now."""
        self._taken: dict[torch.Tensor, tuple[int, tuple[float, ...]]] = {}
        self._views: dict[torch.Tensor, tuple[Layout, int, Sequence[torch.Tensor]]] = {}

    def _adopted(self, raw: list[dict[str, Any]], beside: Sequence[Group] = ()) -> list[Group]:
        """Groups as torch made them, as member-wise ones that fit `beside` others."""
        named = [(f"group {i}: {name_of(g, j)}", p) for i, g in enumerate(raw) for j, p in enumerate(g["params"])]
        members = count_members(named, next((group.members for group in beside if group.members), None))
        groups = [self._group(g, members, tuple(map(is_shared, g["params"]))) for g in raw]
        storages: set[int] = set()
        for group in (*beside, *groups):
            group.unalias(storages)
        return groups

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
            entries = selected(group.plain(), indices, len(self))
            entries["params"] = []
            for old, shared in zip(group["params"], group.shared, strict=True):
                param = take(old, indices, memo, shared=shared)
                entries["params"].append(param)
                if old in self.state:
                    kept = self.state[old].items()
                    state[param] = {name: take(value, indices, memo, shared=shared) for name, value in kept}
            groups.append(entries)
        new = type(self).__new__(type(self))
        new.__setstate__(
            {"defaults": selected(self.defaults, indices, len(self)), "state": state, "param_groups": groups}
        )
        copy_hooks(self, new)
        return new


def _with_gradients(group: Group) -> list[tuple[torch.Tensor, bool]]:
    """The parameters that have a gradient, and whether they are shared."""
    pairs = zip(group["params"], group.shared, strict=True)
    found = [(param, shared) for param, shared in pairs if param.grad is not None]
    sparse = [param for param, _ in found if param.grad.layout is not torch.strided]
    if sparse:
        places = [i for i, param in enumerate(group["params"]) if any(param is other for other in sparse)]
        what = ", ".join(f"{group['params'][i].grad.layout} of {name_of(group, i)}" for i in places)
        fail(EngineError, "MW405", f"expected strided gradients, found {what}", do="Give its layer sparse=False")
    return found


def _can_fuse(param: torch.Tensor, grad: torch.Tensor) -> bool:
    dtype = param.dtype
    return (
        dtype in fused.DTYPES
        and grad.dtype is dtype
        and type(param) in _PLAIN_TYPES
        and param.is_contiguous()
        and grad.is_contiguous()
        and param.device.type in fused.DEVICES
    )


def _begin(state: dict[str, Any], param: torch.Tensor, kept: tuple[str, ...]) -> None:
    """Make what is kept for a parameter, where it is not there yet: zeros, which change no result."""
    for name in kept:
        if name not in state:
            zeros = torch.zeros_like(param, memory_format=torch.preserve_format)
            state[name] = new_count(param) if name == "step" else zeros


def _as_real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
