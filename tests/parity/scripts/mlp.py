"""A plain PyTorch script: an MLP with dropout on noisy inputs, AdamW. `python mlp.py SEED` prints its weights."""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.nn import functional as F

STEPS = 12


def make_model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.4), nn.Linear(16, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 3)
    ).double()


def data() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.linspace(-1, 1, 20 * 6, dtype=torch.float64).reshape(20, 6).sin()
    return x, torch.arange(20) % 3


def loss_fn(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x + 0.1 * torch.randn_like(x)), y)


def train(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = make_model()
    x, y = data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.05)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_fn(model, x, y).backward()
        optimizer.step()
    return model


if __name__ == "__main__":
    for name, value in train(int(sys.argv[1])).state_dict().items():
        print(name, value.tolist())
