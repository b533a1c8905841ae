"""A step within some memory: members come a part at a time, each part through the whole step.

What a step holds between forward and backward grows with M. Where that is too much, the stack's own tensors hold a part
of the members for a while, as views (`memberwise.capture.excerpt`), and the captured step runs for them as it would for
a smaller stack: what it writes in place is in its place, gradients and results are put together. How many members fit
is found out before the first run, by a rehearsal with one and with two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from memberwise.capture.arguments import Arguments
from memberwise.capture.assembly import Before, Refused
from memberwise.capture.chunker import Unfit
from memberwise.capture.excerpt import Excerpt, Stacked, guesses
from memberwise.capture.guards import Guards
from memberwise.capture.reach import Reach, Unfollowed
from memberwise.capture.rehearsal import Rehearsals, common_streams
from memberwise.capture.step import KEPT, CapturedStep
from memberwise.errors import ArgumentError, fail
from memberwise.metering import in_words
from memberwise.trees import tree_transpose_map

Kinds = list[tuple[Any, ...]]


class Part(NamedTuple):
    """Some members, one after the other.

    Attributes:
        start, size: which.
        captured: the step for them: it draws from their streams.
        streams: these, by stack.
    """

    start: int
    size: int
    captured: CapturedStep
    streams: dict[Any, Any]


@dataclass(eq=False)
class Parting:
    """How calls of one kind run.

    Attributes:
        arguments, kinds: what it is called with, and its tensors.
        reach, guards, leaves: what it finds.
        parts: of the members; none: all of them run as they are.
        stacked: what is cut, beside arguments.
        given: `(position, dim)` of arguments that are cut.
        axes: where members are in what it returns.
    """

    arguments: Arguments
    kinds: Kinds
    reach: Reach
    guards: Guards
    leaves: list[torch.Tensor]
    parts: Sequence[Part] = ()
    stacked: Sequence[Stacked] = ()
    given: Sequence[tuple[int, int]] = ()
    axes: Sequence[int] = ()

    @classmethod
    def of(cls, before: Before, **found: Any) -> Parting:
        """For what is known before a call; without its tensors."""
        arguments = before.arguments
        return cls(arguments, _kinds(arguments), before.reach, before.guards, before.leaves, **found)

    def stands_for(self, arguments: Arguments) -> bool:
        """Whether a call with these arguments is of the kind, and finds the same."""
        return self.arguments.like(arguments) and self.kinds == _kinds(arguments) and self.guards.hold()


class Within(Unfollowed):
    """A captured step that holds no more than `most` bytes at a time, beside its state.

    Attributes:
        captured: the step, which runs for a part.
        partings: the kinds of calls that were met, the last first.
    """

    def __init__(self, captured: CapturedStep, most: int) -> None:
        self.captured = captured
        self.most = most
        self.partings: list[Parting] = []

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the step."""
        captured = self.captured
        if captured.stands_aside():
            return captured.step(*args, **kwargs)
        arguments = Arguments(args, kwargs)
        parting = next((one for one in self.partings if one.stands_for(arguments)), None)
        if parting is None:
            parting = self._found(Arguments(args, kwargs), args, kwargs)  # which forgets them
        if parting is None or not parting.parts:
            return captured(args, kwargs)
        return self._in_parts(parting, arguments, args, kwargs)

    def several(self, calls: Any) -> list[Any]:
        """As many calls, one after the other."""
        return [self(*call) for call in calls]

    # -- how many fit

    def _found(self, arguments: Arguments, args: Any, kwargs: Any) -> Parting | None:
        """Rehearse the step. None: it runs as it is now, and the next call may be another matter."""
        captured = self.captured
        try:
            before = captured.before(arguments)
        except Refused as refused:
            self._warn(refused)
            return None
        try:
            parting = self._rehearsed(before, (args, kwargs))
        except (Unfit, Refused) as reason:
            self._warn(reason)
            if isinstance(reason, Refused) and reason.refusal.reason == "python-state":
                return None  # state that is made in the first call is common
            parting = Parting.of(captured.before(arguments))
        parting.arguments.forget()
        self.partings.insert(0, parting)
        del self.partings[KEPT:]
        return parting

    def _warn(self, reason: Unfit | Refused) -> None:
        why = reason.refusal.sentence() if isinstance(reason, Refused) else str(reason)
        what = f"all members of the step run at once, whatever memory that takes: {why}"
        self.captured.warn_once("MW505", what, "Leave max_memory out")

    def _rehearsed(self, before: Before, call: tuple[Any, Any]) -> Parting:
        sizes = {tensor.shape[0] for tensor in before.reach.stacked}
        if len(sizes) != 1:
            raise Unfit("no stack is within its reach, or stacks with different numbers of members are")
        (members,) = sizes
        known = (*map(Stacked, before.reach.stacked), *(Stacked(*entry) for entry in before.arguments.marked))
        reasons: list[Unfit | Refused] = []
        for stacked in guesses(known, before.tensors, members):
            try:
                return self._fitting(members, stacked, Rehearsals(self.captured, before, stacked, call))
            except (Unfit, Refused) as reason:
                reasons.append(reason)
        raise reasons[0]

    def _fitting(self, members: int, stacked: list[Stacked], tried: Rehearsals) -> Parting:
        before = tried.before
        most = (self.most - tried.base) // tried.per_member
        told = f"{in_words(tried.per_member)} a member, {in_words(tried.base)} for all"
        if most >= members:
            return Parting.of(before)
        if most < 1:
            need = f"{in_words(tried.base + tried.per_member)}, which the step takes for one member"
            fail(ArgumentError, "MW507", f"max_memory: expected at least {need}, found {in_words(self.most)}")
        size = -(-members // -(-members // most))  # as few parts as that makes, as equal as can be
        self.captured.plans.append(f"parts of {size}, within {in_words(self.most)}: {told}")
        position = {id(tensor): k for k, tensor in reversed(list(enumerate(before.arguments.tensors)))}
        given = [(position[id(one)], dim) for one, dim in stacked if id(one) in position and dim is not None]
        fixed = [entry for entry in stacked if id(entry.tensor) not in position]
        starts = range(0, members, size)
        parts = [Part(start, min(size, members - start), self.captured.of_a_part(), {}) for start in starts]
        return Parting.of(before, parts=parts, stacked=fixed, given=given, axes=tried.axes)

    # -- a call in parts

    def _in_parts(self, parting: Parting, arguments: Arguments, args: Any, kwargs: Any) -> Any:
        """The step for each part; results and gradients, put together."""
        reach, leaves = parting.reach, parting.leaves
        stacked = [*parting.stacked, *(Stacked(arguments.tensors[k], dim) for k, dim in parting.given)]
        common = common_streams(reach)
        for optimizer in reach.optimizers:
            optimizer.sync_hyperparameters()  # which knows all members
        outs: list[Any] = []
        last = parting.parts[-1]
        recorded = sum(part.captured.recorded for part in parting.parts)
        gradients = _Gradients(leaves, last.start + last.size)
        for part in parting.parts:
            with Excerpt(
                stacked, part.size, leaves=leaves, places=(), generators=() if part is last else common,
                stacks=reach.stacks, optimizers=reach.optimizers, start=part.start, copies=False, streams=part.streams,
            ):  # fmt: skip
                gradients.given()
                outs.append(part.captured(args, kwargs))
                for program in part.captured.programs:
                    program.optimizers = []
                gradients.take(part.start)
        gradients.leave()
        replayed = recorded == sum(part.captured.recorded for part in parting.parts)
        self.captured.replayed += replayed
        self.captured.recorded += not replayed
        axes = iter(parting.axes)
        return tree_transpose_map(lambda row: _together(row, axes), outs)


class _Gradients:
    """The gradients of all members, as parts leave them."""

    def __init__(self, leaves: list[torch.Tensor], members: int) -> None:
        self.leaves = leaves
        self.members = members
        self.whole = [leaf.grad for leaf in leaves]
        self._part: list[torch.Tensor | None] = []

    def given(self) -> None:
        """A part begins."""
        self._part = [leaf.grad for leaf in self.leaves]

    def take(self, start: int) -> None:
        """A part has ended: what it made is copied, what it wrote in place is there already."""
        for k, (leaf, before) in enumerate(zip(self.leaves, self._part, strict=True)):
            now = leaf.grad
            if now is before:
                continue
            if now is None:
                self.whole[k] = None
                continue
            if not start:
                self.whole[k] = now.new_empty((self.members, *now.shape[1:]))
            whole = self.whole[k]
            assert whole is not None  # as the first part left one
            whole.narrow(0, start, now.shape[0]).copy_(now)

    def leave(self) -> None:
        """All parts have ended."""
        for leaf, gradient in zip(self.leaves, self.whole, strict=True):
            leaf.grad = gradient


def _kinds(arguments: Arguments) -> Kinds:
    return [(tensor.shape, tensor.dtype, tensor.device) for tensor in arguments.tensors]


def _together(row: list[Any], axes: Any) -> Any:
    """Tensors, one behind the other; of other values the last, as a loop leaves it."""
    return torch.cat(row, next(axes)) if isinstance(row[0], torch.Tensor) else row[-1]
