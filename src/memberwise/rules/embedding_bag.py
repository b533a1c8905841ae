"""Bags of embeddings: the members' tables one above the other, their bags one after another.

torch has no batching rule for them. The common call is one node; what that does not serve (weights, padding, tables
that are renormalised, a last offset) goes by the operations that torch's own is made of.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from memberwise.engine.signals import Decline
from memberwise.rules.axis import expanded
from memberwise.rules.composite import composite
from memberwise.rules.embedding import rows_of_all
from memberwise.rules.registry import LONE_CONTIGUOUS, register_rule

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
    """Where each bag of all members begins, in their indices one after another.

    A member whose first offset is not 0, or whose last lies outside its indices, is an error alone; among the others'
    it would be another member's bag. Then the first offset of all is not 0, which is an error too.
    """
    size, each = indices.shape[0], indices[0].numel()
    if offsets is None:
        return torch.arange(0, size * each, indices.shape[-1], dtype=indices.dtype, device=indices.device)
    own = expanded(offsets, o_dim, size)
    first = torch.arange(0, size * each, each, dtype=own.dtype, device=own.device) if each else own.new_zeros(size)
    found = (own + first.unsqueeze(1)).reshape(-1)
    if found.numel():
        found[0] += ((own[:, 0] != 0) | (own[:, -1] > each)).any()
    return found


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


class _Bags:
    """All members' bags as one call of torch's operations.

    Args:
        dims: where `indices`, `offsets` and `weights` have their member axis.
        count: how many rows each member's table has.
        padding: the row that does not count, or -1; all members' are read as the first one's, so that it is one row.
    """

    def __init__(
        self, size: int, dims: Any, indices: Any, offsets: Any, weights: Any, count: int, padding: int
    ) -> None:
        self.size, self.count = size, count
        indices = expanded(indices, dims[0], size)
        self.each = indices.shape[1]
        rows = rows_of_all(indices, count)
        if padding >= 0:
            rows = rows.masked_fill(indices == padding, padding)
        self.rows = rows.reshape(-1)
        self.offsets = expanded(offsets, dims[1], size)
        self.weights = None if weights is None else expanded(weights, dims[2], size).reshape(-1)

    def starts(self) -> torch.Tensor:
        """Where each bag begins."""
        return _starts(self.rows.view(self.size, -1), self.offsets, 0)

    def first(self, step: int, like: torch.Tensor) -> torch.Tensor:
        """`(M, 1, ...)`: the number of each member's first row, or bag."""
        return (
            torch.arange(self.size, device=like.device, dtype=like.dtype).mul_(step).view(-1, *(1,) * (like.ndim - 1))
        )


def _forward_of(overload: Any) -> Any:
    def rule(
        info: Any,
        in_dims: Any,
        weight: Any,
        indices: Any,
        offsets: Any,
        by_frequency: bool = False,
        mode: int = 0,
        sparse: bool = False,
        weights: Any = None,
        has_last: bool = False,
        padding: int = -1,
    ) -> Any:
        if has_last:
            return Decline("of indices beyond a last offset torch's kernels make different things", by_member=True)
        size = info.batch_size
        dims = in_dims[1], in_dims[2], (*in_dims, *(None,) * 6)[6]
        bags = _Bags(size, dims, indices, offsets, weights, weight.shape[-2], padding)
        table = expanded(weight, in_dims[0], size).reshape(-1, weight.shape[-1])
        found = overload(table, bags.rows, bags.starts(), by_frequency, mode, False, bags.weights, False, padding)
        out, of_index, lengths, largest = (one.unflatten(0, (size, one.shape[0] // size)) for one in found)
        of_index = of_index - bags.first(out.shape[1], of_index)
        if mode == _MODES["max"]:  # an empty bag's is 0
            largest = (largest - bags.first(bags.count, largest)).mul_((lengths > 0).unsqueeze(-1))
        return (out, of_index, lengths, largest), 0

    return rule


for _op in (_aten._embedding_bag.default, _aten._embedding_bag_forward_only.default):
    register_rule(_op, _forward_of(_op))
    LONE_CONTIGUOUS.add(_op)


@register_rule(_aten._embedding_bag_backward.default)
def embedding_bag_backward(
    info: Any,
    in_dims: Any,
    grad: Any,
    indices: Any,
    offsets: Any,
    of_index: Any,
    lengths: Any,
    largest: Any,
    count: int,
    by_frequency: bool,
    mode: int,
    sparse: bool,
    weights: Any,
    padding: int = -1,
) -> Any:
    """The gradient of the tables; dense, if it was to be sparse: no member tensor can show another."""
    if offsets.shape[-1] != grad.shape[-2]:
        return Decline("a last offset", by_member=True)
    if by_frequency:
        return Decline("torch's kernel takes another index's frequency, which depends on the table", by_member=True)
    size = info.batch_size
    bags = _Bags(size, (in_dims[1], in_dims[2], in_dims[10]), indices, offsets, weights, count, padding)
    dims = in_dims[0], *in_dims[3:6]
    full = (expanded(one, dim, size) for one, dim in zip((grad, of_index, lengths, largest), dims, strict=True))
    grad, of_index, lengths, largest = full
    of_index = of_index + bags.first(bags.offsets.shape[1], of_index)
    if mode == _MODES["max"]:
        largest = largest + bags.first(count, largest)
    found = _aten._embedding_bag_backward.default(
        *(grad.flatten(0, 1), bags.rows, bags.starts(), *(one.flatten(0, 1) for one in (of_index, lengths, largest))),
        *(size * count, False, mode, False, bags.weights, padding),
    )
    return found.view(size, count, -1), 0


@register_rule(_aten._embedding_bag_per_sample_weights_backward.default)
def embedding_bag_per_sample_weights_backward(
    info: Any,
    in_dims: Any,
    grad: Any,
    weight: Any,
    indices: Any,
    offsets: Any,
    of_index: Any,
    mode: int,
    padding: int = -1,
) -> Any:
    """The gradient of each index's weight."""
    if offsets.shape[-1] != grad.shape[-2]:
        return Decline("a last offset", by_member=True)
    size = info.batch_size
    bags = _Bags(size, (*in_dims[2:4], None), indices, offsets, None, weight.shape[-2], padding)
    grad, weight, of_index = (
        expanded(one, dim, size) for one, dim in zip((grad, weight, of_index), (*in_dims[:2], in_dims[4]), strict=True)
    )
    of_index = of_index + bags.first(bags.offsets.shape[1], of_index)
    found = _aten._embedding_bag_per_sample_weights_backward.default(
        *(grad.flatten(0, 1), weight.reshape(-1, weight.shape[-1]), bags.rows, bags.starts()),
        *(of_index.flatten(0, 1), mode, padding),
    )
    return found.view(size, -1), 0
