"""The ladder: each ATen operation by its rule, by torch's batching, or by members.

`run` is the one place where a member axis is added to an operation, forward or backward. It unwraps once, takes
the first rung that serves, and wraps once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.graph import increment_version

from memberwise._torch.dispatch import (
    DisableTorchFunctionSubclass,
    mode_depth,
    pop_mode,
    push_mode,
    run_as_others,
    without_dispatch,
)
from memberwise.engine import counted, ladder, trace
from memberwise.engine.ambient import Region
from memberwise.engine.layout import count_write, has_gaps, promote, relatives, settle, stay_inside
from memberwise.engine.lowering import unlower
from memberwise.engine.operation import Operation, describe
from memberwise.engine.signals import Decline, part_ways
from memberwise.engine.strict import blame
from memberwise.engine.tensor import MemberTensor, wrap, wrap_contiguous, wrap_unbatched, wrap_view


def on_dispatch(func: Any, args: Any, kwargs: Any, region: Region | None = None) -> Any:
    """Entry from `__torch_dispatch__`: of a region's mode (all operations inside), or of a member tensor."""
    if func in _AT_THE_DOOR and args:
        func, args = _AT_THE_DOOR[func](func, args)
    if region is not None and mode_depth() > region.depth:
        part_ways(region, "a tracer inside the call would take member tensors for constants")
    op = describe(func)
    if op.quick and not kwargs and trace.active is None:
        out = _quick(op, args, region)
        if out is not None:
            return out if func is not _DETACH else _severed(out)
    if op.made_of_others:
        return _as_others(func, args, kwargs or {}, region)
    if op.moves_in_place and not op.swaps_memory and isinstance(args[0], MemberTensor):
        return _move_in_place(func, args, kwargs or {}, region)
    call = Call(op, region)
    call.unwrap(args, kwargs or {})
    return call.run() if func is not _DETACH else _severed(call.run())


_DETACH = torch.ops.aten.detach.default


def _severed(view: Any) -> Any:
    """A view that has no share in the graph of what it is a view of (`engine.lowering.requires_grad` looks there)."""
    root = getattr(view, "_root", None)
    if root is not None and root.requires_grad:
        view._root = root.detach()
    return view


def _quick(op: Operation, args: Any, region: Region | None) -> Any:
    """The first rung for the common case, checks first: member tensors of one level and scalars, rule, no write.

    None where the case is another; then nothing has been done. Half the cost of the ladder below, which does the
    same and more.
    """
    source: Any = None
    cls = None if region is None else region.tensor_class
    dims: list[Any] = []
    values: list[Any] = []
    for arg in args:
        kind = type(arg)
        if kind is cls or (cls is None and isinstance(arg, MemberTensor)):
            if arg._differs or arg._lowered or not arg._batched:
                return None
            if source is None:
                source = arg
                cls, region = kind, arg._region
            dims.append(0)
            values.append(arg._inner)
        elif kind in _SCALARS or (kind is list and (not arg or type(arg[0]) is int)):
            dims.append(None)
            values.append(arg)
        else:
            return None
    if source is None or region is None:
        return None
    try:
        out = op.rule(region, dims, *values)
    except Exception as error:
        blame(error, op.name, op.func, region.batch_size, values, dims, {})
        raise
    if type(out) is Decline:
        return None
    return _wrap(*out, region, source if op.is_view else None, op.lone_contiguous)


_SCALARS = frozenset((int, float, bool, type(None), torch.dtype))


def _wrap(out: Any, dims: Any, region: Region, source: Any, differs: bool) -> Any:
    """Results as member tensors: views of `source`, or new; `differs` says that the lone result is contiguous, and a
    member's part of this one may not be."""
    if isinstance(out, torch.Tensor):
        if source is not None:
            return wrap_view(out, source)
        if dims == 0:
            return wrap_contiguous(out, region) if differs else wrap(out, region)
        return wrap_unbatched(out, region)
    if isinstance(out, list | tuple):
        each = dims if isinstance(dims, list | tuple) else [dims] * len(out)
        return type(out)([_wrap(one, at, region, source, differs) for one, at in zip(out, each, strict=True)])
    return out


