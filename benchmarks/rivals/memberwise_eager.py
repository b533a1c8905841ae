"""Memberwise without capture: a stack, `memberwise.vmap` of the loss, and the member-wise optimizer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import memberwise
from benchmarks.case import Batch, Case, watched
from benchmarks.rival import Rival, Running


def as_it_is(step: Callable) -> Callable:
    return step


def start(case: Case, models: list[nn.Module], capture: Callable = as_it_is) -> Running:
    stack = memberwise.stack(models, shared="trunk.*") if case.common else memberwise.stack(models)
    names = list(watched(models[0]))
    if case.still is not None:
        stack.generators = streams(case, len(models), next(stack.parameters()).device)
    losses_of_all = memberwise.vmap(case.loss, in_dims=case.in_dims)

    def state() -> dict[str, Tensor]:
        held = stack.state_dict()
        return {name: held[name] for name in names}

    if not case.trains:

        def predict(batch: Batch) -> Tensor:
            with torch.no_grad():
                return losses_of_all(stack, *batch)

        return Running(capture(predict), state)
    return Running(capture(training(case, stack, losses_of_all)), state)


def training(case: Case, stack: memberwise.Stack, losses_of_all: Callable[..., Tensor]) -> Callable[[Batch], Tensor]:
    optimizer = case.recipe.of_memberwise([param for param in stack.parameters() if param.requires_grad])
    clip = case.recipe.clip

    def train(batch: Batch) -> Tensor:
        optimizer.zero_grad()
        losses = losses_of_all(stack, *batch)
        losses.sum().backward()
        if clip is not None:
            memberwise.clip_grad_norm_([param for param in stack.parameters() if param.requires_grad], clip)
        optimizer.step()
        return losses.detach()

    return train


def streams(case: Case, members: int, device: torch.device) -> list[torch.Generator]:
    """Each member's random numbers as they go on after it was made; on another device from its seed."""
    if device.type != "cpu":
        return [torch.Generator(device).manual_seed(member) for member in range(members)]
    found = []
    with torch.random.fork_rng(devices=[]):
        for member in range(members):
            case.member(member)
            found.append(torch.Generator().set_state(torch.get_rng_state()))
    return found


RIVAL = Rival(
    "memberwise",
    "memberwise",
    "memberwise.vmap of the loss over a stack, the member-wise optimizer",
    start,
    draws_alone=True,
)
