"""Pooling: members among the batch, or among the channels where they lie so (after a convolution)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from memberwise.engine.signals import Decline
from memberwise.rules.axis import expanded
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


def _folded(call: Callable[..., Any], space: int, places: tuple[int, ...]) -> Any:
    """Run `call` once for all members' tensors at `places`; `space` dimensions are pooled over."""

    def rule(info: Any, in_dims: Any, *args: Any) -> Any:
        values, size = list(args), info.batch_size
        for place in places:
            values[place] = expanded(values[place], in_dims[place], size)
        if any(is_channels_last(values[place]) for place in places):
            return Decline("memory in channels_last order", by_member=True)
        if values[0].ndim == space + 2:  # one sample a member, no batch: members are one
            return call(*values), 0
        channels = is_among_channels(values[places[-1]])
        into, out_of = (into_channels, out_of_channels) if channels else (into_batch, out_of_batch)
        for place in places:
            values[place] = into(values[place])
        found = call(*values)
        return (tuple(out_of(one, size) for one in found) if type(found) is tuple else out_of(found, size)), 0

    return rule


_POOLS = {
    "max_pool2d_with_indices": 2,
    "max_pool3d_with_indices": 3,
    "avg_pool2d": 2,
    "avg_pool3d": 3,
    "_adaptive_avg_pool2d": 2,
    "_adaptive_avg_pool3d": 3,
    "adaptive_max_pool2d": 2,
    "adaptive_max_pool3d": 3,
}
"""Pooling -> how many dimensions it pools over."""


def _tensor_places(overload: Any) -> tuple[int, ...]:
    return tuple(k for k, arg in enumerate(overload._schema.arguments) if str(arg.type) == "Tensor")


for _name, _space in _POOLS.items():
    for _op in (getattr(_aten, _name).default, getattr(_aten, _name + "_backward").default):
        register_rule(_op, _folded(_op, _space, _tensor_places(_op)))
        LONE_CONTIGUOUS.add(_op)
