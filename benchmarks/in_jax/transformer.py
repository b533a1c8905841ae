"""The small causal transformer, of the parameters of one member or of a frozen trunk with adapters beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from benchmarks.in_jax.layers import Arrays, Mode, attend, layer_norm, linear

HEADS = 4
Beside = Callable[[str, jax.Array], jax.Array | float]


def nothing(name: str, x: jax.Array) -> float:
    return 0.0


def forward(params: Arrays, buffers: Arrays, key: Any, tokens: jax.Array, mode: Mode) -> tuple[jax.Array, Arrays]:
    return logits(params, tokens, mode), {}


def logits(params: Arrays, tokens: jax.Array, mode: Mode, beside: Beside = nothing) -> jax.Array:
    """`beside` gives what is added to a layer's output: `qkv.0`, `wide.0` and so on."""
    x = params["tokens.weight"][tokens] + params["positions"]
    number = 0
    while f"blocks.{number}.norm1.weight" in params:
        block = f"blocks.{number}"
        h = layer_norm(params, f"{block}.norm1", x)
        qkv = linear(params, f"{block}.attention.qkv", h) + beside(f"qkv.{number}", h)
        x = x + linear(params, f"{block}.attention.out", attend(qkv, HEADS, 0.0, None, 0, mode))
        h = layer_norm(params, f"{block}.norm2", x)
        wide = linear(params, f"{block}.mlp.0", h) + beside(f"wide.{number}", h)
        x = x + linear(params, f"{block}.mlp.2", jax.nn.gelu(wide, approximate=False))
        number += 1
    return linear(params, "head", layer_norm(params, "norm", x))
