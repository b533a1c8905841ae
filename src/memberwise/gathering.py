"""Members on their way into a stack: taken one by one, compared, and copied into columns."""

from __future__ import annotations

import fnmatch
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple

import torch
from torch import nn

from memberwise.columns import Column, column
from memberwise.differences import Differences, listed
from memberwise.errors import ArgumentError, KindError, StackWarning, StateError, fail, text
from memberwise.form import Form, form_of, state


class Gathered(NamedTuple):
    """The state of M members, and what else is known about them.

    Attributes:
        params, buffers: stacked tensors `(M, *s)`; what is shared has the member's own shape. Keys know ties.
        form: what every member looks like.
        count: M.
        settings: by path, what differs between members outside tensors, one value a member.
        shared: names of what has no member axis.
        modes: by member, the modes of the modules of those whose modes are not the first's.
    """

    params: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]
    form: Form
    count: int
    settings: dict[str, tuple[Any, ...]]
    shared: frozenset[str]
    modes: dict[int, dict[str, bool]]


def gather(
    models: Iterable[nn.Module],
    *,
    shared: Sequence[str] = (),
    for_stack: bool = False,
    count: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    caller: str = "stack_module_state",
    stacklevel: int = 1,
) -> Gathered:
    """Take members one by one and stack their state; what `stack_module_state` and `stack` are made of.

    Args:
        models: M modules; any iterable.
        shared: patterns (`fnmatch`) of names of state that is one object in all members: kept as it is.
        for_stack: whether a `Stack` is made of them: other state that is one object in all members is refused [MW105]
            and not copied, members may be in different modes, and what differs outside tensors is left to the caller.
        count: M, if known beforehand though `models` is an iterator.
        device: where to put the stack; by default where the members are.
        dtype: of floating and complex tensors; by default the members' own.
        caller: the public function whose errors these are.
        stacklevel: as in `warnings.warn`.
    """
    held = isinstance(models, list | tuple | nn.Module)
    if count is None and isinstance(models, Sized):
        count = len(models)
    gathering = _Gathering(shared, held, count, device, dtype, for_stack)
    for model in modules(models, count):
        gathering.take(model)
        del model  # or it would live on while the next one is made
    return gathering.finish(caller, stacklevel + 1)


