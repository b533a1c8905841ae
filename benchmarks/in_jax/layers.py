"""Layers and losses in plain JAX."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Arrays = dict[str, jax.Array]


class Mode(NamedTuple):
    """Whether the model trains, whether it draws, and the arrays that all members hold, if there are some."""

    training: bool
    draws: bool
    trunk: Any = None


def linear(params: Arrays, name: str, x: jax.Array) -> jax.Array:
    y = x @ params[f"{name}.weight"].T
    return y + params[f"{name}.bias"] if f"{name}.bias" in params else y


def layer_norm(params: Arrays, name: str, x: jax.Array) -> jax.Array:
    mean = x.mean(-1, keepdims=True)
    normed = (x - mean) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)
    return normed * params[f"{name}.weight"] + params[f"{name}.bias"]


def dropout(x: jax.Array, p: float, key: jax.Array | None, number: int, mode: Mode) -> jax.Array:
    """The number tells the places of one step apart."""
    if not (mode.draws and mode.training):
        return x
    kept = jax.random.bernoulli(jax.random.fold_in(key, number), 1 - p, x.shape)
    return jnp.where(kept, x / (1 - p), 0)


def attend(qkv: jax.Array, heads: int, p: float, key: jax.Array | None, number: int, mode: Mode) -> jax.Array:
    """Causal attention of (B, T, 3 * width): (B, T, width)."""
    batch, time, width = qkv.shape
    q, k, v = (part.reshape(batch, time, heads, -1).swapaxes(1, 2) for part in jnp.split(qkv, 3, axis=-1))
    scores = q @ k.swapaxes(2, 3) / (width // 3 // heads) ** 0.5
    scores = jnp.where(jnp.tril(jnp.ones((time, time), bool)), scores, -jnp.inf)
    weights = dropout(jax.nn.softmax(scores, axis=-1), p, key, number, mode)
    return (weights @ v).swapaxes(1, 2).reshape(batch, time, width // 3)


def conv(params: Arrays, name: str, x: jax.Array, stride: int = 1, padding: int = 0, groups: int = 1) -> jax.Array:
    pads = [(padding, padding)] * 2
    y = jax.lax.conv_general_dilated(x, params[f"{name}.weight"], (stride, stride), pads, feature_group_count=groups)
    return y + params[f"{name}.bias"][:, None, None] if f"{name}.bias" in params else y


def max_pool(x: jax.Array) -> jax.Array:
    """2 x 2."""
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")


def batch_norm(params: Arrays, buffers: Arrays, name: str, x: jax.Array, mode: Mode, new: Arrays) -> jax.Array:
    """Of (B, channels, H, W); the running statistics go into `new`."""
    mean, var = buffers[f"{name}.running_mean"], buffers[f"{name}.running_var"]
    if mode.training:
        now, spread, count = x.mean((0, 2, 3)), x.var((0, 2, 3)), x.size // x.shape[1]
        new[f"{name}.running_mean"] = 0.9 * mean + 0.1 * now
        new[f"{name}.running_var"] = 0.9 * var + 0.1 * spread * (count / (count - 1))
        new[f"{name}.num_batches_tracked"] = buffers[f"{name}.num_batches_tracked"] + 1
        mean, var = now, spread
    scale = params[f"{name}.weight"] * jax.lax.rsqrt(var + 1e-5)
    return (x - mean[:, None, None]) * scale[:, None, None] + params[f"{name}.bias"][:, None, None]


def loss(objective: str, out: jax.Array, target: jax.Array) -> jax.Array:
    """Of one member."""
    if objective == "cross_entropy":
        out, target = out.reshape(-1, out.shape[-1]), target.reshape(-1)
        picked = jnp.take_along_axis(out, target[:, None], axis=1)[:, 0]
        return (jax.nn.logsumexp(out, axis=1) - picked).mean()
    if objective == "logistic":
        return (jax.nn.softplus(out) - target * out).mean()
    return ((out - target) ** 2).mean()
