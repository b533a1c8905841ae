"""Group norm: members among the channels, and their groups among the groups."""

from __future__ import annotations

from typing import Any

import torch

from memberwise.engine.signals import Decline
from memberwise.rules.axis import expanded
from memberwise.rules.folding import into_channels, is_channels_last, joined, out_of_channels, split
from memberwise.rules.registry import LONE_CONTIGUOUS, register_rule

_aten = torch.ops.aten
_LAST = Decline("memory in channels_last order")


def _folded(x: torch.Tensor) -> torch.Tensor:
    """In memory as torch's kernels read it: of one group a shared mean would be a view without a step from member to
    member, which they do not ask for."""
    return into_channels(x).contiguous()


LONE_CONTIGUOUS.update({_aten.native_group_norm.default, _aten.native_group_norm_backward.default})


@register_rule(_aten.native_group_norm.default)
def native_group_norm(
    info: Any,
    in_dims: Any,
    x: Any,
    weight: Any,
    bias: Any,
    batch: int,
    channels: int,
    space: int,
    groups: int,
    eps: Any,
) -> Any:
    """torch's batching scales after it, and lays members outermost: what convolutions on both sides have to copy."""
    size = info.batch_size
    x = expanded(x, in_dims[0], size)
    if is_channels_last(x):
        return _LAST
    values = joined(weight, in_dims[1], size), joined(bias, in_dims[2], size)
    found = _aten.native_group_norm.default(_folded(x), *values, batch, size * channels, space, size * groups, eps)
    return tuple(out_of_channels(value, size) for value in found), 0


@register_rule(_aten.native_group_norm_backward.default)
def native_group_norm_backward(
    info: Any,
    in_dims: Any,
    grad: Any,
    x: Any,
    mean: Any,
    rstd: Any,
    weight: Any,
    batch: int,
    channels: int,
    space: int,
    groups: int,
    mask: Any,
) -> Any:
    """As `native_group_norm`."""
    size = info.batch_size
    full = [expanded(value, dim, size) for value, dim in zip((grad, x, mean, rstd), in_dims, strict=False)]
    if any(map(is_channels_last, full[:2])):
        return _LAST
    counts = batch, size * channels, space, size * groups
    grad_x, *others = _aten.native_group_norm_backward.default(
        *map(_folded, full), joined(weight, in_dims[4], size), *counts, mask
    )
    grad_x = out_of_channels(grad_x, size) if mask[0] else None
    return (
        grad_x,
        *(split(value, size) if wanted else None for value, wanted in zip(others, mask[1:], strict=True)),
    ), 0
