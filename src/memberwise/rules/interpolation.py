"""Interpolation that torch has no batching for, and so runs member by member: members join the batch.

The other ways of interpolation torch batches in the same way itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from memberwise.engine.signals import Decline
from memberwise.rules.folding import into_batch, is_channels_last, out_of_batch
from memberwise.rules.registry import LONE_CONTIGUOUS, register_rule

_aten = torch.ops.aten

NEAREST_EXACT = ("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d")


def _forward(overload: Callable[..., Any]) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Any, x: torch.Tensor, *rest: Any) -> Any:
        if is_channels_last(x):
            return Decline("memory in channels_last order")
        return out_of_batch(overload(into_batch(x), *rest), info.batch_size), 0

    return rule


def _backward(overload: Callable[..., Any]) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Any, grad: torch.Tensor, output: Any, size: Any, *scales: Any) -> Any:
        if is_channels_last(grad):
            return Decline("memory in channels_last order")
        size = [info.batch_size * size[0], *size[1:]]
        return out_of_batch(overload(into_batch(grad), output, size, *scales), info.batch_size), 0

    return rule


for _name in NEAREST_EXACT:
    for _op, _make in (
        (getattr(_aten, _name).default, _forward),
        (getattr(_aten, _name + "_backward").default, _backward),
    ):
        register_rule(_op, _make(_op))
        LONE_CONTIGUOUS.add(_op)
