"""Softmax and log-softmax, forward and backward; over a few classes along a middle dimension."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from memberwise.rules.axis import expanded, shifted
from memberwise.rules.registry import LONE_CONTIGUOUS, register_rule

_aten = torch.ops.aten


def is_short(x: torch.Tensor, dim: int) -> bool:
    """Whether a softmax along the last dimension is better turned around, along the last but one.

    torch's CPU kernel takes a last dimension of less than one vector element by element. (16, 64, 10), float32, us:
    forward 155, turned 17 (with both transposes 27); backward 77, turned 27; at 16 classes 16 and 24.
    """
    return dim == x.ndim - 1 and dim > 0 and x.shape[dim] < 16 and x.shape[dim - 1] >= 8 and x.device.type == "cpu"


def turned(x: torch.Tensor) -> torch.Tensor:
    """The last two dimensions exchanged, contiguous."""
    return x.transpose(-1, -2).contiguous()


def _forward(call: Callable[..., Any]) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Any, x: torch.Tensor, dim: int, to_float: bool) -> Any:
        dim = shifted(dim, x.ndim - 1)
        if x.ndim == 1:
            return call(x.unsqueeze(1), 1, to_float).squeeze(1), 0
        if is_short(x, dim):
            return call(turned(x), dim - 1, to_float).transpose(-1, -2), 0
        return call(x, dim, to_float), 0

    return rule


def _backward(call: Callable[..., Any]) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Any, grad: torch.Tensor, out: torch.Tensor, dim: int, dtype: Any) -> Any:
        grad, out = expanded(grad, in_dims[0], info.batch_size), expanded(out, in_dims[1], info.batch_size)
        if out.ndim == 1:
            return call(grad.unsqueeze(1), out.unsqueeze(1), 1, dtype).squeeze(1), 0
        dim = shifted(dim, out.ndim - 1)
        if is_short(out, dim):
            return call(turned(grad), turned(out), dim - 1, dtype).transpose(-1, -2), 0
        return call(grad, out, dim, dtype), 0

    return rule


for _name in ("_softmax", "_log_softmax"):
    for _op, _make in ((_name, _forward), (_name + "_backward_data", _backward)):
        register_rule(getattr(_aten, _op).default, _make(getattr(_aten, _op).default))
        LONE_CONTIGUOUS.add(getattr(_aten, _op).default)
