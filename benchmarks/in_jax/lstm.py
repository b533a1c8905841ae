"""The LSTM: the inputs of all steps as one product, then a scan."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.in_jax.layers import Arrays, Mode, linear


def forward(params: Arrays, buffers: Arrays, key: Any, x: jax.Array, mode: Mode) -> tuple[jax.Array, Arrays]:
    weight = params["lstm.weight_hh_l0"].T
    entering = x @ params["lstm.weight_ih_l0"].T + params["lstm.bias_ih_l0"] + params["lstm.bias_hh_l0"]

    def step(carry: tuple[jax.Array, jax.Array], now: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        hidden, cell = carry
        i, f, g, o = jnp.split(now + hidden @ weight, 4, axis=1)
        cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        return (jax.nn.sigmoid(o) * jnp.tanh(cell), cell), None

    start = jnp.zeros((len(x), weight.shape[0]), x.dtype)
    (hidden, _), _ = jax.lax.scan(step, (start, start), entering.swapaxes(0, 1))
    return linear(params, "head", hidden), {}
