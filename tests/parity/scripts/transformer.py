"""A plain PyTorch script: a causal transformer with dropout in attention and residuals, AdamW, clipping."""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.nn import functional as F

STEPS, WORDS, LENGTH, WIDTH = 6, 7, 6, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH), nn.Dropout(0.2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1 if self.training else 0.0)
        x = x + F.dropout(self.out(y.transpose(1, 2).reshape(b, t, c)), 0.2, self.training)
        return x + self.mlp(self.norm2(x))


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.drop, self.blocks = nn.Dropout(0.1), nn.Sequential(Block(), Block())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.token.weight
        nn.init.normal_(self.token.weight, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.drop(self.token(tokens) + self.place(torch.arange(tokens.shape[1])))
        return self.head(self.norm(self.blocks(x)))


def make_model() -> nn.Module:
    return Language().double()


def data() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = (torch.arange(4 * (LENGTH + 1)) * 5 % 11 % WORDS).view(4, LENGTH + 1)
    return tokens[:, :-1], tokens[:, 1:]


def loss_fn(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def train(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = make_model()
    x, y = data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_fn(model, x, y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


if __name__ == "__main__":
    for name, value in train(int(sys.argv[1])).state_dict().items():
        print(name, value.tolist())
