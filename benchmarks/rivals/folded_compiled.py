"""The model of all members written by hand (`folded/`), its whole step compiled."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import grad_and_value

from benchmarks import functional
from benchmarks.case import Batch, Case, Unwritten, stacked
from benchmarks.folded import layers
from benchmarks.rival import Cannot, Rival, Running


def start(case: Case, models: list[nn.Module]) -> Running:
    if isinstance(case.folded, Unwritten):
        raise Cannot(case.folded.why)
    params, buffers = stacked(models)
    moments = case.recipe.moments(params)
    losses_of_all = outputs_and_losses(case, models[0])

    def summed(params, buffers, *batch):
        losses, new = losses_of_all(params, buffers, *batch)
        return losses.sum(), (losses, new)

    def whole(params, buffers, moments, batch):
        if not case.trains:
            return losses_of_all(params, buffers, *batch)[0]
        grads, (_, (losses, new)) = grad_and_value(summed, has_aux=True)(params, buffers, *batch)
        case.recipe.update_(params, case.recipe.clipped(grads, stacked=True), moments)
        for name, value in new.items():
            buffers[name].copy_(value)
        return losses

    compiled = torch.compile(whole, fullgraph=True)

    def step(batch: Batch) -> Tensor:
        return compiled(params, buffers, moments, batch)

    return Running(step if case.trains else functional.without_gradients(step), lambda: {**params, **buffers})


def outputs_and_losses(case: Case, template: nn.Module):
    """`(params, buffers, *batch)` to the losses, or predictions, of all members, and the new buffers."""
    mode = layers.Mode(case.trains, case.still is not None, getattr(template, "trunk", None))

    def losses_of_all(params, buffers, *batch):
        if not case.trains:
            return folded(params, buffers, *batch)
        out, new = folded(params, buffers, *batch[:-1])
        return layers.losses(case.objective, out, batch[-1], case.shared), new

    def folded(params, buffers, *inputs):
        if case.precision is None:
            return case.folded(params, buffers, *inputs, mode=mode)
        with torch.autocast(inputs[0].device.type, dtype=case.precision):
            out, new = case.folded(params, buffers, *inputs, mode=mode)
        return out.float() if out.dtype is case.precision else out, new

    return losses_of_all


RIVAL = Rival("folded-compiled", "folded by hand", "the model of all members by hand, its step compiled", start)
