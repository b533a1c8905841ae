"""An excerpt: for a while, tensors hold some members only. The objects stay, so a step finds them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch

from memberwise.capture.places import Place
from memberwise.capture.program import copied
from memberwise.engine.slots import Slots


class Stacked(NamedTuple):
    """A tensor with a member axis, and where that is; None: there is none."""

    tensor: torch.Tensor
    dim: int | None = 0


def guesses(known: Iterable[Stacked], tensors: Iterable[torch.Tensor], members: int) -> list[list[Stacked]]:
    """What may have a member axis: what is known to have one; or else all that is of that size as well."""
    entries = {id(entry.tensor): entry for entry in known}  # an optimizer's parameters are the stack's
    others = [
        Stacked(value) for value in tensors
        if value.ndim and value.shape[0] == members and id(value) not in entries
        and not getattr(value, "_memberwise_shared", False)
    ]  # fmt: skip
    stacked = [*entries.values()]
    return [stacked, [*stacked, *others]] if others else [stacked]


class _Facts:
    """What a run for fewer members may change of a stack."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.own = {name: getattr(slots, name) for name in ("members", "generators", "parted", "carried")}
        self.tables: list[tuple[dict[Any, Any], dict[Any, Any]]] = [
            (slots.parted, dict(slots.parted)), (slots.carried, dict(slots.carried)),
        ]  # fmt: skip

    def restore(self) -> None:
        for name, value in self.own.items():
            setattr(self.slots, name, value)
        for table, entries in self.tables:
            table.clear()
            table.update(entries)


class Excerpt:
    """A context in which each tensor, and its gradient, is a copy, of `size` members where it has members.

    Everything is as before when it ends: values, gradients, what stands in `places`, random streams.

    Args:
        stacked: the tensors.
        size: how many members.
        leaves: tensors whose gradients are cut as well.
        places: what is put back.
        generators: streams that are put back.
        stacks, optimizers: what is told how many members there are.
        start: the first member.
        streams: the members' random streams, by stack, of a former excerpt of the same members.
        copies: whether there are copies. Else there are views, and what is written to them stays.
    """

    def __init__(
        self,
        stacked: Sequence[Stacked],
        size: int,
        *,
        leaves: Sequence[torch.Tensor],
        places: Sequence[Place],
        generators: Sequence[torch.Generator],
        stacks: Sequence[Slots],
        optimizers: Iterable[Any] = (),
        start: int = 0,
        streams: dict[Slots, Any] | None = None,
        copies: bool = True,
    ) -> None:
        self.stacked = stacked
        self.start = start
        self.size = size
        self.copies = copies
        self.streams = {} if streams is None else streams
        self.optimizers = [(optimizer, optimizer.members) for optimizer in optimizers]
        self.data = [entry.tensor.data for entry in stacked]
        self.grads = [(leaf, leaf.grad) for leaf in leaves]
        self.kept = [(place, place.read()) for place in places]
        self.stacks = [_Facts(slots) for slots in stacks]
        self.states = [(generator, generator.get_state()) for generator in generators]

    def __enter__(self) -> Excerpt:
        dims = {id(entry.tensor): entry.dim for entry in self.stacked}
        for leaf, _ in self.grads:
            leaf.grad = None
        for entry in self.stacked:
            _hold(entry.tensor, self._part(entry.tensor.data, entry.dim))
        for facts in self.stacks:
            slots = facts.slots
            slots.members = self.size
            if slots not in self.streams:
                self.streams[slots] = slots.generators and slots.generators[self.start : self.start + self.size]
            slots.generators = self.streams[slots]
        for optimizer, _ in self.optimizers:
            optimizer.members = self.size
        for leaf, grad in self.grads:
            if grad is not None:
                leaf.grad = self._part(grad.detach(), dims.get(id(leaf)))
        return self

    def _part(self, tensor: torch.Tensor, dim: int | None) -> torch.Tensor:
        """The members' part, as a copy in the memory order of the view that a replay will hand over."""
        part = tensor if dim is None else tensor.narrow(dim, self.start, self.size)
        return copied(part) if self.copies else part

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for leaf, _ in self.grads:
            leaf.grad = None
        for entry, data in zip(self.stacked, self.data, strict=True):
            _hold(entry.tensor, data)
        for leaf, grad in self.grads:
            leaf.grad = grad
        for facts in self.stacks:
            facts.restore()
        for optimizer, members in self.optimizers:
            optimizer.members = members
        for place, value in self.kept:
            place.write(value)
        for generator, state in self.states:
            generator.set_state(state)


def _hold(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """Let a tensor hold other data, in any shape.

    A leaf's gradient comes from one node, which knows the leaf's shape and lives as long as any graph: of a loss that
    the user keeps, say. Torch makes another only for data of another dtype.
    """
    if tensor.requires_grad and tensor.is_leaf and data.shape != tensor.shape:
        other = torch.float16 if tensor.dtype is not torch.float16 else torch.float32
        tensor.data = data.new_empty(0, dtype=other)
    tensor.data = data
