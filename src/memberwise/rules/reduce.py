"""Reductions: over a member's dimensions, each one further in the stacked tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from memberwise.rules.axis import expanded, shift_all, shifted
from memberwise.rules.registry import register_rule

_aten = torch.ops.aten


def _over_dims(call: Callable[..., Any]) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Any, x: torch.Tensor, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
        ndim = x.ndim - 1
        if ndim == 0:
            return call(x.unsqueeze(1), [1], False, *args[1:], **kwargs), 0
        dims = range(1, x.ndim) if dim is None or len(dim) == 0 else shift_all(dim, ndim)
        return call(x, list(dims), *args, **kwargs), 0

    return rule


def _over_all(call: Callable[..., Any]) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Any, x: torch.Tensor, **kwargs: Any) -> Any:
        dims = list(range(1, x.ndim))
        return (call(x, dims, **kwargs) if dims else call(x.unsqueeze(1), [1], **kwargs)), 0

    return rule


def _over_dim(call: Callable[..., Any]) -> Callable[..., Any]:
    """One dimension, kept: softmax and its kin."""

    def rule(info: Any, in_dims: Any, x: torch.Tensor, dim: int, *args: Any, **kwargs: Any) -> Any:
        if x.ndim == 1:
            return call(x.unsqueeze(1), 1, *args, **kwargs).squeeze(1), 0
        return call(x, shifted(dim, x.ndim - 1), *args, **kwargs), 0

    return rule


for _packet in (_aten.sum, _aten.mean):
    register_rule(_packet.default, _over_all(_packet.dim if _packet is _aten.mean else _packet.dim_IntList))
register_rule(_aten.sum.dim_IntList, _over_dims(_aten.sum.dim_IntList))
register_rule(_aten.mean.dim, _over_dims(_aten.mean.dim))
register_rule(_aten.amax.default, _over_dims(_aten.amax.default))
register_rule(_aten.amin.default, _over_dims(_aten.amin.default))
register_rule(_aten._softmax.default, _over_dim(_aten._softmax.default))
register_rule(_aten._log_softmax.default, _over_dim(_aten._log_softmax.default))


def _soft_backward(call: Callable[..., Any]) -> Callable[..., Any]:
    """The gradient of a softmax: `(grad, output, dim, dtype)`."""

    def rule(info: Any, in_dims: Any, grad: torch.Tensor, out: torch.Tensor, dim: int, dtype: Any) -> Any:
        grad, out = expanded(grad, in_dims[0], info.batch_size), expanded(out, in_dims[1], info.batch_size)
        if out.ndim == 1:
            return call(grad.unsqueeze(1), out.unsqueeze(1), 1, dtype).squeeze(1), 0
        return call(grad, out, shifted(dim, out.ndim - 1), dtype), 0

    return rule


for _packet in (_aten._softmax_backward_data, _aten._log_softmax_backward_data):
    register_rule(_packet.default, _soft_backward(_packet.default))
