"""torch's own way, compiled: the whole step as one graph, `vmap(grad_and_value(...))` and the optimizer.

The optimizer is written out as a pure function. Compiled around `torch.optim.Adam` and `.backward()`, the step
breaks into several graphs and spends its time in guards: four times as long for the MLP with 16 members.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import grad_and_value

from benchmarks import functional
from benchmarks.case import Batch, Case, stacked
from benchmarks.rival import Rival, Running


def of_each(loss_of_one: Callable[..., Tensor], in_dims: tuple, randomness: str) -> Callable[..., tuple]:
    """Each member's gradient of its own loss: vmap outside, grad inside."""
    return torch.vmap(grad_and_value(loss_of_one), in_dims, randomness=randomness)


def start(case: Case, models: list[nn.Module], differentiate: Callable = of_each) -> Running:
    params, buffers = stacked(models)
    moments = case.recipe.moments(params)
    one, in_dims = functional.loss_of_one(case, models[0]), (0, *case.in_dims)
    grads_and_losses = differentiate(one, in_dims, case.randomness)
    outputs = torch.vmap(one, in_dims)

    def whole(params, buffers, moments, batch):
        if not case.trains:
            return outputs(params, buffers, *batch)
        grads, losses = grads_and_losses(params, buffers, *batch)
        case.recipe.update_(params, case.recipe.clipped(grads, stacked=True), moments)
        return losses

    compiled = torch.compile(whole, fullgraph=True)

    def step(batch: Batch) -> Tensor:
        return compiled(params, buffers, moments, batch)

    return Running(step if case.trains else functional.without_gradients(step), lambda: {**params, **buffers})


RIVAL = Rival("vmap-compiled", "torch.vmap compiled", "torch.compile of the step, vmap(grad_and_value)", start)
