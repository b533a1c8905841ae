"""Reductions: over a member's dimensions, each one further in the stacked tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from memberwise.rules.axis import shift_all
from memberwise.rules.registry import register_rule

_aten = torch.ops.aten


def _over_dims(call: Callable[..., Any]) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Any, x: torch.Tensor, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
        ndim = x.ndim - 1
        dims = shift_all(dim, ndim) if dim else list(range(1, x.ndim))
        if ndim == 0:
            return call(x.unsqueeze(1), [1], False, *args[1:], **kwargs), 0
        return call(x, dims, *args, **kwargs), 0

    return rule


def _over_all(call: Callable[..., Any]) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Any, x: torch.Tensor, **kwargs: Any) -> Any:
        dims = list(range(1, x.ndim))
        return (call(x, dims, **kwargs) if dims else call(x.unsqueeze(1), [1], **kwargs)), 0

    return rule


for _packet in (_aten.sum, _aten.mean):
    register_rule(_packet.default, _over_all(_packet.dim if _packet is _aten.mean else _packet.dim_IntList))
register_rule(_aten.sum.dim_IntList, _over_dims(_aten.sum.dim_IntList))
register_rule(_aten.mean.dim, _over_dims(_aten.mean.dim))
register_rule(_aten.amax.default, _over_dims(_aten.amax.default))
register_rule(_aten.amin.default, _over_dims(_aten.amin.default))
