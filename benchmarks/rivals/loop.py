"""The loop over members in eager PyTorch, each with its own optimizer at its default arguments."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.case import Batch, Case, watched
from benchmarks.rival import Rival, Running


def start(case: Case, models: list[nn.Module], **options: bool) -> Running:
    def state() -> dict[str, Tensor]:
        held = [watched(model) for model in models]
        return {name: torch.stack([each[name].detach() for each in held]) for name in held[0]}

    return Running(training(case, models, **options) if case.trains else predicting(case, models), state)


def training(case: Case, models: list[nn.Module], **options: bool):
    trained = [[param for param in model.parameters() if param.requires_grad] for model in models]
    optimizers = [case.recipe.of_torch(params, **options) for params in trained]
    clip = case.recipe.clip

    def step(batch: Batch) -> Tensor:
        losses = []
        for member, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            loss = case.loss(model, *case.of_member(batch, member))
            loss.backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(trained[member], clip)
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    return step


def predicting(case: Case, models: list[nn.Module]):
    def step(batch: Batch) -> Tensor:
        with torch.no_grad():
            return torch.stack([case.loss(model, *case.of_member(batch, i)) for i, model in enumerate(models)])

    return step


RIVAL = Rival("loop", "loop", "a Python loop over the members, torch's optimizer as it comes", start)
