"""The critics of an off-policy agent, 23-256-256-1: few members, large matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.case import Batch, Case


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(23, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1))


def batch(generator: torch.Generator) -> Batch:
    return torch.randn(256, 23, generator=generator), torch.randn(256, 1, generator=generator)


def loss(model: nn.Module, state: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(model(state), target)


CASES = (Case("critics", "critics 23-256-256-1, batch 256", model, batch, loss, members=(2, 10)),)
