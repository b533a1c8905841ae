"""Low-rank adapters: the trunk's layers run on the rows of all members at once, the adapters as `bmm`."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.folded.layers import Mode, Tensors, attend


def adapters(params: Tensors, buffers: Tensors, tokens: Tensor, mode: Mode) -> tuple[Tensor, Tensors]:
    """Of tokens (M, B, T): (M, B, T, vocabulary)."""
    trunk = mode.trunk
    members, batch, time = tokens.shape
    x = (trunk.tokens(tokens) + trunk.positions).flatten(1, 2)
    for number, block in enumerate(trunk.blocks):
        h = block.norm1(x)
        qkv = block.attention.qkv(h) + low_rank(params, f"qkv.{number}", h)
        x = x + block.attention.out(attend(qkv, members, batch, block.attention.heads))
        h = block.norm2(x)
        first, activation, second = block.mlp
        x = x + second(activation(first(h) + low_rank(params, f"wide.{number}", h)))
    return trunk.head(trunk.norm(x)).view(members, batch, time, -1), {}


def low_rank(params: Tensors, name: str, x: Tensor) -> Tensor:
    return torch.bmm(torch.bmm(x, params[f"{name}.down"].mT), params[f"{name}.up"].mT)
