"""The compiled step with one gradient of the summed losses: grad outside, vmap inside.

Behind the other form on most rows, ahead of it on the larger transformer. It cannot run where the forward
writes buffers in place (BatchNorm), which functorch's grad refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.func import grad_and_value

from benchmarks.rival import Rival
from benchmarks.rivals import vmap_compiled


def of_sum(loss_of_one: Callable[..., Tensor], in_dims: tuple) -> Callable[..., tuple]:
    losses_of_all = torch.vmap(loss_of_one, in_dims)

    def summed(*args):
        losses = losses_of_all(*args)
        return losses.sum(), losses

    def grads_and_losses(*args):
        grads, (_, losses) = grad_and_value(summed, has_aux=True)(*args)
        return grads, losses

    return grads_and_losses


RIVAL = Rival(
    "vmap-sum-compiled",
    "torch.vmap compiled",
    "torch.compile of the step, grad of the summed losses of vmap",
    partial(vmap_compiled.start, differentiate=of_sum),
)
