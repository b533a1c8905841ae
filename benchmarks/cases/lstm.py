"""An LSTM over 20 steps with a linear head, each member on its own sequences."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.case import Batch, Case


class Recurrent(nn.Module):
    """Reads (B, T, 16) and classifies by the last hidden state: (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 32, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.lstm(x)
        return self.head(hidden[:, -1])


def batch(generator: torch.Generator) -> Batch:
    return torch.randn(32, 20, 16, generator=generator), torch.randint(10, (32,), generator=generator)


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


CASES = (Case("lstm", "LSTM hidden 32, 20 steps, batch 32", Recurrent, batch, loss, members=(16,), shared=False),)
