"""When members part ways: undo what the half-done run changed, then run member by member.

The smallest module of a stack whose forward was running does so; without one, the whole function.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import increment_version

from memberwise._torch.checkpoint import is_of_checkpoint, recomputed_inside
from memberwise._torch.dispatch import suspended
from memberwise.engine import trace
from memberwise.engine.again import OfOne, watched_functions
from memberwise.engine.ambient import Region
from memberwise.engine.arguments import Arguments
from memberwise.engine.crossing import enter, leave
from memberwise.engine.holders import held_one_by_one
from memberwise.engine.layout import count_write
from memberwise.engine.lone_streams import member_stream
from memberwise.engine.rows import Rows
from memberwise.engine.signals import Retreat
from memberwise.engine.slots import Slots, Swap, table_of
from memberwise.engine.templates import Before, Turns
from memberwise.engine.tensor import MemberTensor
from memberwise.engine.turns import Showing, one_by_one
from memberwise.engine.values import is_own
from memberwise.errors import EngineError, fail
from memberwise.trees import holds_tensors, tree_leaves, tree_map

Swaps = list[tuple[Slots, Swap]]


def undo(region: Region, swaps: Swaps, templates: Before | None) -> None:
    """Put back what the run wrote: module places and attributes, memory that outlives it, random streams."""
    if templates is not None:
        templates.put_back()
    for slots, swap in swaps:
        slots.restore(swap)
    region.put_back()
    region.rewind_streams()


def smallest_module(signal: Retreat, arguments: Arguments, region: Region) -> nn.Module | None:
    """The smallest module of a stack that was running, and does not run by members yet; None if there is none."""
    modules = {
        module for slots in arguments.slots for module in slots.template.modules() if module is not slots.template
    }
    running = reversed(_running_modules(signal))
    return next((module for module in running if module in modules and module not in region.apart), None)


def is_lone(error: Exception) -> bool:
    """Whether a member alone raised it: then it is the user's."""
    return hasattr(error, "_raised_alone_in")


def _running_modules(signal: Retreat) -> list[nn.Module]:
    found: list[nn.Module] = []
    frame = signal.__traceback__
    while frame is not None and not (signal.whole_checkpoint and is_of_checkpoint(frame.tb_frame)):
        owner = frame.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and (not found or found[-1] is not owner):
            found.append(owner)
        frame = frame.tb_next
    return found


def warn(place: nn.Module | None, signal: Retreat) -> None:
    """Say once that the function, or a module, runs member by member."""
    what = "the function" if place is None else f"module {type(place).__name__}"
    do = "Its results are right; it is as slow as a loop there"
    trace.warn_slow("MW207", f"{what} ran member by member: {signal.reason}", do, signal.__traceback__)


@contextmanager
def modules_by_members(swaps: Swaps, region: Region) -> Iterator[None]:
    """Let the modules that are known to part ways run member by member, the rest of the call stacked."""
    replaced: list[nn.Module] = []
    owners = {module: slots for slots, _ in swaps for module in slots.template.modules()}
    for module, reason in region.apart.items():
        if module in owners and "forward" not in module.__dict__:
            slots = owners[module]
            forward = partial(_forward_by_members, module, _forwards(module, slots, region), reason, region, slots)
            object.__setattr__(module, "forward", forward)
            replaced.append(module)
    try:
        yield
    finally:
        for module in replaced:
            module.__dict__.pop("forward", None)


def _forwards(module: nn.Module, slots: Slots, region: Region) -> list[Callable[..., Any]]:
    """Each member's forward in the place of `module`."""
    for place, own in slots.variants.items():
        if table_of(*place)[place[1]] is module:
            return [variant.train(module.training).forward for variant in own]
    return [module.forward] * region.batch_size


