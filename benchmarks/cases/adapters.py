"""W10: low-rank adapters (Hu et al., 2021) as plain modules, on one frozen transformer that all members share."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import folded, objectives
from benchmarks.case import Batch, Case
from benchmarks.cases import transformer

WIDTH, LAYERS, HEADS, TIME, RANK = 128, 4, 4, 64, 8


class LowRank(nn.Module):
    """What is added to a linear layer. `up` does not start at zero here: then `down` would have no gradient."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(RANK, ins) / ins**0.5)
        self.up = nn.Parameter(0.02 * torch.randn(outs, RANK))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down), self.up)


class Adapted(nn.Module):
    """The trunk with adapters beside its attention's and its perceptrons' layers: (B, T) -> (B, T, VOCABULARY)."""

    def __init__(self, trunk: transformer.Transformer) -> None:
        super().__init__()
        self.trunk = trunk
        self.qkv = nn.ModuleList(LowRank(WIDTH, 3 * WIDTH) for _ in range(LAYERS))
        self.wide = nn.ModuleList(LowRank(WIDTH, 4 * WIDTH) for _ in range(LAYERS))

    def forward(self, tokens: Tensor) -> Tensor:
        trunk = self.trunk
        x = trunk.tokens(tokens) + trunk.positions
        for block, qkv, wide in zip(trunk.blocks, self.qkv, self.wide, strict=True):
            x = x + self._attend(block.attention, block.norm1(x), qkv)
            h = block.norm2(x)
            first, activation, second = block.mlp
            x = x + second(activation(first(h) + wide(h)))
        return trunk.head(trunk.norm(x))

    def _attend(self, attention: transformer.Attention, x: Tensor, adapter: LowRank) -> Tensor:
        batch, time, width = x.shape
        whole = attention.qkv(x) + adapter(x)
        q, k, v = (part.view(batch, time, HEADS, -1).transpose(1, 2) for part in whole.chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return attention.out(y.transpose(1, 2).reshape(batch, time, width))


def batch(generator: torch.Generator) -> Batch:
    return transformer.sequences(8, TIME, generator)


CASES = (
    Case(
        "W10",
        f"low-rank adapters, r = {RANK}, on a frozen transformer d {WIDTH}, {LAYERS} layers, batch 8 x {TIME}",
        Adapted,
        batch,
        objectives.cross_entropy,
        members=(8, 64),
        shared=False,
        workload="W10",
        common=partial(transformer.Transformer, WIDTH, LAYERS, TIME, HEADS),
        rows=256,
        steps=4,
        objective="cross_entropy",
        folded=folded.adapters,
        in_jax="adapters",
    ),
)
