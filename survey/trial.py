"""One comparison: M modules in a loop, as a stack, and as torch.func runs them, on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

import memberwise
from memberwise.engine import trace
from memberwise.trees import tree_leaves, tree_map
from survey.found import Found, gathered, joined, tracked

WAYS = {"gradients": 1, "no gradients": 0, "second gradients": 2, "autocast": 1}
"""How a trial runs -> how many times it is differentiated."""


@dataclass(frozen=True)
class Trial:
    """What is compared.

    Attributes:
        make: makes M modules of one class, in one mode; the same each time.
        inputs: of each member, `(args, kwargs)`.
        shared: whether the first member's inputs serve all.
        way: one of WAYS.
    """

    make: Callable[[], list[nn.Module]]
    inputs: Sequence[Any]
    shared: bool
    way: str

    @cached_property
    def state(self) -> list[torch.Tensor]:
        """Parameters and buffers of one model."""
        model = self.make()[0]
        return [*model.parameters(), *model.buffers()]

    @property
    def lazy(self) -> bool:
        """Whether the models get their parameters in their first call."""
        return any(map(is_lazy, self.state))

    @property
    def is_mapped(self) -> bool:
        """Whether anything has an entry a member: of nothing, torch.func makes no M results."""
        return not self.shared or bool(self.state)

    @property
    def members(self) -> range:
        """Their numbers."""
        return range(len(self.inputs))

    def own(self, member: int) -> Any:
        """Copies of a member's inputs."""
        return copied(self.inputs[0 if self.shared else member], torch.clone)

    def all(self, mark: Callable[[torch.Tensor], Any]) -> Any:
        """Copies of all members' inputs in one structure: shared, or stacked and marked."""
        return self.own(0) if self.shared else stacked([self.own(i) for i in self.members], mark)

    def wide(self) -> Trial:
        """The same in float64."""
        inputs = [copied(own, torch.Tensor.double) for own in self.inputs]
        return replace(self, make=lambda: [model.double() for model in self.make()], inputs=inputs)

    def context(self) -> AbstractContextManager[Any]:
        """What the forward runs in."""
        if self.way == "no gradients":
            return torch.no_grad()
        return torch.autocast("cpu", torch.bfloat16) if self.way == "autocast" else nullcontext()

    def found(self, out: Any, members: Sequence[int], inputs: Any, params: Any, buffers: Any) -> Found:
        """What a run gave."""
        wanted = {**dict(params), **tracked(inputs)}
        return gathered(out, members, wanted, dict(buffers), shared=self.shared, orders=WAYS[self.way])


def copied(tree: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A structure with its tensors copied, floating ones by `change`; what was one object stays one."""
    known: dict[int, torch.Tensor] = {}

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if id(leaf) not in known:
            own = leaf.detach()
            own = change(own) if own.is_floating_point() else own.clone()
            known[id(leaf)] = own.requires_grad_(leaf.requires_grad)
        return known[id(leaf)]

    return tree_map(one, tree)


def stacked(trees: Sequence[Any], mark: Callable[[torch.Tensor], Any]) -> Any:
    """One structure of the members' inputs; the sizes of a packed sequence, which C++ code reads, stay shared."""
    known: dict[int, Any] = {}
    columns = zip(*map(tree_leaves, trees), strict=True)
    packed = [node for node in _nodes(trees[0]) if isinstance(node, nn.utils.rnn.PackedSequence)]
    sizes = {id(sequence.batch_sizes) for sequence in packed}

    def one(leaf: Any) -> Any:
        column = next(columns)
        if not isinstance(leaf, torch.Tensor) or id(leaf) in sizes:
            return leaf
        if id(leaf) not in known:
            whole = torch.stack([entry.detach() for entry in column])
            known[id(leaf)] = mark(whole.requires_grad_(leaf.requires_grad))
        return known[id(leaf)]

    return tree_map(one, trees[0])


def _nodes(tree: Any) -> Iterator[Any]:
    yield tree
    if isinstance(tree, tuple | list | dict):
        for entry in tree.values() if isinstance(tree, dict) else tree:
            yield from _nodes(entry)


def _stream(member: int) -> int:
    return 1000 + member


def alone(trial: Trial) -> tuple[Found, bool]:
    """Each member by itself, in plain PyTorch; and whether it drew."""
    columns, drew, lazy = [], False, trial.lazy
    for i, model in enumerate(trial.make()):
        args, kwargs = trial.own(i)
        if i == 0 or not lazy:  # lazy ones draw their parameters here, one after another
            torch.manual_seed(_stream(i))
        before = torch.get_rng_state()
        with trial.context():
            out = model(*args, **kwargs)
        drew |= not torch.equal(before, torch.get_rng_state())
        columns.append(trial.found(out, [i], (args, kwargs), model.named_parameters(), model.named_buffers()))
    return joined(columns, trial.shared), drew


def together(trial: Trial) -> tuple[Found, list[trace.Entry]]:
    """As one stack, by one call and one backward; and how each operation ran."""
    example, named = trial.own(0) if trial.lazy else (None, None)
    models = trial.make()
    torch.manual_seed(_stream(0))
    stack = memberwise.stack(models, example_inputs=example, example_kwargs=named)
    stack.generators = [torch.Generator().manual_seed(_stream(i)) for i in trial.members]
    args, kwargs = trial.all(memberwise.each)
    with nullcontext() if WAYS[trial.way] > 1 else trace.recording() as record:  # a record keeps layers from their way
        with trial.context():
            out = stack(*args, **kwargs)
        found = trial.found(out, trial.members, (args, kwargs), stack.named_parameters(), stack.named_buffers())
    return found, [*record.entries.values()] if record is not None else []


def by_torch(trial: Trial) -> Found:
    """By `torch.func`: stack_module_state, functional_call and vmap."""
    models = trial.make()
    params, buffers = torch.func.stack_module_state(models)  # type: ignore[arg-type] # any sequence will do
    args, kwargs = trial.all(lambda leaf: leaf)
    dim = None if trial.shared else 0
    sizes = {id(node.batch_sizes) for node in _nodes((args, kwargs)) if isinstance(node, nn.utils.rnn.PackedSequence)}

    def placed(leaf: Any) -> int | None:
        return dim if isinstance(leaf, torch.Tensor) and id(leaf) not in sizes else None

    def call(params: Any, buffers: Any, args: Any, kwargs: Any) -> Any:
        return torch.func.functional_call(models[0], (params, buffers), args, kwargs)

    dims = (0, 0, *tree_map(placed, (args, kwargs)))
    with trial.context():
        out = torch.vmap(call, dims, randomness="different")(params, buffers, args, kwargs)
    return trial.found(out, trial.members, (args, kwargs), params.items(), buffers.items())
