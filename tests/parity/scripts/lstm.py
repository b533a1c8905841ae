"""A plain PyTorch script: an LSTM with dropout between its layers on randomly masked inputs, Adam."""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.nn import functional as F

STEPS = 8


class Forecaster(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 6, num_layers=2, batch_first=True, dropout=0.4)
        self.head = nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, _ = self.lstm(x)
        return self.head(F.dropout(out[:, -1], 0.2, self.training)).squeeze(-1)


def make_model() -> nn.Module:
    return Forecaster().double()


def data() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.linspace(0, 9, 5 * 7 * 3, dtype=torch.float64).view(5, 7, 3).sin()
    return x, x.mean((1, 2))


def loss_fn(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    keep = torch.bernoulli(torch.full(x.shape[:2], 0.9, dtype=x.dtype))
    return F.smooth_l1_loss(model(x * keep[..., None]), y)


def train(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = make_model()
    x, y = data()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_fn(model, x, y).backward()
        optimizer.step()
    return model


if __name__ == "__main__":
    for name, value in train(int(sys.argv[1])).state_dict().items():
        print(name, value.tolist())
