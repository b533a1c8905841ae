"""A recorded step that can be replayed: what it is given, what it takes for granted, and where its results go."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import fx

from memberwise._torch.identity import memory_key
from memberwise._torch.tensorguards import tensor_check
from memberwise.capture.arguments import Arguments
from memberwise.capture.draws import Draw
from memberwise.capture.guards import Change, Guards
from memberwise.capture.places import Place
from memberwise.engine.slots import Slots
from memberwise.metering import free_memory
from memberwise.pages import in_huge_pages
from memberwise.trees import tree_leaves, tree_map

COPIED = 2 << 30
"""How many bytes of state are copied at most for a trial."""

COPIES = 4
"""How many such copies must have room: chunks are tried on one, beside what is expected and what the trial makes."""

_hooks_of = operator.attrgetter("_backward_hooks", "_post_accumulate_grad_hooks")


class Output:
    """Stands in a returned structure for output `index` of the graph. (No tuple: those are structures.)"""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


class Input(Output):
    """Stands in a returned structure for value `index`, returned as it is."""

    __slots__ = ()


class Like(NamedTuple):
    """What a tensor is, without its values; an expanded one, as a copy of it is."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Like:
        return cls(tensor.shape, torch.empty_like(tensor, device="meta").stride(), tensor.dtype, tensor.device)

    def empty(self) -> torch.Tensor:
        """Another such tensor, not filled."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


class Setting(NamedTuple):
    """The parts of torch's state that no tensor shows, and that change what a step computes."""

    grad_enabled: bool
    dtype: torch.dtype
    autocast: tuple[torch.dtype, torch.dtype]
    deterministic: bool
    threads: int
    precision: tuple[str, str] | None

    @classmethod
    def now(cls) -> Setting:
        """As they are."""
        return cls(
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            (torch.get_autocast_dtype("cpu"), torch.get_autocast_dtype("cuda")),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_num_threads(),
            _precision() if torch.cuda.is_initialized() else None,
        )


def _precision() -> tuple[str, str]:
    """How a GPU may round the factors of products and convolutions; kernels are chosen by it."""
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined] # not in the stubs


