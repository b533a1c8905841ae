"""The small GPT: rows of all sequences, (M, B * T, width)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.folded.layers import Mode, Tensors, attend, dropout, layer_norm, linear

HEADS, LAYERS, DROPOUT = 8, 4, 0.1


def gpt(params: Tensors, buffers: Tensors, tokens: Tensor, mode: Mode) -> tuple[Tensor, Tensors]:
    """Of tokens (M, B, T), or (B, T) for all: (M, B, T, vocabulary)."""
    x = embedded(params["tokens.weight"], tokens) + params["positions"][:, None]
    members, batch, time, width = x.shape
    x = dropout(x, DROPOUT, mode).view(members, batch * time, width)
    p = DROPOUT if mode.draws and mode.training else 0.0
    for number in range(LAYERS):
        block = f"blocks.{number}"
        qkv = linear(params, f"{block}.attention.qkv", layer_norm(params, f"{block}.norm1", x))
        y = linear(params, f"{block}.attention.out", attend(qkv, members, batch, HEADS, p))
        x = x + dropout(y, DROPOUT, mode)
        h = F.gelu(linear(params, f"{block}.wide", layer_norm(params, f"{block}.norm2", x)))
        x = x + dropout(linear(params, f"{block}.narrow", h), DROPOUT, mode)
    out = linear(params, "head", layer_norm(params, "norm", x))
    return out.view(members, batch, time, -1), {}


def embedded(table: Tensor, rows: Tensor) -> Tensor:
    """Rows of each member's own table, (M, rows, width), as one look-up in all of them: (M, ..., width)."""
    members, count, width = table.shape
    own = rows if rows.ndim == 3 else rows.expand(members, *rows.shape)
    starts = count * torch.arange(members, device=rows.device)
    return F.embedding(own + starts.view(-1, *(1,) * (own.ndim - 1)), table.view(-1, width))
