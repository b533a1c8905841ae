"""The loop over members, each step whole and compiled: one graph for all of them, called with a member's tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import grad_and_value

from benchmarks import functional
from benchmarks.case import Batch, Case, stacked, watched
from benchmarks.rival import Rival, Running


def start(case: Case, models: list[nn.Module]) -> Running:
    loss_of_one = functional.loss_of_one(case, models[0])
    members = [stacked([model]) for model in models]
    states = [tuple({name: value[0] for name, value in part.items()} for part in each) for each in members]
    moments = [case.recipe.moments(params) for params, _ in states]

    def whole(params, buffers, moments, batch):
        if not case.trains:
            return loss_of_one(params, buffers, *batch)
        grads, loss = grad_and_value(loss_of_one)(params, buffers, *batch)
        case.recipe.update_(params, case.recipe.clipped(grads, stacked=False), moments)
        return loss

    compiled = torch.compile(whole, fullgraph=True)

    def step(batch: Batch) -> Tensor:
        each = enumerate(zip(states, moments, strict=True))
        return torch.stack([compiled(*state, mine, case.of_member(batch, i)) for i, (state, mine) in each])

    def state() -> dict[str, Tensor]:
        whole = [{**params, **buffers} for params, buffers in states]
        return {name: torch.stack([each[name] for each in whole]) for name in watched(models[0])}

    return Running(step if case.trains else functional.without_gradients(step), state)


RIVAL = Rival("loop-compiled", "loop compiled", "torch.compile of one member's whole step, member by member", start)
