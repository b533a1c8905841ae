"""A plain PyTorch script: bags of words, each step on its own random minibatch, with word dropout; SGD."""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.nn import functional as F

STEPS, WORDS = 10, 11


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 5, padding_idx=0)
        self.body = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Dropout(0.3), nn.Linear(8, 2))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.body(self.words(tokens).mean(1))


def make_model() -> nn.Module:
    return Bag().double()


def data() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = (torch.arange(24 * 4) * 7 % 31 % WORDS).view(24, 4)
    return tokens, tokens.sum(1) % 2


def loss_fn(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    batch = torch.randperm(x.shape[0])[:8]
    tokens = x[batch].masked_fill(torch.rand(8, x.shape[1]) < 0.2, 0)
    return F.cross_entropy(model(tokens), y[batch])


def train(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = make_model()
    x, y = data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_fn(model, x, y).backward()
        optimizer.step()
    return model


if __name__ == "__main__":
    for name, value in train(int(sys.argv[1])).state_dict().items():
        print(name, value.tolist())
