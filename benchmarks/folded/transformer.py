"""The small causal transformer: rows of all sequences, (M, B * T, width)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from benchmarks.folded.gpt import embedded
from benchmarks.folded.layers import Mode, Tensors, attend, layer_norm, linear

HEADS = 4


def transformer(params: Tensors, buffers: Tensors, tokens: Tensor, mode: Mode) -> tuple[Tensor, Tensors]:
    """Of tokens (M, B, T): (M, B, T, vocabulary)."""
    x = embedded(params["tokens.weight"], tokens) + params["positions"][:, None]
    members, batch, time, width = x.shape
    x = x.view(members, batch * time, width)
    number = 0
    while f"blocks.{number}.norm1.weight" in params:
        block = f"blocks.{number}"
        qkv = linear(params, f"{block}.attention.qkv", layer_norm(params, f"{block}.norm1", x))
        x = x + linear(params, f"{block}.attention.out", attend(qkv, members, batch, HEADS))
        h = F.gelu(linear(params, f"{block}.mlp.0", layer_norm(params, f"{block}.norm2", x)))
        x = x + linear(params, f"{block}.mlp.2", h)
        number += 1
    out = linear(params, "head", layer_norm(params, "norm", x))
    return out.view(members, batch, time, -1), {}
