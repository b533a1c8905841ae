"""torch's own way, eager: state as stacked tensors, functional_call, torch.vmap, `.backward()`, one fused optimizer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks import functional
from benchmarks.case import Batch, Case, stacked
from benchmarks.rival import Rival, Running


def as_it_is(losses_of_all: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return losses_of_all


def start(case: Case, models: list[nn.Module], compiled: Callable = as_it_is) -> Running:
    params, buffers = stacked(models)
    one = functional.loss_of_one(case, models[0])
    losses_of_all = compiled(torch.vmap(one, (0, *case.in_dims), randomness=case.randomness))

    def state() -> dict[str, Tensor]:
        return {**params, **buffers}

    if not case.trains:
        return Running(functional.without_gradients(lambda batch: losses_of_all(params, buffers, *batch)), state)
    functional.leaves(params)
    optimizer = case.recipe.of_torch(params.values(), fused=True)

    def step(batch: Batch) -> Tensor:
        optimizer.zero_grad()
        losses = losses_of_all(params, buffers, *batch)
        losses.sum().backward()
        functional.clip_(case, params)
        optimizer.step()
        return losses.detach()

    return Running(step, state)


RIVAL = Rival("vmap", "torch.vmap", "torch.vmap over functional_call, backward(), fused optimizer", start)
