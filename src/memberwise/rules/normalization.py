"""Layer norm: normalised for all at once, then scaled by each member. Batch norm: members among the channels."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from memberwise.engine.signals import Decline
from memberwise.rules.axis import expanded
from memberwise.rules.composite import composite
from memberwise.rules.folding import into_channels, is_channels_last, joined, out_of_channels, split
from memberwise.rules.registry import LONE_CONTIGUOUS, register_rule

_aten = torch.ops.aten
_LAST = Decline("memory in channels_last order")


def _beside(value: torch.Tensor, dim: Any, ndim: int) -> torch.Tensor:
    """A weight of `layer_norm`, `(*n)` or `(M, *n)`, that broadcasts against `(M, *s, *n)` of `ndim` dimensions."""
    if dim is None:
        return value
    return value.view(value.shape[0], *(1,) * (ndim - value.ndim), *value.shape[1:])


def layer_norm(x: torch.Tensor, shape: Any, weight: Any, bias: Any, dims: Any, eps: float) -> Any:
    """`(out, normalised, mean, rstd)` of `(M, *s)`; weights `(*n)`, `(M, *n)` or None, as `dims` says.

    In half precision all but `out` are float32: the lone kernel scales before it rounds.
    """
    kind = x.dtype
    x, weight, bias = _widened(x, weight, bias)
    plain, mean, rstd = torch.native_layer_norm(x, shape, None, None, eps)
    scale = None if weight is None else _beside(weight, dims[0], x.ndim)
    if bias is None:
        out = plain if scale is None else plain * scale
    else:
        shift = _beside(bias, dims[1], x.ndim)
        out = plain + shift if scale is None else torch.addcmul(shift, plain, scale)
    return out.to(kind), plain, mean, rstd


def layer_norm_grads(
    grad: torch.Tensor,
    x: torch.Tensor,
    plain: Any,
    shape: Any,
    mean: Any,
    rstd: Any,
    weight: Any,
    w_dim: Any,
    mask: Any,
) -> tuple[Any, Any, Any]:
    """Gradients `(M, *s, *n)`, `(M, *n)`, `(M, *n)` or None; `plain` is the normalised input, or None."""
    kinds = x.dtype, x.dtype if weight is None else weight.dtype
    grad, x, mean, rstd, weight = _widened(grad, x, mean, rstd, weight)
    grad_x = grad_weight = None
    lead = tuple(range(1, x.ndim - len(shape)))
    if mask[0]:
        own = grad if weight is None else grad * _beside(weight, w_dim, x.ndim)
        args = own, x, shape, mean.contiguous(), rstd.contiguous(), None, None, [True, False, False]
        grad_x = _aten.native_layer_norm_backward.default(*args)[0].to(kinds[0])
    if mask[1]:
        plain = (x - mean).mul_(rstd) if plain is None else plain
        grad_weight = _total(grad * plain, lead).to(kinds[1])
    return grad_x, grad_weight, _total(grad, lead).to(kinds[1]) if mask[2] else None


def _widened(*values: Any) -> tuple[Any, ...]:
    halves = torch.bfloat16, torch.float16
    return tuple(value.float() if value is not None and value.dtype in halves else value for value in values)


def _total(value: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    return value.sum(dims) if dims else value


@register_rule(_aten.native_layer_norm.default)
def native_layer_norm(info: Any, in_dims: Any, x: Any, shape: Any, weight: Any, bias: Any, eps: float) -> Any:
    """torch's batching does the same, at 80 us more a call."""
    x_dim, _, w_dim, b_dim, _ = in_dims
    if w_dim is None and b_dim is None:
        return torch.native_layer_norm(x, shape, weight, bias, eps), 0
    x = expanded(x, x_dim, info.batch_size)
    out, _, mean, rstd = layer_norm(x, shape, weight, bias, (w_dim, b_dim), eps)
    kind = (weight if bias is None else bias).dtype
    return (out, mean.to(kind), rstd.to(kind)), 0


