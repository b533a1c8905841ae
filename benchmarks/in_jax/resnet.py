"""ResNet-18 with the stem for small images."""

from __future__ import annotations

from typing import Any

import jax

from benchmarks.in_jax.layers import Arrays, Mode, batch_norm, conv, linear


def forward(params: Arrays, buffers: Arrays, key: Any, x: jax.Array, mode: Mode) -> tuple[jax.Array, Arrays]:
    new: Arrays = {}

    def norm(name: str, x: jax.Array) -> jax.Array:
        return batch_norm(params, buffers, name, x, mode, new)

    x = jax.nn.relu(norm("bn1", conv(params, "conv1", x, padding=1)))
    for number in range(8):
        block, stride = f"blocks.{number}", 2 if number in (2, 4, 6) else 1
        out = jax.nn.relu(norm(f"{block}.bn1", conv(params, f"{block}.conv1", x, stride, padding=1)))
        out = norm(f"{block}.bn2", conv(params, f"{block}.conv2", out, padding=1))
        if stride != 1:
            x = norm(f"{block}.shortcut.1", conv(params, f"{block}.shortcut.0", x, stride))
        x = jax.nn.relu(out + x)
    return linear(params, "fc", x.mean((2, 3))), new
