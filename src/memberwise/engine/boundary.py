"""vmap: in, through, and out. The first of the four files that a member's tensor passes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch

from memberwise._torch.checkpoint import StopRecomputation, recomputed_inside
from memberwise._torch.dispatch import has_tangents, mode_depth, push_mode
from memberwise._torch.dynamo import uncompiled
from memberwise._torch.functions import leave_functions
from memberwise.engine import again, grouped, lowering, retreat, trace
from memberwise.engine.ambient import Region
from memberwise.engine.arguments import Arguments, mapped
from memberwise.engine.memory import keep_freed
from memberwise.engine.outputs import bad, check_out_dims, outputs
from memberwise.engine.parted import Place, apart, memory_of, signature_of
from memberwise.engine.parting import in_parts, parts
from memberwise.engine.signals import Retreat, Unlowered
from memberwise.engine.slots import Slots
from memberwise.engine.templates import Before
from memberwise.engine.written import hand_over
from memberwise.errors import EngineError, MemberwiseError, fail
from memberwise.generators import global_generators, restoring


@uncompiled
def vmap(
    func: Callable[..., Any],
    in_dims: int | tuple[Any, ...] = 0,
    out_dims: int | tuple[int | None, ...] | None = 0,
    randomness: str = "error",
    *,
    chunk_size: int | None = None,
    generators: Sequence[torch.Generator] | None = None,
) -> Callable[..., Any]:
    """Map `func`, written for one member, over all M: `torch.vmap` in which each member runs as it would alone.

    Shapes: an input with `in_dims` d has M at d; `func` sees the other dimensions. An output gets M at its
    `out_dims`. A `Stack` may be an argument (its `in_dims` is 0), and `each(x)` marks a leaf, in kwargs too.

    Args:
        func: takes and returns any structure of tensors and other values; the latter are returned as they are.
        in_dims: as in `torch.vmap`: an int, None, or a nested tuple of them like the inputs.
        out_dims: as in `torch.vmap`.
        randomness: "error", "different" (each member draws its own) or "same".
        chunk_size: run at most so many members at once.
        generators: one `torch.Generator` a member: member i draws as its lone run would. Implies "different".

    Raises:
        ArgumentError: (a ValueError) the inputs and `in_dims` do not fit [MW201].
        EngineError: (a RuntimeError) a draw under randomness="error" [MW202].

    >>> import torch
    >>> vmap(torch.dot)(torch.ones(3, 5), torch.ones(3, 5))
    tensor([5., 5., 5.])
    """
    if randomness not in ("error", "different", "same"):
        what = f"vmap: only 'error', 'different' and 'same' are allowed values for randomness, got {randomness!r}"
        fail(EngineError, "MW201", what)
    if chunk_size is not None and chunk_size <= 0:
        bad(f"vmap: chunk_size should be None or greater than 0. (got {chunk_size})")
    name = _name(func)

    @functools.wraps(func, updated=())
    def mapped_func(*args: Any, **kwargs: Any) -> Any:
        check_out_dims(name, out_dims)
        if any([type(arg) in grouped.classes for arg in args]):

            def of_part(members: Sequence[int], *own: Any, **named: Any) -> Any:
                streams = _of_part(generators, members)
                return vmap(func, in_dims, out_dims, randomness, chunk_size=chunk_size, generators=streams)(
                    *own, **named
                )

            return grouped.over_parts(of_part, args, kwargs, in_dims, out_dims, f"vmap({name})")
        arguments = mapped(name, in_dims, args, kwargs)
        streams = _check_generators(generators, arguments.size)
        return run(func, arguments, out_dims, randomness, streams, chunk_size)

    return uncompiled(mapped_func)


def _of_part(generators: Any, members: Sequence[int]) -> Any:
    return None if generators is None else [generators[member] for member in members]


_NOTHING = nullcontext()


def run(
    func: Callable[..., Any],
    arguments: Arguments,
    out_dims: Any = 0,
    randomness: str = "error",
    generators: Sequence[torch.Generator] | None = None,
    chunk_size: int | None = None,
) -> Any:
    """Run `func` for all members of `arguments`, in chunks of members if asked to."""
    keep_freed()
    with _locked(arguments.slots):
        return _run_parts(func, arguments, out_dims, randomness, generators, chunk_size)


def _locked(stacks: list[Slots]) -> AbstractContextManager[Any]:
    """One thread at a time shows members in a stack's template."""
    if len(stacks) < 2:
        return stacks[0].lock if stacks else _NOTHING
    locks = ExitStack()
    for slots in sorted(stacks, key=id):
        locks.enter_context(slots.lock)
    return locks


