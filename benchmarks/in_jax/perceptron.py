"""Linear layers and ReLU."""

from __future__ import annotations

from typing import Any

import jax

from benchmarks.in_jax.layers import Arrays, Mode, linear


def forward(params: Arrays, buffers: Arrays, key: Any, x: jax.Array, mode: Mode) -> tuple[jax.Array, Arrays]:
    return layers(params, "", x), {}


def layers(params: Arrays, prefix: str, x: jax.Array) -> jax.Array:
    """Those of an `nn.Sequential` under this prefix, in the order of their numbers, ReLU between them."""
    found = [name.removesuffix(".weight") for name in params if name.startswith(prefix) and name.endswith(".weight")]
    names = sorted(found, key=lambda name: int(name.removeprefix(prefix)))
    for name in names[:-1]:
        x = jax.nn.relu(linear(params, name, x))
    return linear(params, names[-1], x)
