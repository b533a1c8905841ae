"""A program for a few members that serves for all: called chunk after chunk, or for one chunk on each core."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
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

    def several(self, steps: Sequence[Sequence[torch.Tensor]], fleeting: Container[int] = ()) -> list[Sequence[Any]]:
        """What it returns for each of several steps; one chunk after the other goes through all of them.

        Results in `fleeting` matter of the last step only. All steps write them to the same memory, which lies in the
        caches then while a chunk goes through.
        """
        passage = self.passage(steps, fleeting)
        passage.run(0, passage.count)
        return passage.made

    def passage(self, steps: Sequence[Sequence[torch.Tensor]], fleeting: Container[int]) -> Passage:
        """The same, before any chunk has run."""
        last = [result.like.empty() for result in self.results]
        made = [[last[k] if k in fleeting else own.like.empty() for k, own in enumerate(self.results)] for _ in steps]
        cuts: dict[tuple[int, int], Sequence[torch.Tensor]] = {}
        cut = [self._cut(inputs, into, cuts) for inputs, into in zip(steps, made, strict=True)]
        return Passage(self, made, cut, max(map(len, cuts.values())))

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


class Passage(NamedTuple):
    """Chunks and the steps that each is taken through.

    Attributes:
        chunks: how they run.
        made: what each step returns; it is there when all of them have run.
        cut: for each step, what the program is called with.
        count: how many chunks there are, with that of members left over.
    """

    chunks: Chunks
    made: list[Sequence[Any]]
    cut: list[list[Pieces]]
    count: int

    @property
    def full(self) -> int:
        """How many chunks are not of members left over."""
        return self.count - (self.chunks.rest is not None)

    @property
    def left(self) -> float:
        """How many members are left over, as a part of a chunk's."""
        if self.full == self.count:
            return 0.0
        pieces = next(one for one in self.cut[0] if not isinstance(one, torch.Tensor))
        return pieces[-1].numel() / max(1, pieces[0].numel())

    def run(self, begin: int, end: int) -> None:
        """Take these chunks through all steps: full rounds of them in lanes, then the others one by one."""
        lanes = self.chunks.lanes
        full = min(end, self.full) - begin
        full -= full % lanes
        if lanes > 1 and full:
            in_lanes(lanes, lambda k: self._through(begin + k), full)
            begin += full
        for chunk in range(begin, end):
            self._through(chunk)

    def _through(self, chunk: int) -> None:
        rest = self.chunks.rest
        run = rest if rest is not None and chunk == self.full else self.chunks.run
        for pieces in self.cut:
            run(*[one if isinstance(one, torch.Tensor) else one[chunk] for one in pieces])


def several(
    run: Run, steps: Sequence[Sequence[torch.Tensor]], fleeting: Container[int] = ()
) -> list[Sequence[torch.Tensor]]:
    """What a program returns for each of several steps; of results in `fleeting`, what the last one does."""
    if isinstance(run, Chunks):
        return run.several(steps, fleeting)
    found: list[Sequence[Any]] = []
    for inputs in steps:
        if found:
            found[-1] = [None if k in fleeting else one for k, one in enumerate(found[-1])]
        found.append(run(*inputs))
    return found
