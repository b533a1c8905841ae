"""Randomness of members that run one by one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NoReturn

import torch

from memberwise._torch.backward import in_backward
from memberwise._torch.dispatch import DispatchMode
from memberwise.engine.ambient import Region, refuse_to_draw_again
from memberwise.engine.draws import draws
from memberwise.engine.operation import describe
from memberwise.errors import EngineError, fail
from memberwise.generators import drawing_from, global_generators, restoring, state_of


@contextmanager
def member_stream(region: Region, index: int, *, anew: bool = False) -> Iterator[None]:
    """Member `index`'s randomness, for code that draws from the global generator.

    `anew`: the call runs now, and is no recomputation of a part of it, which finds the streams as they were.
    """
    with ExitStack() as stack:
        if region.generators is not None:
            drawing = _drawing_once if anew or region.running else drawing_from
            stack.enter_context(drawing(region.generators[index]))
        elif region.randomness == "error":
            stack.enter_context(_RefuseDraws())
        elif region.randomness == "same":
            stack.enter_context(_DrawAlike(region, first=index == 0))
            if index < region.batch_size - 1:
                stack.enter_context(restoring(global_generators()))
        yield


@contextmanager
def _drawing_once(stream: torch.Generator) -> Iterator[None]:
    """Draw from a member's stream; not in a backward pass, which would not draw the same again."""
    before = stream.get_state() if in_backward() else None
    with drawing_from(stream):
        yield
    if before is not None and not torch.equal(before, stream.get_state()):
        refuse_to_draw_again()


class LoneMode(DispatchMode):
    """What watches a run by members; control flow, which torch compiles without modes, runs in `aside()`."""

    def aside(self) -> AbstractContextManager[None]:
        return nullcontext()


class _RefuseDraws(LoneMode):
    """randomness="error" for a run by members."""

    @contextmanager
    def aside(self) -> Iterator[None]:
        before = [*map(state_of, global_generators())]
        yield
        if before != [*map(state_of, global_generators())]:
            _refuse("in control flow")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and draws(describe(func), args, kwargs or {}):
            _refuse(func)
        return func(*args, **(kwargs or {}))


def _refuse(what: Any) -> NoReturn:
    what = f"vmap: called random operation while in randomness error mode: {what}"
    fail(EngineError, "MW202", what, do="Pass randomness='different' or 'same', or generators=")


class _DrawAlike(LoneMode):
    """randomness="same" for a run by members: a generator that the function itself gives stands, at each member's first
    draw from it, where it stood at the first member's."""

    def __init__(self, region: Region, *, first: bool) -> None:
        super().__init__()
        if first:
            region.given.clear()
        self._found = region.given
        self._met: set[torch.Generator] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        generator = (kwargs or {}).get("generator")
        if generator is not None and generator not in self._met:
            self._met.add(generator)
            if generator in self._found:
                generator.set_state(self._found[generator])
            else:
                self._found[generator] = generator.get_state()
        return func(*args, **(kwargs or {}))
