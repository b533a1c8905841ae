"""Packed sequences: one set of lengths, read on the host, for all members; members ride along as a feature."""

from __future__ import annotations

from typing import Any

import torch

from memberwise.engine.signals import part_ways
from memberwise.rules.registry import PLAIN, register_rule

_aten = torch.ops.aten


@register_rule(_aten._pack_padded_sequence.default)
def pack(info: Any, in_dims: Any, x: torch.Tensor, lengths: torch.Tensor, batch_first: bool) -> Any:
    """torch's batching gives each member batch sizes, whose memory the backward formula then cannot read."""
    if in_dims[1] == 0:
        if (lengths != lengths[:1]).any():
            part_ways(info, "sequence lengths differ between members")
        lengths = lengths[0]
    if in_dims[0] is None:
        data, sizes = _aten._pack_padded_sequence(x, lengths, batch_first)
        return (data, sizes), (None, PLAIN)
    data, sizes = _aten._pack_padded_sequence(x.movedim(0, 2), lengths, batch_first)
    return (data.movedim(1, 0), sizes), (0, PLAIN)


@register_rule(_aten._pack_padded_sequence_backward.default)
def pack_backward(
    info: Any, in_dims: Any, grad: torch.Tensor, input_size: Any, batch_sizes: torch.Tensor, batch_first: bool
) -> Any:
    """The same ride back."""
    size = [*input_size[:2], info.batch_size, *input_size[2:]]
    return _aten._pack_padded_sequence_backward(grad.movedim(0, 1), size, batch_sizes, batch_first).movedim(2, 0), 0
