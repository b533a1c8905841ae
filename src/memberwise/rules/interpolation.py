"""Interpolation: members among the batch, or among the channels where they lie so (after a convolution)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from memberwise.engine.signals import Decline
from memberwise.rules.folding import (
    into_batch,
    into_channels,
    is_among_channels,
    is_channels_last,
    out_of_batch,
    out_of_channels,
)
from memberwise.rules.registry import LONE_CONTIGUOUS, register_rule

_aten = torch.ops.aten

WAYS = (
    *(f"_upsample_nearest_exact{space}d" for space in (1, 2, 3)),
    *(f"upsample_nearest{space}d" for space in (1, 2, 3)),
    "upsample_linear1d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "upsample_trilinear3d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
    "_upsample_lanczos2d_aa",
)
"""torch's operations; it batches all but the first three itself, and copies what lies among the channels."""


def _forward(overload: Callable[..., Any]) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Any, x: torch.Tensor, *rest: Any) -> Any:
        if is_channels_last(x):
            return Decline("memory in channels_last order")
        if is_among_channels(x):
            return out_of_channels(overload(into_channels(x), *rest), info.batch_size), 0
        return out_of_batch(overload(into_batch(x), *rest), info.batch_size), 0

    return rule


def _backward(overload: Callable[..., Any]) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Any, grad: torch.Tensor, output: Any, size: Any, *how: Any) -> Any:
        if is_channels_last(grad):
            return Decline("memory in channels_last order")
        members, (batch, channels, *space) = info.batch_size, size
        if is_among_channels(grad):
            found = overload(into_channels(grad), output, [batch, members * channels, *space], *how)
            return out_of_channels(found, members), 0
        found = overload(into_batch(grad), output, [members * batch, channels, *space], *how)
        return out_of_batch(found, members), 0

    return rule


for _name in WAYS:
    for _full, _make in ((_name, _forward), (f"{_name}_backward", _backward)):
        _op = getattr(_aten, _full).default
        register_rule(_op, _make(_op))
        LONE_CONTIGUOUS.add(_op)
