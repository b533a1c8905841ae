"""A small causal pre-norm transformer in its own blocks; each member reads its own sequences."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import folded
from benchmarks.case import Batch, Case

VOCABULARY = 64


class Attention(nn.Module):
    """Causal self-attention.

    Without biases: softmax does not see the bias of a key, so that its true gradient is zero, and Adam
    makes a full step of whatever rounding left there. No two orders of summation would then agree.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = (
            part.view(batch, time, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, time, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Token and position embeddings, blocks, a last norm and a head: (B, T) -> (B, T, VOCABULARY)."""

    def __init__(self, width: int, layers: int, time: int, heads: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Parameter(0.02 * torch.randn(time, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions
        return self.head(self.norm(self.blocks(x)))


def sequences(size: int, time: int, generator: torch.Generator) -> Batch:
    """Random tokens; the target is the next one."""
    tokens = torch.randint(VOCABULARY, (size, time + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def loss(model: nn.Module, tokens: Tensor, following: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens).flatten(0, 1), following.flatten())


def case(width: int, layers: int, size: int, time: int, members: tuple[int, ...]) -> Case:
    return Case(
        f"transformer-{width}",
        f"causal transformer d {width}, {layers} layer{'s' * (layers > 1)}, batch {size} x {time}",
        partial(Transformer, width, layers, time),
        partial(sequences, size, time),
        loss,
        members=members,
        shared=False,
        workload="W8",
        objective="cross_entropy",
        folded=folded.transformer,
        in_jax="transformer",
    )


CASES = (case(32, 1, 4, 16, members=(32,)), case(64, 2, 8, 64, members=(8,)))
