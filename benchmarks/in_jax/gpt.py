"""The small GPT."""

from __future__ import annotations

import jax

from benchmarks.in_jax.layers import Arrays, Mode, attend, dropout, layer_norm, linear

HEADS, LAYERS, DROPOUT = 8, 4, 0.1


def forward(params: Arrays, buffers: Arrays, key: jax.Array, tokens: jax.Array, mode: Mode) -> tuple[jax.Array, Arrays]:
    x = dropout(params["tokens.weight"][tokens] + params["positions"], DROPOUT, key, 0, mode)
    for number in range(LAYERS):
        block, draw = f"blocks.{number}", 3 * number
        qkv = linear(params, f"{block}.attention.qkv", layer_norm(params, f"{block}.norm1", x))
        y = linear(params, f"{block}.attention.out", attend(qkv, HEADS, DROPOUT, key, draw + 1, mode))
        x = x + dropout(y, DROPOUT, key, draw + 2, mode)
        h = linear(params, f"{block}.wide", layer_norm(params, f"{block}.norm2", x))
        h = linear(params, f"{block}.narrow", jax.nn.gelu(h, approximate=False))
        x = x + dropout(h, DROPOUT, key, draw + 3, mode)
    return linear(params, "head", layer_norm(params, "norm", x)), {}
