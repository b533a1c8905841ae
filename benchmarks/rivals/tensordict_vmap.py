"""tensordict's way: the members' parameters as one `TensorDict`, put into the module under torch.vmap."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks import functional
from benchmarks.case import Batch, Case, watched
from benchmarks.rival import Cannot, Rival, Running


def start(case: Case, models: list[nn.Module]) -> Running:
    from tensordict import TensorDict  # it may not be installed

    if case.common is not None:
        raise Cannot("from_modules stacks what is one and the same in all members")
    state = TensorDict.from_modules(*models, as_module=True)
    template = models[0]

    def loss_of_one(state: TensorDict, *batch: Tensor) -> Tensor:
        with state.to_module(template):
            return case.loss(template, *batch)

    losses_of_all = torch.vmap(loss_of_one, case.in_dims, randomness=case.randomness)
    names = list(watched(template))

    def named() -> dict[str, Tensor]:
        return {name: state[tuple(name.split("."))] for name in names}

    if not case.trains:
        return Running(functional.without_gradients(lambda batch: losses_of_all(state, *batch)), named)
    params = {name: value for name, value in named().items() if value.requires_grad}
    optimizer = case.recipe.of_torch(params.values(), fused=True)

    def step(batch: Batch) -> Tensor:
        optimizer.zero_grad()
        losses = losses_of_all(state, *batch)
        losses.sum().backward()
        functional.clip_(case, params)
        optimizer.step()
        return losses.detach()

    return Running(step, named)


RIVAL = Rival(
    "tensordict",
    "tensordict",
    "TensorDict.from_modules and torch.vmap, backward(), fused optimizer",
    start,
    needs=("tensordict",),
)