def _as_others(func: Any, args: Any, kwargs: dict[str, Any], region: Region | None) -> Any:
    """An operation that is handed over whole, as in inference mode, by the operations that it calls."""
    if region is None:
        return run_as_others(func, args, kwargs)
    push_mode(region)
    try:
        return run_as_others(func, args, kwargs)
    finally:
        pop_mode()


def _move_in_place(func: Any, args: Any, kwargs: dict[str, Any], region: Region | None) -> Any:
    """`squeeze_` and its kin: the view that the plain operation gives, taken over by the same object.

    After a write autograd makes the graph of a subclass's views anew by taking each again of its base; of a base in
    another shape it would be another view, and one that has moved itself would not have.
    """
    member = args[0]
    with DisableTorchFunctionSubclass():
        is_view = member._is_view()
    if is_view or member._viewed or len(relatives(member)) > 1:
        part_ways(member._region, f"{func} changes the shape of a tensor that has views, or is one")
    packet = getattr(torch.ops.aten, func._schema.name.removeprefix("aten::")[:-1])
    plain = getattr(packet, func._overloadname, None) or packet.int  # of `transpose_`, `transpose.int`
    moved = on_dispatch(plain, args, kwargs, region)
    member._inner, member._root, member._batched, member._differs = moved._inner, moved._root, moved._batched, False
    member._viewed = False  # the view is this object now
    with without_dispatch():
        func(*args, **kwargs)
    return member


MemberTensor._on_dispatch = on_dispatch

_MATERIAL = {
    torch.ops.aten._efficientzerotensor.default: torch.ops.aten.zeros.default,
    torch.ops.aten._conj.default: torch.ops.aten.conj_physical.default,
    torch.ops.aten._neg_view.default: torch.ops.aten.neg.default,
}
"""Lazy results, and the same with memory: below dispatch the keys that would make them real are off."""

_OFFSETS = {
    torch.ops.aten.as_strided.default: 3,
    torch.ops.aten.as_strided_copy.default: 3,
    torch.ops.aten.as_strided_scatter.default: 4,
}
"""Where an operation takes a place in the storage of its first argument."""


def _with_memory(func: Any, args: Any) -> tuple[Any, Any]:
    return (_MATERIAL[func] if isinstance(args[0], torch.Tensor | list) else func), args


def _in_the_stack(func: Any, args: Any) -> tuple[Any, Any]:
    """The place that a member tensor shows, as the place in the stacked tensor's storage."""
    place, member = _OFFSETS[func], args[0]
    if not isinstance(member, MemberTensor):
        return func, args
    settle(member)
    if func is torch.ops.aten.as_strided.default and member.requires_grad and member._is_view() and has_gaps(member):
        # written, it would have to be taken anew of the base; of a subclass autograd takes it of the view, whose
        # gradient has no place for the gaps
        part_ways(member._region, "as_strided of a view with gaps, which has a gradient")
    start = member._inner.storage_offset()
    if len(args) > place and args[place] is not None:
        start += args[place] - member.storage_offset()
    stay_inside(member, *args[place - 2 : place], start)
    return func, (*args[:place], start)


_AT_THE_DOOR: dict[Any, Any] = {**dict.fromkeys(_MATERIAL, _with_memory), **dict.fromkeys(_OFFSETS, _in_the_stack)}
"""What an operation is changed into before anything else."""


