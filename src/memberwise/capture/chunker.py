"""Makes a program for few members of a recording for all.

A step that treats members alike can be recorded for a few of them, and that program run on views of the state. Whether
a step is of that kind is not proved but tried: it is recorded on copies of the first members' state, and what the
program for few gives, chunk after chunk on copies of everything, must be what the program for all gives. What is cut
along which axis shows in the shapes of the two.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx

from memberwise._torch.inductor import How
from memberwise.capture.chunks import Chunks, Result, Run, Source
from memberwise.capture.excerpt import Excerpt, Stacked, guesses
from memberwise.capture.into import writing_into
from memberwise.capture.layout import laid_out
from memberwise.capture.program import Program, copied, once
from memberwise.capture.views import with_fewer_views
from memberwise.capture.widened import wide, wide_type, widened
from memberwise.engine.choices import taking
from memberwise.testing.tolerance import tolerance

NOISE, NOISE_IN_DOUBLE = 10, 1000
"""How many times as much as after a nudge of all inputs in their last bit the results of chunks may differ: more in
float64, where what members do to each other is larger than that by far. (Gradients that cancel out are nothing but
rounding, and another kernel rounds in other places.)"""


DRAWN = 65_521
"""How many random numbers a nudge draws at most, and repeats: a prime, so that rows beside each other get others."""

PART = 1 << 20
"""Numbers that are compared at a time: new memory for the differences of a gigabyte would take longer than they do."""


class Unfit(Exception):
    """Why a step cannot run in chunks of members."""


class Part(NamedTuple):
    """A recording for a few members, to be compiled.

    Attributes:
        graph: what it computes, written to what it is given after its inputs.
        inputs: what it is called with, of the first members.
        sources, results: as `Chunks` has them.
        trial: copies of the inputs that it may write.
        channels_last: whether its convolutions have the channels last.
    """

    graph: fx.GraphModule
    inputs: list[torch.Tensor]
    sources: list[Source]
    results: list[Result]
    trial: Callable[[], list[torch.Tensor]]
    channels_last: bool

    def widened(self) -> Part:
        """To be run in float64, not to be compiled."""
        results = [Result(like._replace(dtype=wide_type(like.dtype)), dim) for like, dim in self.results]
        return self._replace(graph=widened(self.graph), results=results)


class Expected(NamedTuple):
    """What the program for all returns and writes; and by how much at most a nudge of its inputs changes each row."""

    values: list[torch.Tensor]
    noise: list[torch.Tensor | None]

    @classmethod
    def of(cls, whole: Run, copies: Callable[[], list[torch.Tensor]]) -> Expected:
        """Run on such copies; those of the nudge are not kept, for they may be gigabytes."""
        values, nudged = copies(), [_nudged(value) for value in copies()]
        with torch.no_grad():
            values, nudged = [*whole(*values), *values], [*whole(*nudged), *nudged]
        return cls(values, [*map(_noise, values, nudged)])

    def is_met(self, chunks: Run, values: list[torch.Tensor]) -> bool:
        """Whether they differ by no more than the table allows, or than a nudge of all inputs in their last bit does.

        (Where a gradient is nothing but rounding, of a bias before BatchNorm, Adam makes whole steps of it.)
        """
        with torch.no_grad():
            found = [*chunks(*values), *values]
        return all(_agree(*each) for each in zip(found, self.values, self.noise, strict=True))


class Prepared(NamedTuple):
    """Chunks of `size` members, recorded and tried: the program for so many, and that for those left over."""

    size: int
    parts: list[Part]

    def uncompiled(self, lanes: int = 1) -> Chunks:
        """Chunks that run operation by operation."""
        return self.of([part.graph.forward for part in self.parts], lanes)

    def widened(self) -> Prepared:
        """The same in float64."""
        return Prepared(self.size, [part.widened() for part in self.parts])

    def of(self, runs: Sequence[Run], lanes: int) -> Chunks:
        """Chunks that run as these do, so many at a time."""
        run, rest = (*runs, None)[:2]
        return Chunks(run, rest, self.size, self.parts[0].sources, self.parts[0].results, lanes)


@dataclass(eq=False)
class Chunker:
    """Makes chunks of one recording.

    Args:
        whole: the recording.
        values: those of the call.
        record: records the step anew, for the members that the state holds.
        begin: begins to make a graph a function, given what it is called with, a trial, and how to compile it; what it
            returns ends that.
        marked: arguments given with `each()`.
    """

    whole: Program
    values: Sequence[torch.Tensor]
    record: Callable[[], Program]
    begin: Callable[..., Callable[[], Run]]
    marked: Sequence[Stacked]

    def chunks(self, size: int, lanes: int = 1, way: str = "") -> Chunks:
        """Chunks of `size` members, so many at a time. Raises `Unfit`."""
        return self.of(self.prepared(size, way), lanes)

    def of(self, prepared: Prepared, lanes: int) -> Chunks:
        """The same, compiled: for one thread what runs in lanes; those left over have all cores. Raises `Unfit`."""
        try:
            ends = [
                self.begin(part.graph, part.inputs, part.trial, How(threads, part.channels_last))
                for part, threads in zip(prepared.parts, (int(lanes > 1), 0), strict=False)
            ]
            return prepared.of([end() for end in ends], lanes)
        except Exception as error:  # whatever the compiler cannot do
            raise Unfit(f"it cannot be compiled for {prepared.size}: {error}") from error

    def prepared(self, size: int, way: str = "") -> Prepared:
        """Chunks of `size` members, to be compiled; an operation runs in another `way` than usual. Raises `Unfit`."""
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
        for stacked in self._guesses:
            try:
                with taking(**dict([way.split(" ", 1)] if way else [])):
                    parts = [self._recorded(stacked, few, members) for few in (size, members % size) if few]
                prepared = Prepared(size, parts)
                self._compare(prepared)
                self._guesses = [stacked]
                return prepared
            except Unfit as reason:
                reasons.append(str(reason))
        raise Unfit(reasons[0])

    @functools.cached_property
    def _guesses(self) -> list[list[Stacked]]:
        """What may have a member axis; once chunks were right, what had one in them."""
        known = (*map(Stacked, self.whole.stacked), *self.marked)
        return guesses(known, [self.values[k] for k in self._own_inputs()], self.whole.members)

    def _own_inputs(self) -> list[int]:
        """The graph's inputs that are neither drawn nor gradients."""
        other = {index for index, _ in (*self.whole.draws, *self.whole.grads_in)}
        return [index for index in range(self.whole.count) if index not in other]

    def _recorded(self, stacked: list[Stacked], size: int, members: int) -> Part:
        """The recording for `size` members."""
        whole = self.whole
        shapes = [value.shape for value in self.values]
        leaves = [self.values[index] for index in whole.leaves]
        places = [place for place, _ in whole.stores]
        outside: dict[str, Any] = dict(leaves=leaves, places=places, generators=whole.generators, stacks=whole.stacks)
        known = {id(entry.tensor) for entry in stacked}
        written = [Stacked(self.values[k], None) for k in self._own_inputs() if k in whole.written]
        written = [entry for entry in written if id(entry.tensor) not in known]
        with Excerpt([*stacked, *written], size, **outside), warnings.catch_warnings(action="ignore"):
            try:
                part = self.record()
            except Exception as error:  # a step may index members, or need all of them
                raise Unfit(f"it cannot be recorded for {size}: {error}") from error
            own = [value.shape for value in part.values[: part.count]]
        positions = [self._position(part, index) for index in range(part.count)]
        sources = [Source(k, axis_of(shapes[k], shape, members, size)) for k, shape in zip(positions, own, strict=True)]
        if any(sources[index].dim is None for index in part.written):
            raise Unfit("it writes to a tensor that all members share")
        inputs = [self._first(k, dim, size) for k, dim in sources]
        written = [k in whole.written for k, _ in sources]
        results = self._results(part, size, members)
        into = [like.empty().narrow(dim, 0, size) for like, dim in results]
        pairs = list(zip(inputs, written, strict=True))

        def copies() -> list[torch.Tensor]:
            return [copied(value) if own else value for value, own in pairs]

        graph = with_fewer_views(part.graph, inputs) if size == 1 else part.graph
        graph, last = laid_out(graph, copies)
        return Part(writing_into(graph), [*inputs, *into], sources, results, lambda: [*copies(), *into], last)

    def _results(self, part: Program, size: int, members: int) -> list[Result]:
        """What the results for all are like, and their member axes."""
        if len(part.outputs) != len(self.whole.outputs):
            raise Unfit("it has other results for fewer members")
        pairs = list(zip(self.whole.outputs, part.outputs, strict=True))
        axes = [axis_of(like.shape, own.shape, members, size) for like, own in pairs]
        if None in axes:
            raise Unfit("it returns or keeps a value that is not one a member")
        return [Result(like, axis) for (like, _), axis in zip(pairs, axes, strict=True) if axis is not None]

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

    def _copies(self) -> list[torch.Tensor]:
        return self.whole.copies(self.values)

    def _scratch(self) -> list[torch.Tensor]:
        """Copies that each trial overwrites, as they were: new memory would take longer than the trial."""
        for index in self.whole.written:
            once(self._overwritten[index]).copy_(once(self.values[index]))
        return list(self._overwritten)

    @functools.cached_property
    def _overwritten(self) -> list[torch.Tensor]:
        return self._copies()

    def _compare(self, prepared: Prepared) -> None:
        """Raise `Unfit` unless chunks give what the whole gives, within rounding, in float32 or else in float64."""
        if self._expected.is_met(prepared.uncompiled(), self._scratch()):
            return
        with contextlib.suppress(Exception):  # an operation may not be there in float64
            if self._expected_wide.is_met(prepared.widened().uncompiled(), self._wide_copies()):
                return
        raise Unfit("its results differ, so members depend on each other")

    @functools.cached_property
    def _expected(self) -> Expected:
        return Expected.of(self.whole.graph.forward, self._copies)

    @functools.cached_property
    def _expected_wide(self) -> Expected:
        return Expected.of(widened(self.whole.graph).forward, self._wide_copies)

    def _wide_copies(self) -> list[torch.Tensor]:
        return list(map(wide, self._copies()))