@register_rule(_aten.native_layer_norm_backward.default)
def native_layer_norm_backward(
    info: Any, in_dims: Any, grad: Any, x: Any, shape: Any, mean: Any, rstd: Any, weight: Any, bias: Any, mask: Any
) -> Any:
    """As `native_layer_norm`."""
    g_dim, x_dim, _, m_dim, r_dim, w_dim, _, _ = in_dims
    dims = (g_dim, x_dim, m_dim, r_dim)
    full = [expanded(value, dim, info.batch_size) for value, dim in zip((grad, x, mean, rstd), dims, strict=True)]
    return layer_norm_grads(*full[:2], None, shape, *full[2:], weight, w_dim, mask), 0


LONE_CONTIGUOUS.update({_aten.native_layer_norm.default, _aten.native_layer_norm_backward.default})


class Statistics:
    """The running mean and variance of all members, `(M, C)` each, as one `(M * C)` that can be written."""

    def __init__(self, mean: Any, var: Any, dims: Any, size: int) -> None:
        self.own = [(value, dim) for value, dim in ((mean, dims[0]), (var, dims[1])) if dim == 0]
        self.mean, self.var = joined(mean, dims[0], size), joined(var, dims[1], size)

    def write_back(self) -> None:
        """Where `(M * C)` had to be a copy, bring into the buffers what was written to it."""
        for (value, _), flat in zip(self.own, (self.mean, self.var), strict=False):
            if not value.is_contiguous():
                value.copy_(flat.view_as(value))


def batch_norm(call: Any, size: int, dims: Any, x: Any, weight: Any, bias: Any, mean: Any, var: Any, *rest: Any) -> Any:
    """`(M, B, C, *)` normalised by `call`, a batch norm of torch's, with the members among the channels."""
    stats = Statistics(mean, var, dims[3:5], size)
    x = into_channels(expanded(x, dims[0], size))
    out, *more = call(x, joined(weight, dims[1], size), joined(bias, dims[2], size), stats.mean, stats.var, *rest)
    stats.write_back()
    return out_of_channels(out, size), *more


def _batch_norm_rule(call: Any) -> Any:
    def rule(info: Any, in_dims: Any, x: Any, *args: Any) -> Any:
        """torch's batching does the same in other memory; it costs 1.5 times as long for 8 channels, M = 16."""
        size = info.batch_size
        if is_channels_last(expanded(x, in_dims[0], size)):
            return _LAST
        training = args[4]
        if training and args[2] is not None and (in_dims[3] is None or in_dims[4] is None):
            return Decline("the running statistics are shared, and each member writes its own")
        out, mean, invstd, *more = batch_norm(call, size, in_dims, x, *args)
        return (out, split(mean, size), split(invstd, size), *more), (0, 0, 0, *(None for _ in more))

    return rule


for _op in (_aten.native_batch_norm.default, _aten._native_batch_norm_legit.default):
    register_rule(_op, _batch_norm_rule(_op))


@register_rule(_aten._native_batch_norm_legit.no_stats)
def native_batch_norm_legit_no_stats(info: Any, in_dims: Any, x: Any, weight: Any, bias: Any, *rest: Any) -> Any:
    """As `native_batch_norm`, without running statistics."""
    dims = [*in_dims[:3], None, None, *in_dims[3:]]
    return _batch_norm_rule(_aten.native_batch_norm.default)(info, dims, x, weight, bias, None, None, *rest)


def batch_norm_grads(
    size: int, dims: Any, grad: Any, x: Any, weight: Any, mean: Any, var: Any, saved: Any, invstd: Any, *rest: Any
) -> Any:
    """Gradients `(M, B, C, *)`, `(M, C)`, `(M, C)` or None. `dims` are of `grad` to `invstd`, `rest` as in torch's."""
    flat = [joined(value, dim, size) for value, dim in zip((weight, mean, var, saved, invstd), dims[2:], strict=True)]
    folded = into_channels(expanded(grad, dims[0], size)), into_channels(expanded(x, dims[1], size))
    grad_x, *found = _aten.native_batch_norm_backward.default(*folded, *flat, *rest)
    grad_x = None if grad_x is None else out_of_channels(grad_x, size)
    return grad_x, *(None if one is None else split(one, size) for one in found)