class Call:
    """One operation on its way down the ladder."""

    __slots__ = (
        "args",
        "batched",
        "differs",
        "dims",
        "kwargs",
        "member",
        "op",
        "plain",
        "region",
        "tensor_class",
        "values",
    )  # fmt: skip

    def __init__(self, op: Operation, region: Region | None) -> None:
        self.op = op
        self.region = region
        self.tensor_class = None if region is None else region.tensor_class
        self.batched = False
        self.differs = False
        self.member: MemberTensor | None = None
        self.plain: list[torch.Tensor] | None = None

    def unwrap(self, args: Any, kwargs: dict[str, Any]) -> None:
        """Split the arguments into stacked values and where their member axis is (0 or None)."""
        self.args = args
        if self.tensor_class is None:
            self._find_level(args, kwargs)
        values: list[Any] = []
        dims: list[Any] = []
        for arg in args:
            value, dim = self._take(arg)
            values.append(value)
            dims.append(dim)
        self.values = values
        self.dims = dims
        self.kwargs = self._take_named(kwargs) if kwargs and _tensors(kwargs) else kwargs

    def _take_named(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments, of which some are tensors. A rule knows its own; where there is none, stacked ones become
        positional, with all the others, as torch's batching and slices look at positions alone."""
        pairs = {name: self._take(arg) for name, arg in kwargs.items()}
        if self.op.rule is None and any(dim is not None for _, dim in pairs.values()) and not self.op.written:
            self.op = self.op.positional(tuple(pairs))
            self.args = (*self.args, *kwargs.values())
            self.values += [value for value, _ in pairs.values()]
            self.dims += [dim for _, dim in pairs.values()]
            return {}
        return {name: value for name, (value, _) in pairs.items()}

    def _take(self, arg: Any) -> tuple[Any, Any]:
        if type(arg) is self.tensor_class:
            if self.member is None:
                self.member = arg
            if arg._lowered and not arg._region.looking:
                unlower(arg._region, f"{self.op.name} reaches it unseen")
            if arg._differs:
                if self.op.is_view and not self.op.is_alias:
                    settle(arg)
                self.differs = True
            if arg._batched:
                self.batched = True
                return arg._inner, 0
            return arg._inner, None
        if type(arg) in (list, tuple):
            pairs = [self._take(entry) for entry in arg]
            return [value for value, _ in pairs], [dim for _, dim in pairs]
        if isinstance(arg, torch.Tensor):
            if self.plain is None:
                self.plain = []
            self.plain.append(arg)
            if arg.is_conj() or arg.is_neg():
                arg = arg.resolve_conj().resolve_neg()
        return arg, None

    def _find_level(self, args: Any, kwargs: dict[str, Any]) -> None:
        for arg in _flat([*args, *kwargs.values()]):
            if isinstance(arg, MemberTensor):
                found = arg._region
                if self.region is None or found.level > self.region.level:
                    self.region = found
        assert self.region is not None
        self.tensor_class = self.region.tensor_class

    def run(self) -> Any:
        """Take the first rung that serves."""
        op = self.op
        region = self.region
        assert region is not None
        if self.plain is not None and torch.is_grad_enabled() and any(t.requires_grad for t in self.plain):
            if self.member is None:
                return self._wrap_plain(op)
            part_ways(region, f"{op.name} meets a tensor that needs a gradient and was not taken into the call")
        if op.swaps_memory and self.member is not None:
            part_ways(region, f"{op.name} gives a tensor other memory")
        if op.is_host and self.batched:
            return ladder.agreement(op, region, self.values, self.dims, self.kwargs)
        if op.counted and self.batched:
            counted.look(op.name, region, self.args, self.values, self.dims)
        draws = op.is_random and ladder.draws_apart(op, region, self.batched, self.values, self.kwargs)
        if op.written:
            self._before_write(self.batched or draws)
        if not self.batched and not draws:
            out = self._run_shared()
            if op.is_random and region.randomness == "same":
                region.drawn()  # one draw for all
            if op.written and op.counts:
                self._count_writes()
            return self._wrap_equal(out)
        if self.differs and op.rule is None:
            self._settle_all()
        out, dims, path = ladder.descend(op, region, self.values, self.dims, self.kwargs)
        if draws:
            region.drawn()
        if op.written and op.counts:
            self._count_writes()
        if op.returned:
            return self._give_back()
        differs = path == "rule" and (self.differs or op.lone_contiguous)  # else brought into the lone order already
        source = self.args[0] if op.is_view and type(self.args[0]) is self.tensor_class else None
        return _wrap(out, dims, region, source, differs)

    def _wrap_plain(self, op: Operation) -> Any:
        """What is computed from outer tensors alone, and needs a gradient, has the lone graph and stays plain."""
        if op.is_random:
            part_ways(self.region, f"{op.name} draws for a tensor that was not taken into the call")
        return op.func(*self.values, **self.kwargs)

    def _run_shared(self) -> Any:
        if trace.active is None:
            return ladder.shared(self.op, self.values, self.kwargs)
        start = trace.clock()
        out = ladder.shared(self.op, self.values, self.kwargs)
        trace.active.note(self.op.name, "shared", "", trace.clock() - start)
        return out

    def _before_write(self, apart: bool) -> None:
        """Prepare what is about to be written: own memory a member, and a way back."""
        region = self.region
        assert region is not None
        for place in self.op.written:
            target = self._argument(place)
            if target is None:
                continue
            for tensor in target if isinstance(target, list | tuple) else (target,):
                self._prepare(tensor, apart, region)
        if apart and self.member is not None:
            self.batched = True
            self.unwrap_again()

    def unwrap_again(self) -> None:
        """Read the inner tensors anew, after a promotion replaced some."""
        pairs = [self._take(arg) for arg in self.args]
        self.values = [value for value, _ in pairs]
        self.dims = [dim for _, dim in pairs]

    def _argument(self, place: int | str) -> Any:
        if isinstance(place, str):
            return self.kwargs.get(place)
        return self.args[place] if place < len(self.args) else None

    def _prepare(self, target: Any, apart: bool, region: Region) -> None:
        if type(target) is not self.tensor_class:
            if apart and isinstance(target, torch.Tensor):
                self._refuse_shared_write(region)
            if isinstance(target, torch.Tensor):
                region.keep(target)
            return
        if apart and not target._batched:
            if target._outside or target._family is None:
                self._refuse_shared_write(region)
            promote(target)
        elif target._outside:
            if target._inner.is_inference() and not torch.is_inference_mode_enabled():
                part_ways(region, f"{self.op.name} writes an inference tensor outside of inference mode")
            region.keep(target._inner, target._root)
            if torch.is_grad_enabled() and target.is_floating_point() | target.is_complex():
                region.written.append(target)

    def _refuse_shared_write(self, region: Region) -> None:
        part_ways(region, f"{self.op.name} writes a member's value into a tensor that all members share")

    def _settle_all(self) -> None:
        """Without a rule, the memory order of the result follows from that of the arguments."""
        for arg in _flat(self.args):
            if type(arg) is self.tensor_class:
                settle(arg)
        self.unwrap_again()

    def _count_writes(self) -> None:
        """Count the write in the version of the memory, by which autograd knows that a saved tensor was changed.

        It counts for the wrapper itself, and not for the inner tensor that a composite rule may have saved; nor for
        the tensors in a list (alone, `_foreach_add_` counts in the operations it is made of).
        """
        for place in self.op.written:
            target = self._argument(place)
            several = isinstance(target, list | tuple)
            for tensor in target if several else (target,):
                if type(tensor) is self.tensor_class:
                    count_write(tensor)
                    if several:
                        increment_version(tensor)

    def _give_back(self) -> Any:
        """Return the written arguments themselves, as an in-place operation does."""
        found = tuple(self._argument(place) for place in self.op.returned if place is not None)
        return found[0] if len(found) == 1 else found

    def _wrap_equal(self, out: Any) -> Any:
        """Wrap a result that is equal in all members: fresh, or a view of what it was made from."""
        op = self.op
        if op.returned:
            return self._give_back()
        if self.member is None and op.is_view:
            return out
        return self._wrap_equal_entry(out)

    def _wrap_equal_entry(self, out: Any) -> Any:
        if isinstance(out, torch.Tensor):
            if self.op.is_view and type(self.args[0]) is self.tensor_class:
                return wrap_view(out, self.args[0])
            return wrap_unbatched(out, self.region)  # type: ignore[arg-type] # checked in run
        if isinstance(out, list | tuple):
            return type(out)(self._wrap_equal_entry(entry) for entry in out)
        return out


def _flat(values: Any) -> Any:
    for value in values:
        if type(value) in (list, tuple):
            yield from _flat(value)
        else:
            yield value


def _tensors(kwargs: dict[str, Any]) -> bool:
    return any(isinstance(value, torch.Tensor | list | tuple) for value in kwargs.values())
