"""What the rivals in torch's functional style have in common: state as dicts of tensors, one module as template."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.case import Batch, Case

Loss = Callable[..., Tensor]


def loss_of_one(case: Case, template: nn.Module) -> Loss:
    """`(params, buffers, *batch) -> loss` of one member. What is not in the dicts (frozen parts) is the template's."""

    def loss(params: dict[str, Tensor], buffers: dict[str, Tensor], *batch: Tensor) -> Tensor:
        return case.loss(lambda *inputs: functional_call(template, (params, buffers), inputs), *batch)

    return loss


def without_gradients(step: Callable[[Batch], Tensor]) -> Callable[[Batch], Tensor]:
    """Of a prediction."""

    def predict(batch: Batch) -> Tensor:
        with torch.no_grad():
            return step(batch)

    return predict


def leaves(params: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, to be differentiated by `.backward()`."""
    return {name: param.requires_grad_() for name, param in params.items()}


def clip_(case: Case, params: dict[str, Tensor]) -> None:
    """Clip the gradients of stacked leaves, member by member."""
    if case.recipe.clip is not None:
        clipped = case.recipe.clipped({name: param.grad for name, param in params.items()}, stacked=True)
        for name, param in params.items():
            param.grad = clipped[name]