def _run_parts(
    func: Callable[..., Any], arguments: Arguments, out_dims: Any, randomness: str, generators: Any, chunk_size: Any
) -> Any:
    if generators is None:
        generators = arguments.streams()
    mode = "different" if generators is not None else randomness
    found = parts(arguments, chunk_size)
    if found is None:
        return _run_chunk(func, arguments, out_dims, mode, generators)

    def run_part(own: Arguments, members: Sequence[int]) -> Any:
        streams = None if generators is None else [generators[i] for i in members]
        alike = mode == "same" and members is not found[-1].members  # what the first part draws, the others draw too
        with restoring(global_generators() if alike else []):
            return _run_chunk(func, own, out_dims, mode, streams)

    return in_parts(run_part, found, arguments, out_dims, _name(func))


def _run_chunk(func: Callable[..., Any], arguments: Arguments, out_dims: Any, randomness: str, generators: Any) -> Any:
    region = Region(arguments.size, len(again.local.regions), randomness, generators)
    why = "forward-mode differentiation goes around the call" if has_tangents() else arguments.strangers()
    if why is not None:
        signal = Retreat(why, region)
        retreat.warn(None, signal)
        return retreat.by_members(func, arguments, out_dims, region, signal.reason)
    region.apart = apart(func, arguments, randomness)
    if None in region.apart:
        return retreat.by_members(func, arguments, out_dims, region, region.apart[None])
    parted: dict[Place, str] = {}
    result = _run_until_none_parts(func, arguments, out_dims, region, parted)
    if parted:
        memory, signature = memory_of(func, arguments), signature_of(func, arguments, randomness)
        for place, reason in parted.items():
            memory.note(place, signature, reason)
    return result


def _run_until_none_parts(
    func: Callable[..., Any], arguments: Arguments, out_dims: Any, region: Region, parted: dict[Place, str]
) -> Any:
    """Stacked, but for the places where members part ways, which are found on the way and put into `parted`."""
    raised = arguments.slots[0].raised if arguments.slots else lowering.raised
    region.lowers = lowering.may_lower(region) and func not in raised and not region.apart
    again_raised = False
    while None not in parted:
        start = trace.clock()
        try:
            result = _run_stacked(func, arguments, out_dims, region)
            if again_raised:
                raised.add(func)
            return result
        except Unlowered as signal:
            if signal.region is not region:
                raise
            again_raised, region.lowers = True, False
        except Retreat as signal:
            if signal.region is not region:
                raise
            region.lowers = False
            place = retreat.smallest_module(signal, arguments, region)
            parted[place] = region.apart[place] = signal.reason
            retreat.warn(place, signal)
            if trace.active is not None:
                name = trace.name_of(func if place is None else type(place))
                trace.active.note(name, "undone", signal.reason, trace.clock() - start)
    return retreat.by_members(func, arguments, out_dims, region, parted[None])


def _run_stacked(func: Callable[..., Any], arguments: Arguments, out_dims: Any, region: Region) -> Any:
    """All members at once; on a Retreat, everything it changed is undone."""
    outer = again.local.regions
    inside, swaps = arguments.enter(region)
    templates = None if arguments.slots else Before()
    region.start()
    again.local.regions = (*outer, region)
    functions = again.watch_functions()
    region.depth = mode_depth()
    push_mode(region)
    try:
        try:
            by_members = functools.partial(_by_members, swaps, region)
            surroundings = again.Surroundings(region, swaps, by_members)
            with by_members(), recomputed_inside(surroundings), templates or _NOTHING:
                args, kwargs = arguments.build(inside)
                out = func(*args, **kwargs)
            region.check_global_streams(at_the_end=True)
        finally:
            again.take_off(region)
            if functions:
                leave_functions()
            again.local.regions = outer
        if region.written:
            hand_over(region)
        result = outputs(out, out_dims, region, _name(func))
        for slots, swap in swaps:
            slots.leave(swap, region)
    except Retreat:
        retreat.undo(region, swaps, templates)
        raise
    except StopRecomputation:  # a checkpoint around this call has what it needs: what was written stays, as alone
        for slots, swap in swaps:
            slots.leave(swap, region)
        raise
    except Exception as error:
        retreat.undo(region, swaps, templates)
        if isinstance(error, MemberwiseError) or retreat.is_lone(error):
            raise
        if region.lowers:
            raise Unlowered(f"{type(error).__name__} with lowered tensors", region) from error
        what = f"{type(error).__name__} in the stacked run: {error}"
        raise Retreat(what, region).with_traceback(error.__traceback__) from error
    except BaseException:
        for slots, swap in swaps:
            slots.restore(swap)
        raise
    finally:
        region.end()
        region.release_gradients()
    return result


def _by_members(swaps: retreat.Swaps, region: Region) -> AbstractContextManager[None]:
    """Where modules are known to part ways, they run member by member."""
    return retreat.modules_by_members(swaps, region) if region.apart else _NOTHING


def _check_generators(generators: Any, size: int) -> Any:
    if generators is not None and len(generators) != size:
        bad(f"vmap: got {len(generators)} generators for {size} members; give one a member")
    return generators


def _name(func: Any) -> str:
    if isinstance(func, functools.partial):
        return f"functools.partial({_name(func.func)}, ...)"
    return getattr(func, "__name__", None) or repr(func)