class _Gathering:
    """Members' tensors on their way into columns; after the first mismatch only the differences are collected."""

    def __init__(
        self,
        shared: Sequence[str],
        held: bool,
        count: int | None,
        device: Any,
        dtype: torch.dtype | None,
        for_stack: bool,
    ) -> None:
        self.differences = Differences(modes=not for_stack)
        self._for_stack = for_stack
        self._patterns, self._held, self._expected = shared, held, count
        self._device, self._dtype = device, dtype
        self._columns: dict[str, Column] = {}
        self._shared: dict[str, torch.Tensor] = {}
        self._firsts: dict[str, weakref.ref[torch.Tensor]] = {}
        self._same: set[str] = set()
        self._overlaps: list[str] = []

    def take(self, model: nn.Module) -> None:
        """Look at the next member, and take its tensors unless some member does not fit."""
        self.differences.take(form_of(model))
        if self.differences.fits:
            tensors = state(model)
            if self.differences.count == 1:
                self._begin(tensors)
            with torch.no_grad():
                self._append(tensors)
        else:
            self._columns.clear()

    def _begin(self, tensors: dict[str, torch.Tensor]) -> None:
        declared = {name for pattern in self._patterns for name in self._matching(pattern)}
        for name, tensor in tensors.items():
            self._firsts[name] = weakref.ref(tensor)
            if name in declared:
                self._shared[name] = tensor
            else:
                self._columns[name] = column(self._moved(tensor), held=self._held, count=self._expected)
        self._same = {*tensors}
        self._overlaps = _overlaps(tensors)

    def _matching(self, pattern: str) -> set[str]:
        """First names of the tensors that have a name like `pattern`."""
        form = self.differences.first
        assert form is not None
        names = [name for name in form.tensors if fnmatch.fnmatchcase(name, pattern)]
        if not names:
            self.differences.note("MW105", f"shared='{pattern}' names no parameter or buffer")
        return {form.ties.get(name, (name,))[0] for name in names}

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        converted = self._dtype if tensor.is_floating_point() or tensor.is_complex() else None
        return tensor if self._device is None is converted else tensor.detach().to(self._device, converted)

    def _append(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if self._firsts[name]() is not tensor:
                self._same.discard(name)
            if name in self._columns:
                self._columns[name].append(tensor)

    def finish(self, caller: str, stacklevel: int) -> Gathered:
        """Everything as it came, or the error that lists what does not fit."""
        first = self.differences.first
        if first is None:
            fail(StateError, "MW101", f"{caller}: Expected at least one model, got 0")
        self._check_sharing()
        if error := self.differences.error(caller):
            raise error
        self._warn(stacklevel + 1)
        params: dict[str, torch.Tensor] = {}
        buffers: dict[str, torch.Tensor] = {}
        for name in self._firsts:
            tensor = self._shared.get(name)
            if tensor is None:
                tensor = self._columns.pop(name).finish()  # popped: a finished column is freed
                tensor.requires_grad_(first.tensors[name].requires_grad)
            kind = params if first.tensors[name].kind == "parameter" else buffers
            kind[first.key(name)] = tensor
        seen = self.differences
        return Gathered(params, buffers, first, seen.count, seen.settings(), frozenset(self._shared), seen.modes)

    def _check_sharing(self) -> None:
        if self.differences.count < 2 or not self.differences.fits:
            return
        for name in sorted(self._shared.keys() - self._same):
            self.differences.note("MW105", f"'{name}' is declared shared, but is not one object in all members")
        undeclared = sorted(self._same - self._shared.keys()) if self._for_stack else ()
        for name in undeclared:
            self.differences.note("MW105", f"'{name}' is one object in all members; shared=('{name}',) says so")

    def _warn(self, stacklevel: int) -> None:
        if not self._for_stack:
            self.differences.warn("A functional call runs all members with those of its template", stacklevel + 1)
        if self._overlaps:
            what = f"tensors of one member share memory, which their stack does not:\n{listed(self._overlaps)}"
            do = "What is written to one of them no longer shows in the other; tie them to be one object"
            warnings.warn(text("MW107", what, do=do), StackWarning, stacklevel=stacklevel + 1)


def checked(models: Iterable[nn.Module]) -> Iterable[nn.Module]:
    """`models`, if they are a sequence or iterator of something."""
    if not isinstance(models, Iterable) or isinstance(models, nn.ModuleDict | Mapping):
        what = f"expected a sequence or iterator of modules, got a {type(models).__name__}"
        fail(KindError, "MW108", what, do="Give a list of models")
    return models


def modules(models: Iterable[nn.Module], count: int | None) -> Iterator[nn.Module]:
    """The models one by one, holding none of them, checked to be modules and `count` in number."""
    index = 0
    for model in checked(models):
        if not isinstance(model, nn.Module):
            fail(KindError, "MW108", f"member {index} is a {type(model).__name__}, expected an nn.Module")
        if index == count:
            fail(ArgumentError, "MW112", f"expected {count} models, got more")
        yield model
        del model
        index += 1
    if count is not None and index < count:
        fail(ArgumentError, "MW112", f"expected {count} models, got {index}")


def _overlaps(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Tensors of one member that lie, at least in part, in the memory of another."""
    spans = [(*span, name) for name, tensor in tensors.items() if (span := _span(tensor))]
    found: list[str] = []
    reach, owner = 0, ""
    for low, high, name in sorted(spans, key=lambda span: (span[0], -span[1])):
        if low < reach:
            found.append(f"'{name}' lies in the memory of '{owner}'")
        if high > reach:
            reach, owner = high, name
    return found


def _span(tensor: torch.Tensor) -> tuple[int, int] | None:
    """First address and the one after the last, of a tensor that has addresses."""
    if tensor.layout is not torch.strided or tensor.is_meta or not tensor.numel():
        return None
    try:
        low = tensor.data_ptr()
    except RuntimeError:  # a wrapper of functorch's, or a subclass without memory of its own
        return None
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (low, low + (last + 1) * tensor.element_size()) if low else None
