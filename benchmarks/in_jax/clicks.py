"""Embedding tables and a perceptron."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.in_jax.layers import Arrays, Mode
from benchmarks.in_jax.perceptron import layers


def forward(params: Arrays, buffers: Arrays, key: Any, rows: jax.Array, mode: Mode) -> tuple[jax.Array, Arrays]:
    found = [params[f"tables.{number}.weight"][rows[:, number]] for number in range(rows.shape[1])]
    return layers(params, "mlp.", jnp.concatenate(found, axis=1)), {}
