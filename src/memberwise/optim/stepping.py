"""A step: which parameters can share a kernel, which members can share a call of it, and what stands in for it.

Fused kernels take tensors that have one set of hyperparameters. So the parameters of a group are put into buckets
(`Alike`), and the members of a bucket are dealt to calls (`runs`). What no fused kernel serves (another device, dtype
or layout, a tensor subclass, a dispatch mode that watches) is updated by formula; so is everything under `make_fx`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch.autograd.graph import increment_version
from torch.optim.optimizer import Optimizer

from memberwise._torch import fused
from memberwise._torch.dynamo import uncompiled
from memberwise._torch.hooks import is_attended, is_profiled
from memberwise._torch.tracing import tracing, watched
from memberwise.errors import EngineError, fail
from memberwise.optim.adoption import new_count
from memberwise.optim.group import Column, Group, name_of
from memberwise.optim.runs import Layout, Split
from memberwise.pages import in_huge_pages

#: A parameter, its gradient, and what is kept for it, in the order of `_kept`: the step count comes first.
Row = tuple[torch.Tensor, ...]

_PLAIN_TYPES = {torch.Tensor, torch.nn.Parameter}
_STRIDED = {None, torch.strided}
_CAPTURE = "Call capture_state() before tracing, and make its tensors inputs of the graph"


class Alike(NamedTuple):
    """What the rows of one bucket have in common, and must have to share a kernel."""

    fusable: bool
    shared: bool
    counts: tuple[float, ...]
    device: torch.device
    dtype: torch.dtype


class SteppingOptimizer(Optimizer):
    """An optimizer whose groups are `Group`s, and that updates each member as if it were alone.

    A subclass is a table of hyperparameters, the names of what it keeps for a parameter, and two updates: `_fused`, one
    kernel for a list of tensors with one set of values, and `_formula`, plain operators on one stacked tensor with (M,)
    hyperparameters.
    """

    columns: ClassVar[Mapping[str, Column]] = {}
    param_groups: list[Any]  # of Group

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

    # -- a step

    @uncompiled
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's, which looks for a profiler's mark first, at 20 us and more."""
        if not set_to_none or is_profiled():
            return super().zero_grad(set_to_none)
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = None

    @uncompiled
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]  # any loss
        """Update every parameter that has a gradient, each member as if it were alone.

        `closure`, if given, is called first, to compute the loss again; its value is returned.
        Raises EngineError (MW405), and changes nothing, if a gradient is sparse.
        """
        return self._step_attended(closure) if is_attended(self) else self._step(closure)

    step.hooked = True  # type: ignore[attr-defined]  # torch need not wrap it

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            work = [(group, self._buckets(group)) for group in self.param_groups]
            for group, buckets in work:
                for alike, rows in buckets.items():
                    self._update(group, alike, [list(column) for column in zip(*rows, strict=True)])
        return loss

    _step_attended = Optimizer.profile_hook_step(_step)

    def _buckets(self, group: Group) -> dict[Alike, list[Row]]:
        """The rows of a group, by what lets them share kernels. Under `make_fx` no value is read."""
        traced = tracing()
        fast = group["fused"] is not False and not watched()
        if not traced:
            group.sync()
        kept = self._kept(group)
        buckets: dict[Any, list[Row]] = {}
        for param, shared in zip(group["params"], group.shared, strict=True):
            grad = param.grad
            if grad is None:
                continue
            if grad.layout is not torch.strided:
                _refuse_sparse(group)
            row = self._row(param, grad, kept, traced)
            counts = self._counts(row[2]) if kept and not traced else ()
            key = (fast and _can_fuse(row), shared, counts, param.device, param.dtype)
            if key in buckets:
                buckets[key].append(row)
            else:
                buckets[key] = [row]
        return {Alike(*key): rows for key, rows in buckets.items()}

    def _row(self, param: torch.Tensor, grad: torch.Tensor, kept: tuple[str, ...], traced: bool) -> Row:
        state = self.state[param] if kept else {}
        if kept and kept[-1] not in state:
            if traced:
                fail(EngineError, "MW406", "expected an optimizer whose state is made, found none", do=_CAPTURE)
            begin(state, param, kept)
        row = (param, grad, *[state[name] for name in kept])
        return tuple(map(_as_real, row)) if param.is_complex() else row

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
        traced, counts = tracing(), len(lists) > 2
        if counts and not traced:
            self._count(group, alike, lists[2])
        # On an accelerator, a launch of a fused kernel costs what a launch of a plain operator does.
        if split and (alike.device.type == "cpu" or len(split.calls) <= 2 * len(lists[0])):
            return self._call(group, alike, split, lists)
        values = self._tensors(group, alike.device)
        if alike.shared:
            values = {name: tensor[0] for name, tensor in values.items()}
        for row in zip(*lists, strict=True):
            if counts and traced:  # one parameter after the other, so that a recording repeats itself by layers
                self._count(group, alike, [row[2]])
            self._formula(group, row, **values)

    def _count(self, group: Group, alike: Alike, steps: list[torch.Tensor]) -> None:
        increment = self._increment(group, alike.device)
        if increment is None and not tracing():
            fused.count_(steps)
            after = tuple([count + 1 for count in alike.counts])
            for step in steps:
                self._taken[step] = (step._version, after)
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
            group.materialise(group["params"][0].device)
        elif not group.tensors:
            fail(EngineError, "MW406", "expected hyperparameters as tensors, found none", do=_CAPTURE)
        return {name: tensor.to(device) for name, tensor in group.tensors.items()}

    def _forget(self) -> None:
        """Start without what was seen of the state: it may be other state now."""
        self._taken: dict[torch.Tensor, tuple[int, tuple[float, ...]]] = {}
        self._views: dict[torch.Tensor, tuple[Layout, int, Sequence[torch.Tensor]]] = {}


def _refuse_sparse(group: Group) -> NoReturn:
    layouts = [None if param.grad is None else param.grad.layout for param in group["params"]]
    found = [f"{layout} of {name_of(group, i)}" for i, layout in enumerate(layouts) if layout not in _STRIDED]
    fail(
        EngineError, "MW405", f"expected strided gradients, found {', '.join(found)}", do="Give its layer sparse=False"
    )


_is_contiguous = torch.Tensor.is_contiguous


def _can_fuse(row: Row) -> bool:
    """Whether there is a fused kernel for a parameter. They walk through memory, so strides must be the same."""
    param, grad = row[0], row[1]
    return (
        all(map(_is_contiguous, row))
        and param.dtype in fused.DTYPES
        and grad.dtype is param.dtype
        and type(param) in _PLAIN_TYPES
        and (param.is_cpu or param.device.type in fused.DEVICES)
    )


@torch.inference_mode(False)  # what is made in inference mode cannot be updated outside
def begin(state: dict[str, Any], param: torch.Tensor, kept: tuple[str, ...]) -> None:
    """Make what is kept for a parameter, where it is not there yet: zeros, which change no result."""
    for name in kept:
        if name not in state:
            empty = torch.empty_like(param, memory_format=torch.preserve_format)
            state[name] = new_count(param) if name == "step" else in_huge_pages(empty).zero_()


def _as_real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
