"""torch's other way, eager: `vmap(grad_and_value(...))`, as torch's tutorial on ensembles has it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import grad_and_value

from benchmarks import functional
from benchmarks.case import Batch, Case, stacked
from benchmarks.rival import Cannot, Rival, Running


def start(case: Case, models: list[nn.Module]) -> Running:
    if not case.trains:
        raise Cannot("a prediction has no gradient: it is torch.vmap")
    params, buffers = stacked(models)
    one = functional.loss_of_one(case, models[0])
    grads_and_losses = torch.vmap(grad_and_value(one), (0, *case.in_dims), randomness=case.randomness)
    optimizer = case.recipe.of_torch(params.values(), fused=True)

    def step(batch: Batch) -> Tensor:
        grads, losses = grads_and_losses(params, buffers, *batch)
        for name, param in params.items():
            param.grad = grads[name].contiguous()  # torch's fused kernels on a CPU (2.13) do not look at strides
        functional.clip_(case, params)
        optimizer.step()
        return losses

    return Running(step, lambda: {**params, **buffers})


RIVAL = Rival("vmap-grad", "torch.vmap", "torch.vmap of grad_and_value, fused optimizer", start)
