"""A small multilayer perceptron, 32-64-64-10: the workload where Python costs the most."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.case import Batch, Case


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def batch(generator: torch.Generator) -> Batch:
    return torch.randn(64, 32, generator=generator), torch.randint(10, (64,), generator=generator)


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


CASES = (Case("mlp", "MLP 32-64-64-10, batch 64", model, batch, loss, members=(4, 16, 64, 256)),)
