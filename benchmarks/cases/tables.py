"""W12: a model of clicks: 26 embedding tables and a perceptron over what they give."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import folded
from benchmarks.case import Batch, Case

TABLES, ROWS, WIDTH, BATCH = 26, 10_000, 16, 128


class Clicks(nn.Module):
    """Reads (B, TABLES) numbers of rows and gives one logit, (B, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(ROWS, WIDTH) for _ in range(TABLES))
        self.mlp = nn.Sequential(
            nn.Linear(TABLES * WIDTH, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 1)
        )

    def forward(self, rows: Tensor) -> Tensor:
        return self.mlp(torch.cat([table(rows[:, number]) for number, table in enumerate(self.tables)], dim=1))


def batch(generator: torch.Generator) -> Batch:
    rows = torch.randint(ROWS, (BATCH, TABLES), generator=generator)
    return rows, torch.randint(2, (BATCH, 1), generator=generator).float()


def loss(model: nn.Module, rows: Tensor, clicked: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(model(rows), clicked)


CASES = (
    Case(
        "W12",
        "26 embedding tables x 10k x 16 and an MLP, batch 128",
        Clicks,
        batch,
        loss,
        members=(10,),
        workload="W12",
        rows=4_000,
        steps=4,
        objective="logistic",
        folded=folded.clicks,
        in_jax="clicks",
    ),
)
