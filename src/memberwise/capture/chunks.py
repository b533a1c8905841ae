"""A step for a few members at a time: one program, called for one chunk of members after the other.

A step that treats members alike can be recorded for a few of them, and that program run on views of the state. Whether
a step is of that kind is not proved but tried: it is recorded on copies of the first members' state, and what the
program for few gives, chunk after chunk on copies of everything, must be what the program for all gives. What is cut
along which axis shows in the shapes of the two.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from memberwise._torch.identity import memory_key
from memberwise.capture.excerpt import Excerpt, Stacked
from memberwise.capture.program import Program, copied
from memberwise.testing.tolerance import tolerance

Run = Callable[..., Sequence[torch.Tensor]]

NOISE = 10
"""How many times as much as after a nudge of all inputs in their last bit the results of chunks may differ."""


class Unfit(Exception):
    """Why a step cannot run in chunks of members."""


class Unpromising(Exception):
    """Chunks are not worth their compilation."""


class Part(NamedTuple):
    """A recording for a few members, to be compiled.

    Attributes:
        graph: what it computes.
        inputs: what it is called with, of the first members.
        sources: as `Chunks` has them.
        trial: copies of the inputs that it may write.
    """

    graph: fx.GraphModule
    inputs: list[torch.Tensor]
    sources: list[tuple[int, int | None]]
    trial: Callable[[], list[torch.Tensor]]


class Chunks:
    """A program for few members that serves for all, chunk after chunk; called like the program for all.

    Attributes:
        run: the program for `size` members.
        rest: the program for those left over, or None.
        sources: for each of its inputs: the position among the inputs for all, and the member axis (None: not cut).
        axes: the member axis of each output.
    """

    def __init__(self, run: Run, rest: Run | None, size: int, sources: list[tuple[int, int | None]]) -> None:
        self.run = run
        self.rest = rest
        self.size = size
        self.sources = sources
        self.axes: list[int] = []

    def parts(self, *inputs: torch.Tensor) -> list[Sequence[torch.Tensor]]:
        """The outputs of each chunk; state is written in place."""
        (outputs,) = self._parts([inputs])
        return outputs

    def _parts(self, steps: Sequence[Sequence[torch.Tensor]]) -> list[list[Sequence[torch.Tensor]]]:
        """The outputs of each step's chunks; one chunk after the other goes through all steps."""
        cuts: dict[tuple[int, int], Sequence[torch.Tensor]] = {}
        cut = [[self._cut(inputs[k], dim, cuts) for k, dim in self.sources] for inputs in steps]
        count = max(len(pieces) for pieces in cuts.values())
        outputs: list[list[Sequence[torch.Tensor]]] = [[] for _ in steps]
        for chunk in range(count):
            run = self.rest if self.rest is not None and chunk == count - 1 else self.run
            for pieces, found in zip(cut, outputs, strict=True):
                found.append(run(*[one if isinstance(one, torch.Tensor) else one[chunk] for one in pieces]))
        return outputs

    def _cut(self, value: torch.Tensor, dim: int | None, cuts: dict[tuple[int, int], Sequence[torch.Tensor]]) -> Any:
        """One tensor as a piece a chunk, cut once."""
        if dim is None:
            return value
        if (id(value), dim) not in cuts:
            cuts[id(value), dim] = value.split(self.size, dim)
        return cuts[id(value), dim]

    def __call__(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """What the program for all returns."""
        return self._joined(self.parts(*inputs))

    def several(self, steps: Sequence[Sequence[torch.Tensor]]) -> list[list[torch.Tensor]]:
        """What it returns for each of several steps."""
        return [self._joined(parts) for parts in self._parts(steps)]

    def _joined(self, parts: list[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
        columns = zip(*parts, strict=True)
        return [torch.cat(column, dim) for column, dim in zip(columns, self.axes, strict=True)]


def several(run: Run, steps: Sequence[Sequence[torch.Tensor]]) -> Sequence[Sequence[torch.Tensor]]:
    """What a program returns for each of several steps."""
    return run.several(steps) if isinstance(run, Chunks) else [run(*inputs) for inputs in steps]


class Chunker:
    """Makes chunks of one recording.

    Args:
        whole: the recording, compiled.
        values: those of the call.
        record: records the step anew, for the members that the state holds.
        compiled: makes a graph a function.
        marked: arguments given with `each()`.
    """

    def __init__(
        self,
        whole: Program,
        values: Sequence[torch.Tensor],
        record: Callable[[], Program],
        compiled: Callable[[fx.GraphModule, Sequence[torch.Tensor], Callable[[], Sequence[torch.Tensor]]], Run],
        marked: Sequence[Stacked],
    ) -> None:
        self.whole = whole
        self.values = values
        self.record = record
        self.compiled = compiled
        self.marked = marked

    def chunks(self, size: int, promising: Callable[[Run], bool] | None = None) -> Chunks:
        """Chunks of `size` members, tried. Raises `Unfit`; `Unpromising`, if `promising` says so of them uncompiled."""
        members = self.whole.members
        if not members:
            raise Unfit("no stack and no optimizer of Memberwise is within its reach")
        if any(slots.apart for slots in self.whole.stacks):
            raise Unfit("members are in different modes")
        if any(slots.differs for slots in self.whole.stacks):
            raise Unfit("members differ outside their tensors")
        if len({slots.size() for slots in self.whole.stacks}) > 1:
            raise Unfit("the stacks have different numbers of members")
        reasons = []
        for stacked in self._guesses():
            try:
                return self._tried(stacked, size, members, promising)
            except Unfit as reason:
                reasons.append(str(reason))
        raise Unfit(reasons[0])

    def _guesses(self) -> list[list[Stacked]]:
        """What may have a member axis: the state and what `each()` marks; or else all that is of that size."""
        known = {id(entry.tensor): entry for entry in (*map(Stacked, self.whole.stacked), *self.marked)}
        others = [
            Stacked(value) for value in self._inputs()
            if value.ndim and value.shape[0] == self.whole.members and id(value) not in known
            and not getattr(value, "_memberwise_shared", False)
        ]  # fmt: skip
        return [[*known.values()], [*known.values(), *others]] if others else [[*known.values()]]

    def _inputs(self) -> list[torch.Tensor]:
        """The graph's inputs that are neither drawn nor gradients."""
        other = {index for index, _ in (*self.whole.draws, *self.whole.grads_in)}
        return [value for index, value in enumerate(self.values[: self.whole.count]) if index not in other]

    def _tried(
        self, stacked: list[Stacked], size: int, members: int, promising: Callable[[Run], bool] | None
    ) -> Chunks:
        sizes = [few for few in (size, members % size) if few]
        parts = [self._recorded(stacked, few, members) for few in sizes]

        def made_of(runs: list[Run]) -> Chunks:
            return Chunks(runs[0], runs[1] if len(runs) > 1 else None, size, parts[0].sources)

        if promising is not None and not promising(made_of([part.graph.forward for part in parts]).parts):
            raise Unpromising
        found = made_of([self._compiled(part, few) for part, few in zip(parts, sizes, strict=True)])
        self._compare(found, members)
        return found

    def _compiled(self, part: Part, size: int) -> Run:
        try:
            return self.compiled(part.graph, part.inputs, part.trial)
        except Exception as error:  # whatever the compiler cannot do
            raise Unfit(f"it cannot be compiled for {size}: {error}") from error

    def _recorded(self, stacked: list[Stacked], size: int, members: int) -> Part:
        """The recording for `size` members."""
        whole = self.whole
        shapes = [value.shape for value in self.values]
        leaves = [self.values[index] for index in whole.leaves]
        places = [place for place, _ in whole.stores]
        outside: dict[str, Any] = dict(leaves=leaves, places=places, generators=whole.generators, stacks=whole.stacks)
        known = {id(entry.tensor) for entry in stacked}
        written = [Stacked(value, None) for value in self._inputs() if memory_key(value) in whole.written]
        written = [entry for entry in written if id(entry.tensor) not in known]
        with Excerpt([*stacked, *written], size, **outside), warnings.catch_warnings(action="ignore"):
            try:
                part = self.record()
            except Exception as error:  # a step may index members, or need all of them
                raise Unfit(f"it cannot be recorded for {size}: {error}") from error
            own = [value.shape for value in part.values[: part.count]]
            is_written = [memory_key(value) in part.written for value in part.values[: part.count]]
        positions = [self._position(part, index) for index in range(part.count)]
        sources = [(k, _axis(shapes[k], shape, members, size)) for k, shape in zip(positions, own, strict=True)]
        if any(changed and dim is None for changed, (_, dim) in zip(is_written, sources, strict=True)):
            raise Unfit("it writes to a tensor that all members share")
        inputs = [self._first(k, dim, size) for k, dim in sources]
        written = [memory_key(self.values[k]) in whole.written for k, _ in sources]
        return Part(
            part.graph, inputs, sources,
            lambda: [copied(x) if own else x for x, own in zip(inputs, written, strict=True)],
        )  # fmt: skip

    def _first(self, index: int, dim: int | None, size: int) -> torch.Tensor:
        """The first `size` members' part of an input; without a graph, whose leaves would keep the shape for all."""
        value = self.values[index]
        return value if dim is None else value.detach().narrow(dim, 0, size)

    def _position(self, part: Program, index: int) -> int:
        """The input of the whole program that is input `index` of the part's."""
        drawn = [own for own, _ in part.draws]
        leaves = {own: leaf for own, leaf in part.grads_in}
        found = -1
        if index in drawn and len(part.draws) == len(self.whole.draws):
            found = self.whole.draws[drawn.index(index)][0]
        elif index in leaves:
            leaf = part.values[leaves[index]]
            found = next((own for own, other in self.whole.grads_in if self.values[other] is leaf), -1)
        else:
            found = next((k for k, value in enumerate(self.values) if value is part.values[index]), -1)
        if not 0 <= found < self.whole.count:
            raise Unfit("it uses other tensors for fewer members")
        return found

    # -- trials, on copies

    def _run(self) -> Run:
        assert self.whole.run is not None
        return self.whole.run

    def _copies(self) -> list[torch.Tensor]:
        return self.whole.copies(self.values)

    def _compare(self, chunks: Chunks, members: int) -> None:
        """Find the outputs' member axes; raises `Unfit` unless chunks give what the whole gives.

        As it does, within rounding: by the table, or by what a nudge of all inputs in their last bit changes. (Where a
        gradient is nothing but rounding, of a bias before BatchNorm, Adam makes whole steps of it.)
        """
        expected, nudged, found = self._copies(), [_nudged(value) for value in self._copies()], self._copies()
        with torch.no_grad():
            outputs, others, parts = self._run()(*expected), self._run()(*nudged), chunks.parts(*found)
        axes = [_axis(out.shape, own.shape, members, chunks.size) for out, own in zip(outputs, parts[0], strict=True)]
        if None in axes:
            raise Unfit("it returns or keeps a value that is not one a member")
        chunks.axes = [axis for axis in axes if axis is not None]
        joined = [torch.cat(column, dim) for column, dim in zip(zip(*parts, strict=True), chunks.axes, strict=True)]
        for ours, theirs, other in zip((*joined, *found), (*outputs, *expected), (*others, *nudged), strict=True):
            if not _agree(ours, theirs, other):
                raise Unfit("its results differ, so members depend on each other")


def _nudged(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in which each number is larger or smaller by its last bit."""
    if not tensor.is_floating_point():
        return tensor
    generator = torch.Generator(tensor.device).manual_seed(0)
    up = torch.randint(0, 2, tensor.shape, generator=generator, device=tensor.device).to(tensor.dtype)
    return copied(tensor).mul_(1 + (2 * up - 1) * torch.finfo(tensor.dtype).eps)


def _agree(ours: torch.Tensor, theirs: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether `ours` differs from `theirs` by rounding; `other` is `theirs` after a nudge of the inputs."""
    if not (theirs.is_floating_point() or theirs.is_complex()):
        return torch.equal(ours, theirs)
    if not theirs.numel():
        return True
    if not torch.equal(ours.isfinite(), theirs.isfinite()):
        return False
    difference, noise, scale = map(_largest, (ours - theirs, other - theirs, theirs))
    allowed = torch.maximum(tolerance(theirs.dtype)[0] * scale, NOISE * noise)
    return bool((difference <= allowed).all())


def _largest(tensor: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each row, of those that are finite."""
    rows = tensor.reshape(tensor.shape[0], -1) if tensor.ndim > 1 else tensor.reshape(1, -1)
    return rows.abs().nan_to_num(0.0, 0.0, 0.0).amax(1)


def _axis(all_of: Sequence[int], few: Sequence[int], members: int, size: int) -> int | None:
    """The dimension in which two shapes differ as M and `size` do; None if they do not differ."""
    if tuple(all_of) == tuple(few):
        return None
    differing = [dim for dim, (a, b) in enumerate(zip(all_of, few, strict=False)) if a != b]
    if len(all_of) != len(few) or len(differing) != 1 or (all_of[differing[0]], few[differing[0]]) != (members, size):
        raise Unfit(f"a tensor of shape {tuple(all_of)} is of shape {tuple(few)} for {size}")
    return differing[0]
