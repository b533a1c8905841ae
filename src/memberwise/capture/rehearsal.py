"""A step rehearsed with one member, and with two: what memory a member takes, and where members are in its results.

On copies, before the step has run at all, as all members may be too many for the memory that there is. Whether members
are apart from each other is not proved but tried, as for chunks: the first alone does what it does beside the second.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from memberwise._torch.identity import memory_key
from memberwise.capture.arguments import Arguments
from memberwise.capture.assembly import Before, Refused
from memberwise.capture.chunker import Unfit, axis_of
from memberwise.capture.excerpt import Excerpt, Stacked
from memberwise.capture.program import Output, Program
from memberwise.capture.reach import Reach
from memberwise.capture.refusals import Refusal
from memberwise.capture.step import CapturedStep
from memberwise.metering import Meter, shares
from memberwise.trees import tree_leaves

ALIKE = 0.05
"""How much the first member may differ from itself, of the largest number of its kind. Rounding makes less, but where a
gradient is nothing else, and Adam makes a step of it."""


@dataclass(eq=False)
class Rehearsal:
    """One run on copies.

    Attributes:
        program: its recording.
        bytes: what its operations held at most, at one time.
        returned: the tensors that it returned.
        gradients: of each leaf, or None.
        state: what the stacked tensors then held.
        streams: where the streams stood that are no member's.
    """

    program: Program
    bytes: int
    returned: list[torch.Tensor]
    gradients: list[torch.Tensor | None]
    state: list[torch.Tensor]
    streams: list[torch.Tensor]


@dataclass(eq=False)
class Rehearsals:
    """A step with one and with two members. Raises `Unfit`, or `Refused`, if it cannot run for a part of its members.

    Attributes:
        per_member, base: bytes that a step takes for each member, and for all together.
        axes: where the members are in each tensor that it returns.
    """

    captured: CapturedStep
    before: Before
    stacked: Sequence[Stacked]
    call: tuple[Any, Any]

    def __post_init__(self) -> None:
        if any(slots.apart or slots.differs for slots in self.before.reach.stacks):
            raise Unfit("members are in different modes, or differ outside their tensors")
        self._known = {id(entry.tensor) for entry in self.stacked}
        self._shared = [tensor for tensor in self.before.tensors if id(tensor) not in self._known]
        self._common = common_streams(self.before.reach)
        one, two = self._run(1), self._run(2)
        self.per_member, self.base = shares(1, 2, (one.bytes, two.bytes))
        self.axes = self._axes(one.program, two.program)
        if not all(map(torch.equal, one.streams, two.streams)):
            raise Unfit("members draw from one random stream, one after the other: give each its own by seeds")
        self._check_shared(two)
        self._check_apart(one, two)

    def _run(self, size: int) -> Rehearsal:
        optimizers = [one for one in self.before.reach.objects() if isinstance(one, torch.optim.Optimizer)]
        states = [one.state for one in optimizers]
        tables = [(state, dict(state), [(own, dict(own)) for own in state.values()]) for state in states]
        try:
            return self._run_on_copies(size)
        finally:
            for state, held, entries in tables:  # what an optimizer makes at its first step has the size of a part
                _refill(state, held)
                for own, values in entries:
                    _refill(own, values)
            self._put_back()

    def _run_on_copies(self, size: int) -> Rehearsal:
        captured, before, (args, kwargs) = self.captured, self.before, self.call
        shared = [Stacked(tensor, None) for tensor in self._shared]
        reach = before.reach
        outside: dict[str, Any] = dict(leaves=before.leaves, stacks=reach.stacks, optimizers=reach.optimizers)
        generators = [torch.default_generator, *reach.generators]
        with (
            Excerpt([*self.stacked, *shared], size, places=(), generators=generators, **outside),
            warnings.catch_warnings(action="ignore"),
        ):
            try:
                with Meter() as meter:
                    program, out = captured.watched(captured.before(Arguments(args, kwargs)), args, kwargs)
            except Exception as error:  # a step may index members, or need all of them
                raise Unfit(f"it cannot run for {size}: {error}") from error
            if isinstance(program, Refusal):
                raise Refused(*program)
            tensors = [leaf.detach().clone() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
            gradients = [None if leaf.grad is None else leaf.grad.detach().clone() for leaf in before.leaves]
            state = [entry.tensor.detach().clone() for entry in self.stacked]
            streams = [generator.get_state() for generator in self._common]
            return Rehearsal(program, meter.most, tensors, gradients, state, streams)

    def _put_back(self) -> None:
        """What the step left in attributes."""
        for change in self.before.guards.changes():
            if change.place is not None:
                change.place.write(change.before)

    def _axes(self, one: Program, two: Program) -> list[int]:
        if one.stores or two.stores:
            raise Unfit(f"it leaves a tensor in {(*one.stores, *two.stores)[0][0].label}")
        leaves = [leaf for leaf in tree_leaves(two.result) if isinstance(leaf, Output)]
        others = [leaf for leaf in tree_leaves(one.result) if isinstance(leaf, Output)]
        if len(leaves) != len(others) or any(type(leaf) is not Output for leaf in (*leaves, *others)):
            raise Unfit("it returns a tensor that it was given, or other ones for fewer members")
        pairs = [(two.outputs[a.index].shape, one.outputs[b.index].shape) for a, b in zip(leaves, others, strict=True)]
        axes = [axis_of(more, few, 2, 1) for more, few in pairs]
        if None in axes:
            raise Unfit("it returns a value that is not one a member")
        return [axis for axis in axes if axis is not None]

    def _check_shared(self, two: Rehearsal) -> None:
        """Nothing that members share may be written, as each part would write it."""
        program, shared = two.program, set(map(id, self._shared))
        for value in program.values[: program.count]:
            if id(value) in shared and memory_key(value) in program.written:
                raise Unfit(f"it writes to a tensor of shape {tuple(value.shape)} that all members share")
        for leaf, gradient in zip(self.before.leaves, two.gradients, strict=True):
            if gradient is not None and id(leaf) not in self._known:
                raise Unfit(f"it leaves a gradient of shape {tuple(leaf.shape)} that all members share")

    def _check_apart(self, one: Rehearsal, two: Rehearsal) -> None:
        """Raise `Unfit` unless the first member is the same in both."""
        pairs = [(a, b.narrow(axis, 0, 1)) for a, b, axis in zip(one.returned, two.returned, self.axes, strict=True)]
        dims = {id(entry.tensor): entry.dim for entry in self.stacked}
        for entry, a, b in zip(self.stacked, one.state, two.state, strict=True):
            pairs.append((a, b if entry.dim is None else b.narrow(entry.dim, 0, 1)))
        gradients = []
        for leaf, a, b in zip(self.before.leaves, one.gradients, two.gradients, strict=True):
            if (a is None) != (b is None):
                raise Unfit("it leaves other gradients for fewer members")
            if a is not None and b is not None:
                gradients.append((a, b.narrow(dims[id(leaf)] or 0, 0, 1)))
        largest = max((float(b.abs().max()) for _, b in gradients if b.numel()), default=0.0)
        same = all(_alike(a, b) for a, b in pairs) and all(_alike(a, b, largest) for a, b in gradients)
        if not same:
            raise Unfit("members depend on each other")


def common_streams(reach: Reach) -> list[torch.Generator]:
    """The random streams of torch that are no member's."""
    own = {generator for slots in reach.stacks for generator in slots.generators or ()}
    return [generator for generator in (torch.default_generator, *reach.generators) if generator not in own]


def _refill(table: Any, entries: dict[Any, Any]) -> None:
    table.clear()
    table.update(entries)


def _alike(ours: torch.Tensor, theirs: torch.Tensor, scale: float | None = None) -> bool:
    if not (theirs.is_floating_point() or theirs.is_complex()):
        return torch.equal(ours, theirs)
    if not theirs.numel() or not torch.equal(ours.isfinite(), theirs.isfinite()):
        return not theirs.numel()
    difference, size = ((ours - theirs).abs().nan_to_num(0.0), theirs.abs().nan_to_num(0.0, 0.0, 0.0))
    return float(difference.max()) <= ALIKE * (float(size.max()) if scale is None else scale)
