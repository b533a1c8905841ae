"""The loop over members in eager PyTorch, each with its own Adam at its default arguments."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.case import Batch, Case
from benchmarks.rival import LR, Rival, Running


def start(case: Case, models: list[nn.Module], **options: bool) -> Running:
    optimizers = [torch.optim.Adam(model.parameters(), lr=LR, **options) for model in models]

    def step(batch: Batch) -> Tensor:
        losses = []
        for member, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            loss = case.loss(model, *case.of_member(batch, member))
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    def state() -> dict[str, Tensor]:
        dicts = [model.state_dict() for model in models]
        return {name: torch.stack([each[name] for each in dicts]) for name in dicts[0]}

    return Running(step, state)


RIVAL = Rival("loop", "loop", "a Python loop over the members, torch.optim.Adam as it comes", start)
