"""The graph network."""

from __future__ import annotations

from typing import Any

import jax

from benchmarks.in_jax.layers import Arrays, Mode, linear


def forward(
    params: Arrays,
    buffers: Arrays,
    key: Any,
    x: jax.Array,
    source: jax.Array,
    target: jax.Array,
    weight: jax.Array,
    mode: Mode,
) -> tuple[jax.Array, Arrays]:
    def convolution(name: str, x: jax.Array) -> jax.Array:
        h = linear(params, f"{name}.linear", x)
        summed = jax.ops.segment_sum(h[source] * weight[:, None], target, num_segments=len(x))
        return summed + params[f"{name}.bias"]

    return convolution("second", jax.nn.relu(convolution("first", x))), {}
