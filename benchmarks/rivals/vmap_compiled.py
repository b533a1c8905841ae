"""torch's own way, compiled: the whole step as one graph, `vmap(grad_and_value(...))` and Adam.

Adam is written out as a pure function. Compiled around `torch.optim.Adam` and `.backward()`, the step
breaks into several graphs and spends its time in guards: four times as long for the MLP with 16 members.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state

from benchmarks.case import Batch, Case
from benchmarks.rival import LR, Rival, Running

Tensors = dict[str, Tensor]


def adam_(params: Tensors, grads: Tensors, first: Tensors, second: Tensors, count: Tensor) -> None:
    """One step of Adam (Kingma and Ba, 2015) with torch's default betas and eps, in place.

    `count` is float64, (1,): with a float32 one the bias corrections miss torch's by 1e-8, and Inductor
    (torch 2.13) loses what is written to a float64 tensor of no dimension.
    """
    count.add_(1)
    dtype = next(iter(params.values())).dtype
    scale1, scale2 = (1 - 0.9**count).to(dtype), (1 - 0.999**count).to(dtype)
    for name, param in params.items():
        first[name].lerp_(grads[name], 0.1)
        second[name].mul_(0.999).addcmul_(grads[name], grads[name], value=0.001)
        param.sub_(LR / scale1 * first[name] / ((second[name] / scale2).sqrt() + 1e-8))


def of_each(loss_of_one: Callable[..., Tensor], in_dims: tuple) -> Callable[..., tuple[Tensors, Tensor]]:
    """Each member's gradient of its own loss: vmap outside, grad inside."""
    return torch.vmap(grad_and_value(loss_of_one), in_dims)


def start(case: Case, models: list[nn.Module], differentiate=of_each) -> Running:
    stacked, buffers = stack_module_state(models)
    params = {name: param.detach() for name, param in stacked.items()}
    first = {name: torch.zeros_like(param) for name, param in params.items()}
    second = {name: torch.zeros_like(param) for name, param in params.items()}
    count = torch.zeros(1, dtype=torch.float64, device=next(iter(params.values())).device)
    template = models[0]

    def loss_of_one(params, buffers, *batch):
        return case.loss(lambda *inputs: functional_call(template, (params, buffers), inputs), *batch)

    grads_and_losses = differentiate(loss_of_one, (0, *case.in_dims))

    def whole(params, buffers, first, second, count, batch):
        grads, losses = grads_and_losses(params, buffers, *batch)
        adam_(params, grads, first, second, count)
        return losses

    compiled = torch.compile(whole, fullgraph=True)

    def step(batch: Batch) -> Tensor:
        return compiled(params, buffers, first, second, count, batch)

    return Running(step, lambda: {**params, **buffers})


RIVAL = Rival("vmap-compiled", "torch.vmap compiled", "torch.compile of the step, vmap(grad_and_value)", start)
