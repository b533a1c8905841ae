"""estimate(): how much memory a member's step takes, and how many members fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from memberwise.errors import ArgumentError, fail
from memberwise.generators import global_generators, restoring
from memberwise.metering import Meter, free_memory, in_words, shares
from memberwise.module import Stack
from memberwise.outcomes import Case
from memberwise.trees import tree_leaves

FEW, MORE = 3, 6
"""Numbers of members with which a step is measured: what lies between is what three members take."""


class Estimate(NamedTuple):
    """What a step takes.

    Attributes:
        members: how many members fit into `available`.
        per_member: bytes that each member takes at the peak of a step, with its parameters, gradients and what the
            optimizer keeps for it.
        base: bytes that are taken for all members together (what they share).
        available: bytes that there are.
    """

    members: int
    per_member: int
    base: int
    available: int

    def __str__(self) -> str:
        return (
            f"{self.members} members fit into {in_words(self.available)}: "
            f"{in_words(self.per_member)} a member, {in_words(self.base)} for all"
        )


def estimate(
    stack: Stack,
    *inputs: Any,
    loss_fn: Callable[..., Any] | None = None,
    optimizer_copies: int = 2,
    memory: int | None = None,
) -> Estimate:
    """How many members of this kind fit into memory, by a step of a few of them.

    A step (forward, and backward if anything requires a gradient) is run with three members and with six, on copies,
    and the memory that its operations make is counted. What kernels take for themselves while they run is not seen, so
    leave some room: on a GPU, a tenth.

    Shapes: inputs as in `stack(*inputs)`: shared, or `each(x)` with M first.

    Args:
        stack: any number of members, in the mode in which they shall run.
        inputs: what the stack, or `loss_fn` after the model, is called with.
        loss_fn: `loss_fn(model, *inputs)`, written for one model; by default the model's own outputs are summed.
        optimizer_copies: tensors as large as a parameter that the optimizer keeps: 2 for Adam, 1 for momentum, 0.
        memory: bytes that there are; by default what is free on the stack's device.

    Returns:
        the number of members, and what it is made of.

    Raises:
        ArgumentError: (a ValueError) `memory` or `optimizer_copies` is negative [MW603].

    >>> import memberwise
    >>> stack = memberwise.build(lambda: torch.nn.Linear(30, 20), seeds=range(2))
    >>> found = estimate(stack, torch.ones(5, 30), memory=10**6)
    >>> found.per_member >= 4 * (30 * 20 + 20) * 4           # parameters, gradients, Adam's two
    True
    >>> found.members == (found.available - found.base) // found.per_member
    True
    """
    for name, value in (("memory", memory), ("optimizer_copies", optimizer_copies)):
        if value is not None and value < 0:
            fail(ArgumentError, "MW603", f"{name}: expected 0 or more, found {value}")
    case = Case(stack, inputs, loss_fn)
    taken = _taken(case, FEW, optimizer_copies), _taken(case, MORE, optimizer_copies)
    per_member, base = shares(FEW, MORE, taken)
    available = free_memory(next(stack.parameters(), torch.empty(0)).device) if memory is None else memory
    return Estimate(max((available - base) // per_member, 0), per_member, base, available)


def _taken(case: Case, count: int, optimizer_copies: int) -> int:
    """Bytes of state and of a step at its peak, with so many members."""
    with restoring(global_generators()):
        part = case.only([k % len(case.stack) for k in range(count)]).copied(wide=False)
        parameters = [parameter for parameter in part.stack.parameters() if parameter.requires_grad]
        state = sum(tensor.nbytes for tensor in part.tensors())
        with Meter() as meter:
            _step(part)
        return state + meter.most + optimizer_copies * sum(parameter.nbytes for parameter in parameters)


def _step(case: Case) -> None:
    roots = [leaf for leaf in tree_leaves(case.outputs()) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    if roots:
        torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])
