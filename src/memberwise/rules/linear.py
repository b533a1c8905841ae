"""Linear layers as one node: a batched product with its bias."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from memberwise._torch.dispatch import applier, shorten_backward
from memberwise.engine.signals import Decline
from memberwise.rules.axis import expanded
from memberwise.rules.composite import composite
from memberwise.rules.matmul import batched, batched_plus


def _signature(input: Any, weight: Any, bias: Any = None) -> Any:  # F.linear's own name
    if weight.ndim != 2 or input.ndim < 1 or input.is_complex() or not weight.numel():
        return Decline("complex, or a weight that is empty or no matrix")
    return input, weight, bias


class _Below(torch.autograd.Function):
    """`x @ weight.T + bias`, all stacked. torch's own formula gives a weight's gradient transposed, and copies it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        needs = ctx.needs_input_grad
        ctx.save_for_backward(x if needs[1] else None, weight if needs[0] else None)
        return _product(x, 0, weight, bias, 0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return (
            batched(grad, weight) if needs[0] else None,
            batched(grad.transpose(1, 2), x) if needs[1] else None,
            grad.sum(1) if needs[2] else None,
        )


shorten_backward(_Below)
_below = applier(_Below)


@composite(F.linear, signature=_signature)
class Linear:
    """`x @ weight.T + bias`; by single operations it is a view, a product and an addition each way."""

    @staticmethod
    def saves(needs: Any) -> tuple[int, ...]:
        """As alone: the one for the gradient of the other."""
        return (0, 1) if needs[0] and needs[1] else (0,) if needs[1] else (1,) if needs[0] else ()

    @staticmethod
    def forward(info: Any, in_dims: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        x_dim, w_dim, b_dim = in_dims
        if x_dim is None and w_dim is None:
            return Decline("only the bias differs between members")
        lead = x.shape[1:-1] if x_dim == 0 else x.shape[:-1]
        if w_dim is None:
            out = F.linear(x, weight)
            return (out if bias is None else out + _bias_like(bias, b_dim, out.ndim)), ()
        if x_dim == 0 and x.ndim == 3:
            return _product(x, 0, weight, bias, b_dim), ()
        rows = x.reshape(info.batch_size, -1, x.shape[-1]) if x_dim == 0 else x.reshape(-1, x.shape[-1])
        out = _product(rows, x_dim, weight, bias, b_dim)
        return out.reshape(info.batch_size, *lead, weight.shape[1]), ()

    @staticmethod
    def below(info: Any, in_dims: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        x_dim, w_dim, b_dim = in_dims
        if w_dim is None or (bias is not None and b_dim is None) or x.ndim != (2 if x_dim is None else 3):
            return Decline("a shared weight or bias, or rows in other dimensions")
        return _below(expanded(x, x_dim, info.batch_size), weight, bias)

    @staticmethod
    def backward(info: Any, in_dims: Any, needs: Any, inputs: Any, kept: Any, grad: torch.Tensor) -> Any:
        x, weight, _ = inputs
        x_dim, w_dim, _ = in_dims
        size = info.batch_size
        flat = grad.ndim == 3  # most often; a reshape that does nothing takes a microsecond
        rows = grad if flat else grad.reshape(size, -1, grad.shape[-1])
        grad_x = grad_weight = None
        if needs[0]:
            back = batched(rows, weight) if w_dim == 0 else rows @ weight
            grad_x = back if flat else back.reshape(*grad.shape[:-1], weight.shape[-1])
        if needs[1]:
            own = x if flat else x.reshape(size, -1, x.shape[-1]) if x_dim == 0 else x.reshape(-1, x.shape[-1])
            grad_weight = batched(rows.transpose(1, 2), expanded(own, x_dim, size))
        return grad_x, grad_weight, rows.sum(1) if needs[2] else None

    @staticmethod
    def again(needs: Any, inputs: Any, kept: Any, grad: torch.Tensor) -> Any:
        """Two products, and a sum."""
        x, weight, _ = inputs
        rows = grad.reshape(-1, grad.shape[-1])
        grad_weight = rows.t() @ x.reshape(-1, x.shape[-1]) if needs[1] else None
        return grad @ weight if needs[0] else None, grad_weight, rows.sum(0) if needs[2] else None


def _bias_like(bias: torch.Tensor, dim: Any, ndim: int) -> torch.Tensor:
    return bias if dim is None else bias.view(bias.shape[0], *(1,) * (ndim - 2), bias.shape[1])


def _product(rows: torch.Tensor, dim: Any, weight: torch.Tensor, bias: Any, b_dim: Any) -> torch.Tensor:
    """`(M, n, out)`, contiguous; with a shared left side, each member's product reads the same rows."""
    left, right = expanded(rows, dim, weight.shape[0]), weight.transpose(1, 2)
    if bias is None:
        return batched(left, right).contiguous()
    return batched_plus(bias if b_dim is None else bias.unsqueeze(1), left, right).contiguous()