def _nudged(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in which each number is larger or smaller by its last bit, at random."""
    if not tensor.is_floating_point():
        return tensor
    generator, count = torch.Generator(tensor.device).manual_seed(0), min(tensor.numel(), DRAWN)
    up = torch.randint(0, 2, (count,), generator=generator, device=tensor.device, dtype=tensor.dtype)
    factors = up.mul_(2).sub_(1).mul_(torch.finfo(tensor.dtype).eps).add_(1)
    copy = copied(tensor)
    for (part,) in _in_parts(copy):
        part.mul_(factors.repeat(-(-part.numel() // DRAWN))[: part.numel()].view(part.shape))
    return copy


def _noise(theirs: torch.Tensor, other: torch.Tensor) -> torch.Tensor | None:
    """How far `other` is from `theirs`, at most, in each row; None of what is not compared so."""
    rounds = theirs.is_floating_point() or theirs.is_complex()
    parts = _in_parts(other, theirs) if rounds and theirs.numel() else []
    return torch.cat([_largest(a - b) for a, b in parts]) if parts else None


def _agree(ours: torch.Tensor, theirs: torch.Tensor, noise: torch.Tensor | None) -> bool:
    """Whether `ours` differs from `theirs` by rounding; `noise` is by how much `theirs` does after a nudge."""
    if noise is None:
        return torch.equal(ours, theirs)
    times = NOISE_IN_DOUBLE if theirs.dtype is torch.float64 else NOISE
    parts = _in_parts(ours, theirs)
    noises = noise.split([len(part) for part, _ in parts])
    return all(
        torch.equal(a.isfinite(), b.isfinite())
        and bool((_largest(a - b) <= torch.maximum(tolerance(b.dtype)[0] * _largest(b), times * own)).all())
        for (a, b), own in zip(parts, noises, strict=True)
    )


def _in_parts(*tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """The same rows of each, a few at a time; a tensor of one dimension is one row."""
    rows = [tensor if tensor.ndim > 1 else tensor.view(1, -1) for tensor in tensors]
    size = max(1, PART * len(rows[0]) // max(1, rows[0].numel()))
    return list(zip(*(each.split(size) for each in rows), strict=True))


def _largest(tensor: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each row, of those that are finite."""
    return tensor.reshape(len(tensor), -1).abs().nan_to_num(0.0, 0.0, 0.0).amax(1)


def axis_of(all_of: Sequence[int], few: Sequence[int], members: int, size: int) -> int | None:
    """The dimension in which two shapes differ as M and `size` do; None if they do not differ."""
    if tuple(all_of) == tuple(few):
        return None
    differing = [dim for dim, (a, b) in enumerate(zip(all_of, few, strict=False)) if a != b]
    if len(all_of) != len(few) or len(differing) != 1 or (all_of[differing[0]], few[differing[0]]) != (members, size):
        raise Unfit(f"a tensor of shape {tuple(all_of)} is of shape {tuple(few)} for {size}")
    return differing[0]