@register_rule(_aten.native_batch_norm_backward.default)
def native_batch_norm_backward(info: Any, in_dims: Any, grad: Any, x: Any, *args: Any) -> Any:
    """As `native_batch_norm`."""
    size, mask = info.batch_size, args[-1]
    if is_channels_last(expanded(grad, in_dims[0], size)) or is_channels_last(expanded(x, in_dims[1], size)):
        return _LAST
    found = batch_norm_grads(size, in_dims[:7], grad, x, *args)
    return tuple(value if wanted else None for value, wanted in zip(found, mask, strict=True)), 0


LONE_CONTIGUOUS.update(
    {
        _aten.native_batch_norm.default,
        _aten._native_batch_norm_legit.default,
        _aten._native_batch_norm_legit.no_stats,
        _aten.native_batch_norm_backward.default,
    }
)


def _layer_norm_signature(
    input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:  # F.layer_norm's own names
    shape = list(normalized_shape)
    if list(input.shape[input.ndim - len(shape) :]) != shape or not shape:
        return Decline("shapes that torch refuses")
    return input, shape, weight, bias, eps


@composite(F.layer_norm, signature=_layer_norm_signature)
class LayerNorm:
    """`(x - mean) / std * weight + bias`."""

    @staticmethod
    def forward(info: Any, in_dims: Any, x: Any, shape: Any, weight: Any, bias: Any, eps: float) -> Any:
        if 0 not in in_dims:
            return Decline("equal in all members")
        x = expanded(x, in_dims[0], info.batch_size)
        out, plain, mean, rstd = layer_norm(x, shape, weight, bias, (in_dims[2], in_dims[3]), eps)
        return out, (plain, mean, rstd)

    @staticmethod
    def backward(info: Any, in_dims: Any, needs: Any, inputs: Any, kept: Any, grad: torch.Tensor) -> Any:
        x, shape, weight, _, _ = inputs
        x = expanded(x, in_dims[0], info.batch_size)
        mask = needs[0], needs[2], needs[3]
        grad_x, grad_weight, grad_bias = layer_norm_grads(grad, x, kept[0], shape, *kept[1:], weight, in_dims[2], mask)
        return grad_x, None, grad_weight, grad_bias, None


def _batch_norm_signature(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:  # F.batch_norm's own names
    if input.ndim < 2 or input.numel() == 0 or (training and input.numel() == input.shape[1]) or eps <= 0:
        return Decline("an empty batch, or arguments that torch refuses")
    return input, running_mean, running_var, weight, bias, training, momentum, eps


def _normalised(x: Any, mean: Any, var: Any, weight: Any, bias: Any, training: bool, momentum: Any, eps: Any) -> Any:
    """What is differentiated again: in training the statistics have been written already, and are not read."""
    stats = (None, None) if training else (mean, var)
    return F.batch_norm(x, *stats, weight, bias, training, momentum, eps)


@composite(F.batch_norm, signature=_batch_norm_signature)
class BatchNorm:
    """Batch norm on the CPU, where torch has one kernel for it."""

    plain = _normalised

    @staticmethod
    def forward(info: Any, in_dims: Any, x: Any, mean: Any, var: Any, weight: Any, bias: Any, *rest: Any) -> Any:
        if 0 not in in_dims or x.device.type != "cpu" or is_channels_last(expanded(x, in_dims[0], 1)):
            return Decline("equal in all members, off the CPU, or in channels_last order")
        if rest[0] and mean is not None:
            if in_dims[1] is None or in_dims[2] is None:
                return Decline("the running statistics are shared, and each member writes its own")
            info.keep(mean)
            info.keep(var)
        dims = [in_dims[k] for k in (0, 3, 4, 1, 2)]
        call = _aten.native_batch_norm.default
        out, *saved = batch_norm(call, info.batch_size, dims, x, weight, bias, mean, var, *rest)
        return out, saved

    @staticmethod
    def backward(info: Any, in_dims: Any, needs: Any, inputs: Any, kept: Any, grad: torch.Tensor) -> Any:
        x, mean, var, weight, _, training, _, eps = inputs
        dims = (0, *(in_dims[k] for k in (0, 3, 1, 2)), 0, 0)
        mask = [needs[0], needs[3], needs[4]]
        args = x, weight, mean, var, *kept, training, eps, mask
        grad_x, grad_weight, grad_bias = batch_norm_grads(info.batch_size, dims, grad, *args)
        return grad_x if needs[0] else None, None, None, grad_weight, grad_bias, None, None, None
