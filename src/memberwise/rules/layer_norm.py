"""Layer norm: normalised for all members at once, then scaled by each."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from memberwise.engine.signals import Decline
from memberwise.rules.axis import expanded
from memberwise.rules.composite import composite
from memberwise.rules.registry import LONE_CONTIGUOUS, register_rule

_aten = torch.ops.aten


def _beside(value: torch.Tensor, dim: Any, ndim: int) -> torch.Tensor:
    """A weight of `layer_norm`, `(*n)` or `(M, *n)`, that broadcasts against `(M, *s, *n)` of `ndim` dimensions."""
    if dim is None:
        return value
    return value.view(value.shape[0], *(1,) * (ndim - value.ndim), *value.shape[1:])


def layer_norm(x: torch.Tensor, shape: Any, weight: Any, bias: Any, dims: Any, eps: float) -> Any:
    """`(out, mean, rstd)` of `(M, *s)`; weights `(*n)`, `(M, *n)` or None, as `dims` says.

    In half precision all but `out` are float32: the lone kernel scales before it rounds.
    """
    kind = x.dtype
    x, weight, bias = _widened(x, weight, bias)
    plain, mean, rstd = torch.native_layer_norm(x, shape, None, None, eps)
    scale = None if weight is None else _beside(weight, dims[0], x.ndim)
    if bias is None:
        out = plain if scale is None else plain.mul_(scale)
    else:
        shift = _beside(bias, dims[1], x.ndim)
        out = plain.add_(shift) if scale is None else torch.addcmul(shift, plain, scale, out=plain)
    return out.to(kind), mean, rstd


def layer_norm_grads(
    grad: torch.Tensor,
    x: torch.Tensor,
    shape: Any,
    mean: Any,
    rstd: Any,
    weight: Any,
    w_dim: Any,
    mask: Any,
) -> tuple[Any, Any, Any]:
    """Gradients `(M, *s, *n)`, `(M, *n)`, `(M, *n)` or None.

    The normalised input is made once more: kept, it would be a tensor more than alone for each layer.
    """
    kinds = x.dtype, x.dtype if weight is None else weight.dtype
    grad, x, mean, rstd, weight = _widened(grad, x, mean, rstd, weight)
    grad_x = grad_weight = None
    lead = tuple(range(1, x.ndim - len(shape)))
    if mask[0]:
        own = grad if weight is None else grad * _beside(weight, w_dim, x.ndim)
        args = own, x, shape, mean.contiguous(), rstd.contiguous(), None, None, [True, False, False]
        grad_x = _aten.native_layer_norm_backward.default(*args)[0].to(kinds[0])
    if mask[1]:
        plain = torch.addcmul(-mean * rstd, x, rstd)
        grad_weight = _total(plain.mul_(grad), lead).to(kinds[1])
    return grad_x, grad_weight, _total(grad, lead).to(kinds[1]) if mask[2] else None


def _widened(*values: Any) -> tuple[Any, ...]:
    halves = torch.bfloat16, torch.float16
    return tuple(value.float() if value is not None and value.dtype in halves else value for value in values)


def _total(value: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    return value.sum(dims) if dims else value


@register_rule(_aten.native_layer_norm.default)
def native_layer_norm(info: Any, in_dims: Any, x: Any, shape: Any, weight: Any, bias: Any, eps: float) -> Any:
    """torch's batching does the same, at 15 us more."""
    x_dim, _, w_dim, b_dim, _ = in_dims
    if w_dim is None and b_dim is None:
        return torch.native_layer_norm(x, shape, weight, bias, eps), 0
    x = expanded(x, x_dim, info.batch_size)
    out, mean, rstd = layer_norm(x, shape, weight, bias, (w_dim, b_dim), eps)
    kind = mean.dtype if x.is_cuda else (weight if bias is None else bias).dtype
    return (out, mean.to(kind), rstd.to(kind)), 0


@register_rule(_aten.native_layer_norm_backward.default)
def native_layer_norm_backward(
    info: Any, in_dims: Any, grad: Any, x: Any, shape: Any, mean: Any, rstd: Any, weight: Any, bias: Any, mask: Any
) -> Any:
    """As `native_layer_norm`."""
    g_dim, x_dim, _, m_dim, r_dim, w_dim, _, _ = in_dims
    dims = (g_dim, x_dim, m_dim, r_dim)
    full = [expanded(value, dim, info.batch_size) for value, dim in zip((grad, x, mean, rstd), dims, strict=True)]
    return layer_norm_grads(*full[:2], shape, *full[2:], weight, w_dim, mask), 0


LONE_CONTIGUOUS.update({_aten.native_layer_norm.default, _aten.native_layer_norm_backward.default})


def _signature(
    input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:  # F.layer_norm's own names
    shape = list(normalized_shape)
    if list(input.shape[input.ndim - len(shape) :]) != shape or not shape:
        return Decline("shapes that torch refuses")
    return input, shape, weight, bias, eps


@composite(F.layer_norm, signature=_signature)
class LayerNorm:
    """`(x - mean) / std * weight + bias`."""

    @staticmethod
    def forward(info: Any, in_dims: Any, x: Any, shape: Any, weight: Any, bias: Any, eps: float) -> Any:
        if 0 not in in_dims:
            return Decline("equal in all members")
        x = expanded(x, in_dims[0], info.batch_size)
        out, *statistics = layer_norm(x, shape, weight, bias, (in_dims[2], in_dims[3]), eps)
        return out, statistics

    @staticmethod
    def backward(info: Any, in_dims: Any, needs: Any, inputs: Any, kept: Any, grad: torch.Tensor) -> Any:
        x, shape, weight, _, _ = inputs
        x = expanded(x, in_dims[0], info.batch_size)
        mask = needs[0], needs[2], needs[3]
        grad_x, grad_weight, grad_bias = layer_norm_grads(grad, x, shape, *kept, weight, in_dims[2], mask)
        return grad_x, None, grad_weight, grad_bias, None
