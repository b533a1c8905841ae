"""Inside a call once more, for code that autograd runs later: a user's backward, a checkpoint's recomputation."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from memberwise._torch.checkpoint import surroundings
from memberwise._torch.dispatch import mode_depth, pop_mode, push_mode
from memberwise._torch.functions import enter_functions, leave_functions, users_functions
from memberwise._torch.versions import set_versions, version
from memberwise.engine import lowering
from memberwise.engine.ambient import Region
from memberwise.engine.closures import function_arguments
from memberwise.engine.slots import Slots, Swap
from memberwise.engine.tensor import MemberTensor


class _Local(threading.local):
    regions: tuple[Region, ...] = ()


local = _Local()
"""The regions that run in this thread, outermost first."""


@contextmanager
def inside(region: Region) -> Iterator[None]:
    """`region` is the innermost call of this thread within the block."""
    outer = local.regions
    if region in outer:
        yield
        return
    local.regions = (*outer, region)
    region.depth = mode_depth()
    push_mode(region)
    try:
        yield
    finally:
        take_off(region)
        local.regions = outer
        if not region.running:
            region.release_gradients()


def take_off(region: Region) -> None:
    """Pop the region's mode, and any that a failed call left above it."""
    while pop_mode() is not region:
        pass


def watch_functions() -> bool:
    """From here on, until `leave_functions`, users' Functions run their backward as their forward ran; False if there
    are none."""
    known = users_functions()
    if known:
        enter_functions(_current, function_arguments)
    return known


@contextmanager
def watched_functions() -> Iterator[None]:
    """`watch_functions` within the block."""
    watched = watch_functions()
    try:
        yield
    finally:
        if watched:
            leave_functions()


def _current(modules: bool) -> Callable[[], AbstractContextManager[Any]] | None:
    """What runs a user's backward inside the call that runs now, its members in place if it may call `modules`.

    None where no call runs. To put members in place takes a microsecond for each of their tensors.
    """
    if modules and surroundings():
        return partial(_within, surroundings())
    return partial(inside, local.regions[-1]) if local.regions else None


@contextmanager
def _within(made_in: tuple[Callable[[], AbstractContextManager[Any]], ...]) -> Iterator[None]:
    with ExitStack() as stack:
        for around in made_in:
            stack.enter_context(around())
        yield


class Surroundings:
    """What a checkpoint made in a call is recomputed in: its mode, its members in place, its streams as they were.

    Called, it gives the same for a Function's backward, for which streams stand where they do.

    `apart()` lets the modules that part ways run by members, as they did.
    """

    __slots__ = ("apart", "region", "swaps")

    def __init__(
        self, region: Region, swaps: list[tuple[Slots, Swap]], apart: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self.region = region
        self.swaps = swaps
        self.apart = apart

    def given(self, inputs: tuple[Any, ...]) -> None:
        """A checkpoint keeps the graph of its inputs, so that it has to lie in the member tensors."""
        lowering.raise_for_function(inputs)

    def recorded(self, frame: bool) -> Callable[[], AbstractContextManager[Any]]:
        """Remember where the members' streams stand now."""
        states = [generator.get_state() for generator in self.region.generators or ()]
        return partial(self._again, states)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if self.region in local.regions:
            yield
            return
        with ExitStack() as stack:
            for slots, swap in self.swaps:
                stack.enter_context(slots.again(swap, self.region))
            with inside(self.region), self.apart():
                yield

    @contextmanager
    def _again(self, states: list[torch.Tensor]) -> Iterator[None]:
        generators = self.region.generators or ()
        now = [generator.get_state() for generator in generators]
        with ExitStack() as stack:
            for slots, swap in self.swaps:
                stack.enter_context(slots.again(swap, self.region))
            _set(generators, states)
            try:
                with inside(self.region), self.region.streams_as_recorded(), self.apart():
                    yield
            finally:
                _set(generators, now)


class OfOne:
    """What a checkpoint is recomputed in that one of several members makes which run one by one.

    Rows of one tensor share their count of writes: what a recomputation writes into the checkpoint's inputs counts for
    this member alone, lest autograd refuse the others'. Its own second recomputation is refused, as alone.
    """

    __slots__ = ("_around",)

    def __init__(self, around: Callable[[], AbstractContextManager[Any]]) -> None:
        self._around = around

    def __call__(self) -> AbstractContextManager[Any]:
        return self._around()

    def recorded(self, frame: bool) -> Callable[[], AbstractContextManager[Any]]:
        """One checkpoint; a frame keeps its inputs, whatever is written to them."""
        return self._around if frame else _Counted(self._around)


class _Counted:
    """One checkpoint of one member: called, what it is recomputed in."""

    __slots__ = ("_around", "_before", "_inputs", "_written")

    def __init__(self, around: Callable[[], AbstractContextManager[Any]]) -> None:
        self._around = around
        self._inputs: list[torch.Tensor] = []
        self._before: list[int] = []
        self._written = False

    def __call__(self) -> AbstractContextManager[Any]:
        return self._around()

    def began(self, args: tuple[Any, ...]) -> None:
        """Note the counts of what it is recomputed from."""
        if self._written:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                "the recomputation of a checkpoint has written its own input, and is run again"
            )
        self._inputs = [arg for arg in args if isinstance(arg, torch.Tensor) and not isinstance(arg, MemberTensor)]
        self._before = [*map(version, self._inputs)]

    def finished(self) -> None:
        """Set the counts back, and remember whether it has written."""
        if self._before != [*map(version, self._inputs)]:
            self._written = True
            set_versions(self._inputs, self._before)
        self._inputs, self._before = [], []


def _set(generators: Any, states: list[torch.Tensor]) -> None:
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
