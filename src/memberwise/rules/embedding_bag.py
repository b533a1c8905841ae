"""Bags of embeddings as one node: the members' tables one above the other, their bags one after another.

torch has no batching rule for the operation it is made of, which so runs member by member.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from memberwise.engine.signals import Decline
from memberwise.rules.axis import expanded
from memberwise.rules.composite import composite
from memberwise.rules.embedding import rows_of_all

_aten = torch.ops.aten
_MODES = {"sum": 0, "mean": 1, "max": 2}


def _signature(
    input: Any,
    weight: Any,
    offsets: Any = None,
    max_norm: Any = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Any = None,
    include_last_offset: bool = False,
    padding_idx: Any = None,
) -> Any:  # F.embedding_bag's own names
    if max_norm is not None or sparse or per_sample_weights is not None or padding_idx is not None:
        return Decline("a table that is renormalised, a sparse gradient, weights or padding")
    if include_last_offset or mode not in _MODES or scale_grad_by_freq:
        return Decline("a last offset, gradients by frequency, or a mode that torch refuses")
    if weight.ndim != 2 or input.ndim != (2 if offsets is None else 1) or 0 in input.shape or input.is_floating_point():
        return Decline("an empty input, or shapes that torch refuses")
    if offsets is not None and (offsets.ndim != 1 or offsets.dtype != input.dtype):
        return Decline("offsets that torch refuses")
    return input, weight, offsets, _MODES[mode], weight.shape[0]


def _plain(input: Any, weight: Any, offsets: Any, mode: int, count: int) -> torch.Tensor:
    name = next(name for name, number in _MODES.items() if number == mode)
    return F.embedding_bag(input, weight, offsets, mode=name)


def _starts(indices: torch.Tensor, offsets: Any, o_dim: Any) -> torch.Tensor:
    """Where each bag of all members begins, in their indices one after another."""
    size, each = indices.shape[0], indices[0].numel()
    if offsets is None:
        return torch.arange(0, size * each, indices.shape[-1], dtype=indices.dtype, device=indices.device)
    own = expanded(offsets, o_dim, size)
    first = torch.arange(0, size * each, each, dtype=own.dtype, device=own.device)
    return (own + first.unsqueeze(1)).reshape(-1)


@composite(F.embedding_bag, signature=_signature)
class EmbeddingBag:
    """Sums, means or maxima over bags of rows."""

    plain = _plain

    @staticmethod
    def forward(info: Any, in_dims: Any, indices: Any, weight: Any, offsets: Any, *rest: Any) -> Any:
        if 0 not in in_dims:
            return Decline("equal in all members")
        size, (mode, count) = info.batch_size, rest
        indices, weight = expanded(indices, in_dims[0], size), expanded(weight, in_dims[1], size)
        rows, starts = rows_of_all(indices, count).reshape(-1), _starts(indices, offsets, in_dims[2])
        table = weight.reshape(size * count, -1)
        out, *places = _aten._embedding_bag.default(table, rows, starts, False, mode)
        return out.unflatten(0, (size, -1)), (rows, starts, *places)

    @staticmethod
    def backward(info: Any, in_dims: Any, needs: Any, inputs: Any, kept: Any, grad: torch.Tensor) -> Any:
        mode, count = inputs[3:]
        whole = info.batch_size * count
        folded = grad.reshape(-1, grad.shape[-1])
        found = _aten._embedding_bag_backward.default(folded, *kept, whole, False, mode, False, None)
        return None, found.view(info.batch_size, count, -1), None, None, None
