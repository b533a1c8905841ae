"""The depthwise network."""

from __future__ import annotations

from typing import Any

import jax

from benchmarks.in_jax.layers import Arrays, Mode, batch_norm, conv, linear


def forward(params: Arrays, buffers: Arrays, key: Any, x: jax.Array, mode: Mode) -> tuple[jax.Array, Arrays]:
    new: Arrays = {}

    def norm(name: str, x: jax.Array) -> jax.Array:
        return batch_norm(params, buffers, name, x, mode, new)

    x = jax.nn.relu6(norm("bn1", conv(params, "conv1", x, padding=1)))
    for number in range(5):
        block, stride = f"blocks.{number}", 2 if number in (0, 2, 4) else 1
        wide = len(params[f"{block}.depthwise.weight"])
        out = jax.nn.relu6(norm(f"{block}.bn1", conv(params, f"{block}.expand", x)))
        out = conv(params, f"{block}.depthwise", out, stride, padding=1, groups=wide)
        out = norm(f"{block}.bn3", conv(params, f"{block}.project", jax.nn.relu6(norm(f"{block}.bn2", out))))
        x = x + out if stride == 1 else out
    x = jax.nn.relu6(norm("bn2", conv(params, "conv2", x)))
    return linear(params, "fc", x.mean((2, 3))), new
