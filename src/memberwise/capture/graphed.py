"""A program on a GPU as one CUDA graph: its kernels are launched together, at the price of one launch.

A CUDA graph knows addresses, no tensors. So an input must lie where it lay when the graph was made, and a result lies
where the last one did. Both hold for most: state is written in place, and what a step returned or left as a gradient is
gone by the next. Which inputs and results are of the other kind is seen when it happens, and those are copied from then
on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch.autograd.graph import increment_version

from memberwise._torch.identity import holders, memory_key
from memberwise._torch.versions import version
from memberwise.capture.chunks import Run
from memberwise.capture.program import copied, once


class Tape(Protocol):
    """What a program did in one run, to be done again at the same addresses.

    Attributes:
        outputs: its results; each replay fills them anew.
    """

    outputs: Sequence[torch.Tensor]

    def replay(self) -> None:
        """Do it again."""

    def follow(self) -> None:
        """Let what is asked of the device next come after the last replay."""


class CudaTape:
    """A CUDA graph of one run. Nothing is computed before the first replay."""

    def __init__(self, run: Run, inputs: Sequence[torch.Tensor]) -> None:
        self.device = inputs[0].device
        self.stream = torch.cuda.current_stream(self.device)
        self.graph = torch.cuda.CUDAGraph()
        # other threads may load data meanwhile
        with torch.cuda.device(self.device), torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.outputs = run(*inputs)

    def replay(self) -> None:
        """Launch it."""
        self.graph.replay()

    def follow(self) -> None:
        """Where the current stream is another than at the last replay, it waits for that."""
        now = torch.cuda.current_stream(self.device)
        if now != self.stream:
            now.wait_stream(self.stream)
            self.stream = now


class Graphed:
    """A program as one graph, called like the program.

    The first call runs the program as it is, which loads its kernels. The second makes the graph. It is made anew where
    an input lies elsewhere than before, or somebody still holds a result: from then on that input is copied before each
    replay (and back, if the program writes it), that result after it.

    Args:
        run: the program.
        tape: makes a tape of a run.

    Attributes:
        made: how many graphs were made.
        why_not: why the program cannot be a graph; "" if it can.
    """

    def __init__(self, run: Run, tape: Callable[[Run, list[torch.Tensor]], Tape] = CudaTape) -> None:
        self.run = run
        self.made = 0
        self.why_not = ""
        self._tape_of = tape
        self._tape: Tape | None = None
        self._warm = False
        self._moving: dict[int, torch.Tensor] = {}  # the graph's own memory, for inputs that lie elsewhere each time
        self._held: set[int] = set()  # results that are held for longer than a call
        self._changed: set[int] = set()
        self._staying: list[int] = []
        self._addresses: list[int] = []
        self._holders: list[int] = []

    def __call__(self, *inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        """What the program returns; what it writes is written in place."""
        if not self._warm or self.why_not:
            self._warm = True
            return self.run(*inputs)
        if not self._stands_for(inputs) and not self._make(inputs):
            return self.run(*inputs)
        return self._replayed(inputs)

    def _stands_for(self, inputs: Sequence[torch.Tensor]) -> bool:
        """Whether all lies where it did, and no result is held; else notes what does not, and what is."""
        if self._tape is None:
            return False
        moved = [k for k, own in zip(self._staying, self._addresses, strict=True) if inputs[k].data_ptr() != own]
        held = {k for k, value in enumerate(self._tape.outputs) if holders(value) > self._holders[k]} - self._held
        self._moving |= {k: copied(inputs[k]) for k in moved}
        self._held |= held
        return not moved and not held

    def _make(self, inputs: Sequence[torch.Tensor]) -> bool:
        """Make a graph for these inputs; whether there can be one."""
        own = [self._moving.get(k, value) for k, value in enumerate(inputs)]
        versions = list(map(version, own))
        self._tape = None  # its memory may serve the next
        try:
            tape = self._tape_of(self.run, own)
        except Exception as error:  # a program may wait for its device, which no graph does
            self.why_not = str(error).strip().splitlines()[0]
            return False
        if not {*map(memory_key, own)}.isdisjoint(map(memory_key, tape.outputs)):
            self.why_not = "a result lies in the memory of an input"
            return False
        self.made += 1
        self._tape = tape
        self._changed = {k for k, before in enumerate(versions) if version(own[k]) != before}
        self._staying = [k for k in range(len(own)) if k not in self._moving]
        self._addresses = [inputs[k].data_ptr() for k in self._staying]
        self._holders = [holders(value) for value in tape.outputs]
        return True

    def _replayed(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        tape = self._tape
        assert tape is not None  # made, or stands
        tape.follow()
        for k, own in self._moving.items():
            once(own).copy_(once(inputs[k]))
        tape.replay()
        for k in self._changed & self._moving.keys():
            once(inputs[k]).copy_(once(self._moving[k]))
        increment_version([inputs[k] for k in self._changed - self._moving.keys()])
        return [copied(value) if k in self._held else value.detach() for k, value in enumerate(tape.outputs)]


def graphed(run: Run, inputs: Sequence[torch.Tensor]) -> Run:
    """The program as a graph if all its inputs are on one GPU; else as it is."""
    devices = {value.device for value in inputs}
    return Graphed(run) if [device.type for device in devices] == ["cuda"] else run
