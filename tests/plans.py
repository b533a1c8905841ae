"""The suite with every captured step run in one way, where the plan would choose another.

    MEMBERWISE_PLAN=graph python -m pytest ...

What a captured step gives must not depend on how it runs. A step that cannot run so (its members depend on each other)
runs as it otherwise would.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.graph import increment_version

from memberwise._torch.identity import memory_key
from memberwise._torch.versions import version
from memberwise.capture import attended, cache, chunker, ours, plan, step
from memberwise.capture.graphed import Graphed
from memberwise.capture.program import copied, once

PLANS: dict[str, Callable[[], None]] = {}
"""Ways to run, by name."""

rounds: list[str] = []
"""The way that is forced, if it sums in another order: results are then equal within rounding only."""


class AddressTape:
    """What a CUDA graph is, on a CPU: it runs the program again on whatever lies at its inputs' addresses."""

    def __init__(self, run: Any, inputs: Sequence[torch.Tensor]) -> None:
        self.run = run
        self.places = [_place(value) for value in inputs]
        copies = [copied(value) for value in inputs]
        before = list(map(version, copies))
        owners = dict(zip(map(memory_key, copies), inputs, strict=True))
        self.outputs = [owners.get(memory_key(out), out) for out in run(*copies)]
        # a graph that is made computes nothing, and counts what it would write
        increment_version([value for value, own, b in zip(inputs, copies, before, strict=True) if version(own) != b])

    def replay(self) -> None:
        """Run it again, into the same results."""
        with torch.no_grad():
            for out, now in zip(self.outputs, self.run(*map(_at, self.places)), strict=True):
                once(out).copy_(once(now))

    def follow(self) -> None:
        """A CPU is done with what was asked before."""


def graphs(run: Any, inputs: Sequence[torch.Tensor]) -> Any:
    """A program that runs as it would on a GPU."""
    return Graphed(run, AddressTape) if inputs else run


def force(name: str) -> None:
    """Let all steps that are captured in this process run so."""
    PLANS[name]()


def _graph() -> None:
    step.graphed = graphs


def _in_chunks(size: int, lanes: int) -> Callable[[], None]:
    def forced() -> None:
        plain = plan.Planner.at_once

        def at_once(self: Any) -> Any:
            with contextlib.suppress(chunker.Unfit):
                if 1 < self.whole.members > size * max(1, lanes - 1) and self.whole.can_copy(self.values):
                    return self.chunks(size, lanes)
            return plain(self)

        plan.Planner.at_once = at_once

    return forced


def _ours() -> None:
    """Kernels of our own wherever they serve, in recordings that run operation by operation, too."""
    plain = cache.Compiled.begin

    def begin(self: Any, graph: Any, inputs: Any, *args: Any) -> Any:
        return plain(self, cache.rewritten(graph, inputs), inputs, *args)

    ours._is_faster = attended._is_faster = lambda *_: True
    cache.Compiled.begin = begin
    rounds.append("ours")


PLANS |= {"graph": _graph, "one-by-one": _in_chunks(1, 1), "two-by-two": _in_chunks(2, 1), "lanes": _in_chunks(1, 2)}
PLANS["ours"] = _ours


def _place(value: torch.Tensor) -> Any:
    span = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True)) + 1
    return value.data_ptr(), span if value.numel() else 0, value.dtype, value.shape, value.stride()


def _at(place: Any) -> torch.Tensor:
    """What lies at an address now, whoever holds it."""
    pointer, span, dtype, shape, stride = place
    if not span:
        return torch.empty_strided(shape, stride, dtype=dtype)
    memory = (ctypes.c_char * (span * dtype.itemsize)).from_address(pointer)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, stride)
