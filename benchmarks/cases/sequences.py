"""W9: an LSTM over a hundred steps, each member on its own sequences."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks import folded, objectives
from benchmarks.case import Batch, Case
from benchmarks.recipe import Recipe

INS, HIDDEN, STEPS, BATCH = 32, 128, 100, 32


class Recurrent(nn.Module):
    """Reads (B, T, INS) and classifies by the last hidden state: (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(INS, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.lstm(x)
        return self.head(hidden[:, -1])


def batch(generator: torch.Generator) -> Batch:
    return torch.randn(BATCH, STEPS, INS, generator=generator), torch.randint(10, (BATCH,), generator=generator)


CASES = (
    Case(
        "W9",
        "LSTM hidden 128, 100 steps, batch 32",
        Recurrent,
        batch,
        objectives.cross_entropy,
        members=(5, 32),
        shared=False,
        workload="W9",
        recipe=Recipe(clip=1.0),
        rows=256,
        objective="cross_entropy",
        folded=folded.lstm,
        in_jax="lstm",
        flops=3 * 2 * 4 * HIDDEN * (INS + HIDDEN) * STEPS * BATCH,
    ),
)