@dataclasses.dataclass(eq=False, slots=True)
class Program:
    """One recording of a step.

    `values` are the graph's inputs, and after them the tensors that are only checked to be like before.

    Attributes:
        graph: the recorded operations; its placeholders are the first values.
        values: those that stay; the others are filled in at each call.
        given: `(value, tensor argument)` pairs of positions.
        held: `(tensor argument, tensor)`: arguments that must be this very tensor.
        moving: `(value, place)` of tensors looked up at each call.
        draws: `(value, draw)` in the order of drawing.
        stores: `(place, output)` of tensors that the step leaves in a place.
        grads_in: `(value, leaf)`: values that are the gradient of a value.
        grads_out: `(leaf, output)`: gradients that the step leaves; None as output takes one away.
        outputs: what each output of the graph is like.
        result: the returned structure, with `Output` and `Input` in the tensors' places.
        guards: the Python values that are taken for granted.
        pinned: by `id`, the value that a tensor is, and all places that hold it.
        optimizers: whose hyperparameters are tensors, to be brought up to date before each run.
        leaves: the values that have a `.grad`.
        filled: whether each leaf had one at the start.
        hooks: the hooks on each leaf.
        arguments: what the step was called with.
        written: the graph's inputs that it writes to, by position: their memory may be another in each call.
        setting: torch's state.
        stacks: the slots of the stacks within reach.
        stacked: the tensors known to have a member axis, at 0.
        generators: the random streams that it may draw from.
        choices: which operations could have run otherwise, and how.
        run: the compiled graph, as a function of the first `count` values.
        eager: whether it could not be compiled.
        memory: a context in which it runs: where its intermediates lie.
    """

    graph: fx.GraphModule
    values: list[torch.Tensor]
    given: list[tuple[int, int]]
    held: list[tuple[int, torch.Tensor]]
    moving: list[tuple[int, Place]]
    draws: list[tuple[int, Draw]]
    stores: list[tuple[Place, int]]
    grads_in: list[tuple[int, int]]
    grads_out: list[tuple[int, int | None]]
    outputs: list[Like]
    result: Any
    guards: Guards
    pinned: dict[int, tuple[int, list[Place]]]
    optimizers: list[Any]
    leaves: list[int]
    filled: list[bool]
    hooks: list[Any]
    arguments: Arguments
    written: set[int]
    setting: Setting
    stacks: list[Slots]
    stacked: list[torch.Tensor]
    generators: list[torch.Generator]
    choices: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    run: Callable[..., Sequence[torch.Tensor]] | None = None
    eager: bool = False
    memory: AbstractContextManager[Any] = dataclasses.field(default_factory=nullcontext)
    count: int = 0
    fixed_written: set[int] = dataclasses.field(default_factory=set)
    check: Callable[..., bool] | None = None

    @property
    def members(self) -> int:
        """M, as far as the stacked tensors agree on it; else 0."""
        sizes = {tensor.shape[0] for tensor in self.stacked}
        return sizes.pop() if len(sizes) == 1 else 0

    def prepare(self) -> None:
        """Derive what `match` compares."""
        self.check = tensor_check(self.values)
        self._note_memory()

    def _note_memory(self) -> None:
        changing = {index for index, _ in (*self.given, *self.moving, *self.grads_in, *self.draws)}
        self.fixed_written = {memory_key(self.values[index]) for index in self.written - changing}

    def can_copy(self, values: Sequence[torch.Tensor]) -> bool:
        """Whether copies of all that is written to are small enough to be made for trials, and have room."""
        written = [values[index] for index in self.written]
        size = sum(value.nbytes for value in written)
        return size <= COPIED and COPIES * size <= min(map(free_memory, {value.device for value in written}), default=0)

    def copies(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The graph's inputs among `values`, those that it writes to as copies in the same memory order."""
        return [copied(value) if index in self.written else value for index, value in enumerate(values[: self.count])]

    def match(self, arguments: Arguments) -> list[torch.Tensor] | None:
        """The values of this call, if the recording stands for it; else None."""
        if not self.arguments.like(arguments) or Setting.now() != self.setting:
            return None
        if not self.guards.hold() and not self._settle():
            return None
        values = self.values.copy()
        tensors = arguments.tensors
        for index, position in self.given:
            values[index] = tensors[position]
        for index, place in self.moving:
            values[index] = place.read()
        for index, leaf in self.grads_in:
            values[index] = values[leaf].grad  # type: ignore[assignment] # None does not pass the check
        return values if self._fits(values, tensors) else None

    def mismatch(self, arguments: Arguments) -> str:
        """Why `match` says no, in words."""
        if not self.arguments.like(arguments):
            return "an argument that is no tensor has another value"
        if Setting.now() != self.setting:
            return "grad mode, autocast or the default dtype is another"
        changes = list(self.guards.changes())
        return changes[0].what if changes else "a tensor is of another kind, or a gradient is there that was not"

    def _fits(self, values: list[torch.Tensor], tensors: list[torch.Tensor]) -> bool:
        if not self.check(*values):  # type: ignore[misc] # set by prepare()
            return False
        leaves = [values[index] for index in self.leaves]
        return (
            all(tensors[position] is tensor for position, tensor in self.held)
            and [leaf.grad is not None for leaf in leaves] == self.filled
            and list(map(_hooks_of, leaves)) == self.hooks
            and self._apart(values)
        )

    def _apart(self, values: list[torch.Tensor]) -> bool:
        """Whether the tensors that change from call to call share no memory that is written to."""
        if not self.written:
            return True
        storages = [memory_key(values[index]) for index, _ in (*self.given, *self.moving, *self.grads_in)]
        return self.fixed_written.isdisjoint(storages) and len(set(storages)) == len(storages)

    def _settle(self) -> bool:
        """Take over equal values, and tensors that were exchanged for others of their kind."""
        changes = self.guards.settle()
        return not changes or self._exchange(changes)

    def _exchange(self, changes: list[Change]) -> bool:
        """Look changed tensors up at each call from now on, if that is all that changed."""
        owners: dict[int, int] = {}
        for change in changes:
            if change.place is None or not _alike(change.before, change.now):
                return False
            owners[id(change.before)] = id(change.now)
        for before, now in owners.items():
            places = self.pinned[before][1] if before in self.pinned else []
            if not places or any(id(place.read()) != now for place in places):
                return False
        for before in owners:
            index, places = self.pinned.pop(before)
            self.moving.append((index, places[0]))
            self.guards = self.guards.without(places)
        self._note_memory()  # the check stays: it holds for what is exchanged, and would forget what else has changed
        return True

    @property
    def repeats(self) -> bool:
        """Whether it stands for the next step wherever it stands for one: all that one step leaves and another finds is
        written in place, or a gradient that it takes away before it looks."""
        after = dict(zip(self.leaves, self.filled, strict=True))
        after |= {leaf: output is not None for leaf, output in self.grads_out}
        carried = self.stores or self.grads_in or list(after.values()) != self.filled
        return not carried and all(draw.is_ahead for _, draw in self.draws)

    @property
    def fleeting(self) -> set[int]:
        """The outputs in whose place the next step's come: gradients that the step leaves and does not return."""
        returned = {leaf.index for leaf in tree_leaves(self.result) if type(leaf) is Output}
        return {output for _, output in self.grads_out if output is not None} - returned

    def replay(self, values: list[torch.Tensor]) -> Any:
        """Bring hyperparameters up to date, draw, run, put results in their places, and build what the step returns."""
        for optimizer in self.optimizers:
            optimizer.sync_hyperparameters()
        for index, draw in self.draws:
            values[index] = draw.take(values)
        self._let_go(values)
        with torch.no_grad(), self.memory:
            outputs = self.run(*values[: self.count])  # type: ignore[misc] # compiled by the caller
        self._leave(values, outputs)
        return self._returned(values, outputs)

    def replay_several(self, steps: Sequence[list[torch.Tensor]], several: Callable[..., Any]) -> list[Any]:
        """As many steps, all draws first; `several(run, inputs of each, fleeting)` gives the outputs of each."""
        for optimizer in self.optimizers:
            optimizer.sync_hyperparameters()
        for values in steps:
            for index, draw in self.draws:
                drawn = draw.take(values)
                values[index] = copied(drawn) if drawn is draw.example else drawn  # which the next would overwrite
        self._let_go(steps[0])
        with torch.no_grad(), self.memory:
            found = several(self.run, [values[: self.count] for values in steps], self.fleeting)
        self._leave(steps[-1], found[-1])
        return [self._returned(values, outputs) for values, outputs in zip(steps, found, strict=True)]

    def of_another_call(self, values: list[torch.Tensor], tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The values of a call like one that was matched, with other tensors given."""
        values = values.copy()
        for index, position in self.given:
            values[index] = tensors[position]
        return values

    def _let_go(self, values: list[torch.Tensor]) -> None:
        """Empty the gradients that will be filled: their memory may serve what comes. (Inputs are in `values`, too.)"""
        for leaf, _ in self.grads_out:
            values[leaf].grad = None

    def _leave(self, values: list[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        for place, output in self.stores:
            place.write(outputs[output])
        for leaf, output in self.grads_out:
            values[leaf].grad = None if output is None else outputs[output]

    def _returned(self, values: list[torch.Tensor], outputs: Sequence[torch.Tensor]) -> Any:
        if type(self.result) is Output:
            return outputs[self.result.index]
        return tree_map(lambda leaf: _resolve(leaf, outputs, values), self.result)


def hooks_on(leaves: Sequence[torch.Tensor]) -> list[Any]:
    """The hooks on each tensor, as values."""
    return [tuple(None if held is None else dict(held) for held in _hooks_of(leaf)) for leaf in leaves]


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in the same memory order, expanded or not, and in huge pages as the state of a stack is."""
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    once(in_huge_pages(copy)).copy_(once(tensor))
    return copy


def once(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory without what lies there more than once: an expanded tensor cannot be copied to."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and not stride:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor.detach()


def _resolve(leaf: Any, outputs: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> Any:
    if type(leaf) is Output:
        return outputs[leaf.index]
    return values[leaf.index] if type(leaf) is Input else leaf


def _alike(before: Any, now: Any) -> bool:
    """Whether a tensor without gradient was exchanged for one of its kind."""
    return (
        isinstance(before, torch.Tensor)
        and type(now) is type(before)
        and not (before.requires_grad or now.requires_grad)
        and (now.shape, now.stride(), now.dtype, now.device)
        == (before.shape, before.stride(), before.dtype, before.device)
    )
