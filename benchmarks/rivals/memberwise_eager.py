"""Memberwise without capture: a stack, `memberwise.vmap` of the loss, and the member-wise Adam."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

import memberwise
from benchmarks.case import Batch, Case
from benchmarks.rival import LR, Rival, Running


def as_it_is(step: Callable) -> Callable:
    return step


def start(case: Case, models: list[nn.Module], capture: Callable = as_it_is) -> Running:
    stack = memberwise.stack(models)
    optimizer = memberwise.optim.Adam(stack.parameters(), lr=LR)
    losses_of_all = memberwise.vmap(case.loss, in_dims=case.in_dims)

    def train(batch: Batch) -> Tensor:
        optimizer.zero_grad()
        losses = losses_of_all(stack, *batch)
        losses.sum().backward()
        optimizer.step()
        return losses.detach()

    return Running(capture(train), stack.state_dict)


RIVAL = Rival("memberwise", "memberwise", "memberwise.vmap of the loss over a stack, memberwise.optim.Adam", start)
