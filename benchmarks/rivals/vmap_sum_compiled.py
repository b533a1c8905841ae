"""The compiled step with one gradient of the summed losses: grad outside, vmap inside.

Behind the other form on most rows, ahead of it on the larger transformer. It cannot run where the forward
writes buffers in place (BatchNorm), which functorch's grad refuses.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import grad_and_value

from benchmarks.case import Case
from benchmarks.rival import Cannot, Rival, Running
from benchmarks.rivals import vmap_compiled


def of_sum(loss_of_one: Callable[..., Tensor], in_dims: tuple, randomness: str) -> Callable[..., tuple]:
    losses_of_all = torch.vmap(loss_of_one, in_dims, randomness=randomness)

    def summed(*args):
        losses = losses_of_all(*args)
        return losses.sum(), losses

    def grads_and_losses(*args):
        grads, (_, losses) = grad_and_value(summed, has_aux=True)(*args)
        return grads, losses

    return grads_and_losses


def start(case: Case, models: list[nn.Module]) -> Running:
    if not case.trains:
        raise Cannot("a prediction has no gradient: it is the compiled torch.vmap")
    return vmap_compiled.start(case, models, differentiate=of_sum)


RIVAL = Rival(
    "vmap-sum-compiled",
    "torch.vmap compiled",
    "torch.compile of the step, grad of the summed losses of vmap",
    start,
)
