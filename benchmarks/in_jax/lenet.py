"""LeNet-5."""

from __future__ import annotations

from typing import Any

import jax

from benchmarks.in_jax.layers import Arrays, Mode, conv, linear, max_pool


def forward(params: Arrays, buffers: Arrays, key: Any, x: jax.Array, mode: Mode) -> tuple[jax.Array, Arrays]:
    x = max_pool(jax.nn.relu(conv(params, "conv1", x)))
    x = max_pool(jax.nn.relu(conv(params, "conv2", x)))
    x = jax.nn.relu(linear(params, "fc1", x.reshape(len(x), -1)))
    return linear(params, "fc3", jax.nn.relu(linear(params, "fc2", x))), {}
