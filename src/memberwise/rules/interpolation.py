"""Interpolation: members among the batch, or among the channels where they lie so (after a convolution)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from memberwise.engine.signals import Decline
from memberwise.rules.folding import as_it_lies, is_channels_last
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
        into, out_of = as_it_lies(x)
        return out_of(overload(into(x), *rest), info.batch_size), 0

    return rule


def _backward(overload: Callable[..., Any]) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Any, grad: torch.Tensor, output: Any, size: Any, *how: Any) -> Any:
        if is_channels_last(grad):
            return Decline("memory in channels_last order")
        into, out_of = as_it_lies(grad)
        folded = into(grad)
        return out_of(overload(folded, output, [*folded.shape[:2], *size[2:]], *how), info.batch_size), 0

    return rule


for _name in WAYS:
    for _full, _make in ((_name, _forward), (f"{_name}_backward", _backward)):
        _op = getattr(_aten, _full).default
        register_rule(_op, _make(_op))
        LONE_CONTIGUOUS.add(_op)
