"""A program for a few members that serves for all: called chunk after chunk, or for one chunk on each core."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from memberwise.capture.lanes import in_lanes
from memberwise.capture.program import Like

Run = Callable[..., Sequence[torch.Tensor]]
Pieces = torch.Tensor | Sequence[torch.Tensor]


class Source(NamedTuple):
    """Where an input of the program for few comes from: which of those for all, and its member axis (None: not cut)."""

    index: int
    dim: int | None


class Result(NamedTuple):
    """What a result for all members is like, and its member axis."""

    like: Like
    dim: int


@dataclass(eq=False)
class Chunks:
    """A program for few members that serves for all, chunk after chunk; called like the program for all.

    Attributes:
        run: the program for `size` members. After its inputs it takes what it writes its results to.
        rest: the program for those left over, or None.
        sources: of its inputs.
        results: for all members.
        lanes: how many chunks run at a time. What is no full round of them runs chunk after chunk, on all cores.
    """

    run: Run
    rest: Run | None
    size: int
    sources: Sequence[Source]
    results: Sequence[Result]
    lanes: int = 1

    def __call__(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """What the program for all returns; state is written in place."""
        (made,) = self.several([inputs])
        return made

    def several(self, steps: Sequence[Sequence[torch.Tensor]]) -> list[list[torch.Tensor]]:
        """What it returns for each of several steps; one chunk after the other goes through all of them."""
        made = [[result.like.empty() for result in self.results] for _ in steps]
        cuts: dict[tuple[int, int], Sequence[torch.Tensor]] = {}
        cut = [self._cut(inputs, into, cuts) for inputs, into in zip(steps, made, strict=True)]
        count = max(map(len, cuts.values()))

        def through(chunk: int) -> None:
            run = self.rest if self.rest is not None and chunk == count - 1 else self.run
            for pieces in cut:
                run(*[one if isinstance(one, torch.Tensor) else one[chunk] for one in pieces])

        for chunk in range(self._aside(through, count), count):
            through(chunk)
        return made

    def _aside(self, through: Callable[[int], None], count: int) -> int:
        """Run full rounds of chunks in lanes; how many chunks that are."""
        full = count - (self.rest is not None)
        full -= full % self.lanes
        if self.lanes == 1 or not full:
            return 0
        in_lanes(self.lanes, through, full)
        return full

    def _cut(self, inputs: Sequence[torch.Tensor], into: Sequence[torch.Tensor], cuts: Any) -> list[Pieces]:
        """What the program is called with, as a piece a chunk where it has members; each tensor is cut once."""

        def pieces(value: torch.Tensor, dim: int | None) -> Pieces:
            if dim is None:
                return value
            if (id(value), dim) not in cuts:
                cuts[id(value), dim] = value.split(self.size, dim)
            return cuts[id(value), dim]  # type: ignore[no-any-return] # each of them is such

        own = [pieces(inputs[source.index], source.dim) for source in self.sources]
        return own + [pieces(one, result.dim) for one, result in zip(into, self.results, strict=True)]


def several(run: Run, steps: Sequence[Sequence[torch.Tensor]]) -> Sequence[Sequence[torch.Tensor]]:
    """What a program returns for each of several steps."""
    return run.several(steps) if isinstance(run, Chunks) else [run(*inputs) for inputs in steps]