def _forward_by_members(
    module: nn.Module,
    forwards: list[Callable[..., Any]],
    reason: str,
    region: Region,
    whole: Slots,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Inside a stacked run: this module's forward for each member alone, the results stacked again."""
    if region.turn is not None:  # inside of a larger module that runs so
        return forwards[region.turn](*args, **kwargs)
    start = trace.clock()
    with suspended(region):
        rows = _MemberRows(region)
        slots = _slots_inside(module, whole)
        given = tree_leaves((args, kwargs), objects=True)
        _prepare_undo(region, [*slots.tensors(), *((leaf, True) for leaf in given)])
        outs = []

        def into(stacked: torch.Tensor) -> torch.Tensor:
            return enter([stacked], [True], region)[0]

        own_args, own_kwargs = [*args], kwargs
        with (
            one_by_one(slots, region.batch_size, rows.of, lambda row: into(torch.stack(row)), region) as turns,
            held_one_by_one((own_args, own_kwargs), rows.own, lambda row: stack_outputs(row, into, region)) as held,
        ):
            for i in range(region.batch_size):
                turns.show(i)
                held.show(i)
                region.turn = i
                try:
                    inner = recomputed_inside(OfOne(partial(turns.again, i, whole)), instead=True)
                    with inner, rows.turn(), member_stream(region, i):
                        outs.append(forwards[i](*own_args, **own_kwargs))
                except Exception as error:
                    error._raised_alone_in = module  # type: ignore[attr-defined] # read by is_lone
                    raise
                finally:
                    region.turn = None
                turns.collect()
                held.collect()
            if (turns.leave_anything() or rows.any_written()) and _in_checkpoint():
                what = "what it writes in a checkpoint, each member's backward writes again, or does not"
                raise Retreat(what, region, whole_checkpoint=True)
        result = stack_outputs(outs, into, region)
    region.drawn()
    rows.write_back()
    if trace.active is not None:
        trace.active.note(type(module).__name__, "retreat", reason, trace.clock() - start)
    return result


def _in_checkpoint() -> bool:
    """Whether this runs in a checkpoint that the call makes: recomputed in backward, for all members at once."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals["__name__"] != "memberwise.engine.boundary":
        if is_of_checkpoint(frame):
            return True
        frame = frame.f_back
    return False


def function_by_members(func: Callable[..., Any], reason: str, args: Any, kwargs: Any) -> Any:
    """Inside a stacked run: one torch function for each member alone, differentiably, the results stacked again."""
    region = next(
        leaf._region for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, MemberTensor) or is_own(leaf)
    )
    start = trace.clock()
    outs = []
    with suspended(region):
        rows = _MemberRows(region)
        inputs, rebuild = _left((args, kwargs), rows)
        for i in range(region.batch_size):
            own_args, own_kwargs = rebuild([column[i] for column in inputs])
            with rows.turn(), member_stream(region, i):
                outs.append(func(*own_args, **own_kwargs))
        result = stack_outputs(outs, lambda stacked: enter([stacked], [True], region)[0], region)
    region.drawn()
    rows.write_back()
    if trace.active is not None:
        trace.active.note(func.__name__, "loop", reason, trace.clock() - start)
    return result


def _slots_inside(module: nn.Module, whole: Slots) -> Slots:
    """The slots of a module, a part of `whole`, that shows member tensors and values, in attributes too."""
    slots = Slots(module)
    slots.find_members()
    inside = {*module.modules()}
    slots.variants = {place: own for place, own in whole.variants.items() if place[0] in inside}
    return slots


def _prepare_undo(region: Region, tensors: list[tuple[Any, bool]]) -> None:
    """A later module of this call may retreat too: what is written member by member, no dispatch sees."""
    region.keep_streams(draws=False)
    for tensor, _ in tensors:
        if isinstance(tensor, MemberTensor) and tensor._outside:
            region.keep(tensor._inner, tensor._root)


class _MemberRows:
    """The rows of member tensors, plain; what is written to them reaches the member tensor, with its gradient."""

    def __init__(self, region: Region) -> None:
        self.region = region
        self._rows = Rows()
        self._of: dict[int, tuple[torch.Tensor, torch.Tensor, Any, Sequence[torch.Tensor]]] = {}

    def of(self, member: torch.Tensor) -> Sequence[torch.Tensor]:
        if id(member) not in self._of:
            base = leave(torch.ops.aten.alias(member), self.region)  # not the inner tensor itself: it has no history
            self._of[id(member)] = member, base, base.grad_fn, self._rows.of(base, whole=_outside(member))
        return self._of[id(member)][3]

    def own(self, leaf: Any, member: int) -> Any:
        if is_own(leaf):
            return leaf._values[member]
        return self.of(leaf)[member] if isinstance(leaf, MemberTensor) else leaf

    def turn(self) -> AbstractContextManager[None]:
        return self._rows.turn()

    def any_written(self) -> bool:
        return any(self._rows.written(base) for _, base, _, _ in self._of.values())

    def write_back(self) -> None:
        self._rows.write_back()
        for member, base, node, _ in self._of.values():
            if not self._rows.written(base):
                continue
            if base.grad_fn is not node:
                member.copy_(enter([base], [True], self.region)[0])
            elif isinstance(member, MemberTensor):
                count_write(member)
                increment_version(member)


def _outside(member: Any) -> torch.Tensor | None:
    """The stack's parameter that a member tensor stands for, if that is a leaf."""
    own = getattr(member, "_is_param", False) and member._outside and member._root is None
    return member._inner if own and member._inner.is_leaf else None


def _left(tree: Any, rows: _MemberRows) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """Each member tensor of a structure as M plain ones, and a way to build the structure for one member."""
    columns: list[Any] = []

    def note(leaf: Any) -> Any:
        if is_own(leaf):
            columns.append(leaf._values)
        elif isinstance(leaf, MemberTensor):
            columns.append(rows.of(leaf))
        return leaf

    tree_map(note, tree)

    def rebuild(own: list[Any]) -> Any:
        values = iter(own)
        return tree_map(lambda leaf: next(values) if is_own(leaf) or isinstance(leaf, MemberTensor) else leaf, tree)

    return columns, rebuild


def by_members(func: Callable[..., Any], arguments: Arguments, out_dims: Any, region: Region, reason: str) -> Any:
    """The whole function for each member alone, as a loop would; results stacked at `out_dims`."""
    start = trace.clock()
    rows = Rows()
    columns = [
        rows.of(leaf, dim) if dim is not None and isinstance(leaf, torch.Tensor) else None
        for leaf, dim in zip(arguments.leaves, arguments.dims, strict=True)
    ]
    outs: list[Any] = []
    with ExitStack() as stack, watched_functions():
        solos = {
            k: stack.enter_context(one_by_one(leaf, region.batch_size, rows.of, torch.stack))
            for k, leaf in enumerate(arguments.leaves)
            if isinstance(leaf, Slots)
        }
        templates = None if solos else Turns(region, rows, stack)
        for i in range(region.batch_size):
            if templates is not None:
                templates.show(i)
            own = [
                leaf if column is None else column[i] for leaf, column in zip(arguments.leaves, columns, strict=True)
            ]
            for k, solo in solos.items():
                solo.show(i)
                own[k] = solo.slots.template
            args, kwargs = arguments.build(own)
            with rows.turn(), member_stream(region, i, anew=True), recomputed_inside(_again(solos, templates, i)):
                outs.append(func(*args, **kwargs))
            for shown in (*solos.values(), templates):
                if shown is not None:
                    shown.collect()
    rows.write_back()
    if trace.active is not None:
        trace.active.note(trace.name_of(func), "retreat", reason, trace.clock() - start)
    return _stack_at(outs, out_dims)


def _again(solos: dict[int, Showing], templates: Turns | None, i: int) -> Callable[[], AbstractContextManager[Any]]:
    """Member i in place in all stacks, or templates, for checkpoints that its run makes."""

    @contextmanager
    def member() -> Iterator[None]:
        with ExitStack() as stack:
            for solo in solos.values():
                stack.enter_context(solo.again(i, solo.slots))
            for template in () if templates is None else templates.shown():
                stack.enter_context(template.again(i))
            yield

    return OfOne(member)


def stack_outputs(outs: list[Any], finish: Callable[[torch.Tensor], Any], region: Region | None = None) -> Any:
    """One structure from the members' outputs; tensors are stacked, other values kept where all agree."""
    columns = [tree_leaves(out) for out in outs]
    if any(len(column) != len(columns[0]) for column in columns):
        _cannot_stack("the members return structures of different size", region)
    rows = iter(zip(*columns, strict=True))
    return tree_map(lambda _: _stack_row(list(next(rows)), finish, region), outs[0])


def _stack_row(row: list[Any], finish: Callable[[torch.Tensor], Any], region: Region | None) -> Any:
    first = row[0]
    if not isinstance(first, torch.Tensor):
        if holds_tensors(first):
            return _stack_objects(row, finish, region)
        same = all(type(value) is type(first) and bool(value == first) for value in row)
        return first if same else row
    if any(value.is_nested for value in row):
        _cannot_stack("the members return nested tensors, which are not stacked", region)
    if first.layout not in _STACKABLE:
        _cannot_stack(f"the members return tensors of layout {first.layout}, which torch.stack does not take", region)
    if any(value.shape != first.shape for value in row):
        shapes = sorted({tuple(value.shape) for value in row})
        _cannot_stack(f"the members return tensors of shapes {shapes}", region)
    return finish(torch.stack(row))


def _stack_objects(row: list[Any], finish: Callable[[torch.Tensor], Any], region: Region | None) -> Any:
    """Objects that hold tensors (caches), as one that holds them stacked."""
    columns = [tree_leaves(value, objects=True) for value in row]
    if any(len(column) != len(columns[0]) for column in columns):
        _cannot_stack(f"the members return {type(row[0]).__name__}s that hold different things", region)
    held = iter(zip(*columns, strict=True))
    return tree_map(lambda _: _stack_row(list(next(held)), finish, region), row[0], objects=True)


def _cannot_stack(what: str, region: Region | None) -> None:
    if region is not None:
        raise Retreat(what, region)
    do = "Return dense tensors of one shape, or call the members one by one: [member(...) for member in stack]"
    fail(EngineError, "MW203", what, do=do)


_STACKABLE = (torch.strided, torch.sparse_coo)


def _stack_at(outs: list[Any], out_dims: Any) -> Any:
    from memberwise.engine.outputs import leaf_dims

    pairs = zip(leaf_dims("func", outs[0], out_dims), tree_leaves(outs[0]), strict=True)
    held = ((dim, one) for dim, leaf in pairs for one in tree_leaves(leaf, objects=True))  # of an object all alike
    dims = iter([dim for dim, one in held if isinstance(one, torch.Tensor)])

    def place(stacked: torch.Tensor) -> Any:
        dim = next(dims)
        return stacked[0] if dim is None else stacked.movedim(0, dim)

    return stack_outputs(outs, place)
