"""Reads and writes at indices."""

from __future__ import annotations

from typing import Any

import torch

from memberwise.engine.signals import Decline
from memberwise.rules.axis import aligned, expanded, shifted
from memberwise.rules.registry import register_rule

_aten = torch.ops.aten


def _index_fill(info: Any, in_dims: Any, x: torch.Tensor, dim: int, index: torch.Tensor, value: torch.Tensor) -> Any:
    """torch's batching takes one member's value for all: silently wrong in `trace`'s and other gradients."""
    if in_dims[2] == 0:
        return Decline("the index differs between members")
    x = expanded(x, in_dims[0], info.batch_size)
    ndim = x.ndim - 1
    rows = torch.zeros(x.shape[shifted(dim, ndim)] if ndim else 1, dtype=torch.bool, device=x.device)
    rows[index] = True
    mask = rows.view(1, *(-1 if k == dim % ndim else 1 for k in range(ndim))) if ndim else rows
    own = value.view(-1, *(1,) * ndim) if in_dims[3] == 0 else value
    return torch.where(mask, own.to(x.dtype), x), 0


register_rule(_aten.index_fill.int_Tensor, _index_fill)


@register_rule(_aten.masked_fill.Tensor)
def masked_fill(info: Any, in_dims: Any, x: torch.Tensor, mask: torch.Tensor, value: torch.Tensor) -> Any:
    """A member's value is 0-d, and stays so beside its neighbours: `where` broadcasts it."""
    x, mask, value = aligned((x, mask, value), in_dims)
    return torch.where(mask, value.to(x.dtype), x), 0


@register_rule(_aten.masked_fill_.Tensor)
def masked_fill_(info: Any, in_dims: Any, x: torch.Tensor, mask: torch.Tensor, value: torch.Tensor) -> Any:
    """As `masked_fill`."""
    return x.copy_(masked_fill(info, in_dims, x, mask, value)[0]), 0


@register_rule(_aten.index_fill_.int_Tensor)
def index_fill_(info: Any, in_dims: Any, x: torch.Tensor, dim: int, index: torch.Tensor, value: torch.Tensor) -> Any:
    """As `index_fill`."""
    out = _index_fill(info, in_dims, x, dim, index, value)
    return out if type(out) is Decline else (x.copy_(out[0]), 0)
