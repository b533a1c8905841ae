"""Low-rank adapters on the arrays of a frozen transformer, which all members read."""

from __future__ import annotations

from typing import Any

import jax

from benchmarks.in_jax import transformer
from benchmarks.in_jax.layers import Arrays, Mode


def forward(params: Arrays, buffers: Arrays, key: Any, tokens: jax.Array, mode: Mode) -> tuple[jax.Array, Arrays]:
    def low_rank(name: str, x: jax.Array) -> jax.Array:
        return x @ params[f"{name}.down"].T @ params[f"{name}.up"].T

    return transformer.logits(mode.trunk, tokens, mode, low_rank), {}
