"""Convolutions: members among the channels (one grouped call), among the batch, or one call a member.

Results lie `(B, M, C, *)` in memory, which the next convolution, batch norm or pooling reads without a copy.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from memberwise._torch.tracing import tracing
from memberwise.engine.signals import Decline
from memberwise.rules.axis import expanded
from memberwise.rules.folding import (
    into_batch,
    into_channels,
    is_channels_last,
    joined,
    out_of_batch,
    out_of_channels,
)
from memberwise.rules.registry import LONE_CONTIGUOUS, register_rule

_aten = torch.ops.aten
_LAST = Decline("memory in channels_last order", by_member=True)

LONE_CONTIGUOUS.update({_aten.convolution.default, _aten.convolution_backward.default})


@register_rule(_aten.convolution.default)
def convolution(
    info: Any, in_dims: Any, x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, *rest: Any
) -> Any:
    """torch's batching knows grouped calls alone: 14 ms for 12 -> 24 channels, M = 8, where one call a member takes
    8.8. Where one grouped call is best, it does the same, and takes 10 % longer."""
    x_dim, w_dim, b_dim = in_dims[:3]
    if is_channels_last(expanded(x, x_dim, 1)) or is_channels_last(expanded(weight, w_dim, 1)):
        return _LAST
    size, (transposed, extra, groups) = info.batch_size, rest
    where = stride, padding, dilation, transposed, extra
    if w_dim is None:
        out = torch.convolution(into_batch(x) if x_dim == 0 else x, weight, None, *where, groups)
        out = out_of_batch(out, size) if x_dim == 0 else out
        return (out if bias is None else out + _beside(bias, b_dim, out.ndim - (x_dim == 0))), 0
    if x_dim is None and groups == 1:
        out = torch.convolution(x, _wide(weight, transposed), joined(bias, b_dim, size), *where, 1)
        return out_of_channels(out, size), 0
    x = expanded(x, x_dim, size)
    if not _is_grouped(x, weight, stride, transposed):
        return _by_member(x, weight, bias, b_dim, where, groups), 0
    out = torch.convolution(into_channels(x), into_batch(weight), joined(bias, b_dim, size), *where, size * groups)
    return out_of_channels(out, size), 0


def _beside(bias: torch.Tensor, dim: Any, ndim: int) -> torch.Tensor:
    """A bias, `(C)` or `(M, C)`, that broadcasts over members' results of `ndim` dimensions."""
    rest = (1,) * (ndim - 2)
    return bias.view(-1, *rest) if dim is None else bias.view(bias.shape[0], 1, -1, *rest)


def _wide(weight: torch.Tensor, transposed: bool) -> torch.Tensor:
    """The members' filters side by side: `(M * O, C, *)`, or `(C, M * O, *)` of a transposed convolution."""
    return into_channels(weight) if transposed else into_batch(weight)


def _is_grouped(x: torch.Tensor, weight: torch.Tensor, stride: Any, transposed: bool) -> bool:
    """Whether one grouped call for all members beats one call a member.

    Off the CPU always. On the CPU oneDNN has fast grouped kernels for whole blocks of 8 channels, and for one
    channel; others take 1.2 to 2.4 times as long as one call a member, unless a member's share is so small that
    the calls themselves cost the most. What a grouped call of whole blocks saves are calls; of large ones it takes
    longer than they do. A recording may have the channels last, where grouped ones are as fast as others, and faster
    than they are here (`capture/layout.py`).

    Measured on an EPYC (Zen 5), one thread and two, M = 3 and 8, forward / backward, grouped to apart: C = O = 8 to
    32, 3 x 3, at most 80 million products a member: 0.2 to 0.9 / 0.2 to 1.0; 64 to 256, 300 million products and more:
    0.9 to 1.4 / 1.0 to 1.4; 512, 4 x 4: 2.1 / 1.8; one channel a group (64, 32 x 32): 1.0 / 0.8. Not in whole blocks
    (12; 10 -> 20, 5 x 5): 1.7 / 1.6; 1 -> 16, 28 x 28: 1.7 / 0.4; with at most 600 000 products a member 0.2 to 1.1.
    """
    if x.device.type != "cpu" or (tracing() and x.ndim == 5 and not transposed):
        return True
    one, other = weight.shape[1:3]
    if other == 1:
        return True
    positions = math.prod(x.shape[3:]) // (1 if transposed else math.prod(stride))
    products = x.shape[1] * positions * math.prod(weight.shape[1:])
    in_blocks = one % 8 == 0 and other % 8 == 0
    return products <= (200_000_000 if in_blocks else 600_000)


def _by_member(x: torch.Tensor, weight: torch.Tensor, bias: Any, b_dim: Any, where: Any, groups: int) -> torch.Tensor:
    out: Any = None
    for i, (own, filters) in enumerate(zip(x.unbind(0), weight.unbind(0), strict=True)):
        found = torch.convolution(own, filters, bias[i] if b_dim == 0 else bias, *where, groups)
        if out is None:
            batch, channels, *space = found.shape
            out = out_of_channels(found.new_empty((batch, x.shape[0] * channels, *space)), x.shape[0])
        out[i].copy_(found)
    return out


@register_rule(_aten.convolution_backward.default)
def convolution_backward(info: Any, in_dims: Any, grad: Any, x: Any, weight: Any, sizes: Any, *where: Any) -> Any:
    """As `convolution`: 23 ms by torch's batching, and 15."""
    dims, size, mask = in_dims[:3], info.batch_size, where[-1]
    full = [expanded(value, dim, size) for value, dim in zip((grad, x, weight), dims, strict=True)]
    if any(map(is_channels_last, full)):
        return _LAST
    grad = full[0]
    grad_bias = grad.sum((1, *range(3, grad.ndim))) if mask[2] else None
    if dims[1] == 0 and dims[2] == 0:
        return (*_grads_apart(*full, where, mask[:2]), grad_bias), 0
    grad_x = _grad_input(full, weight, dims[2], where) if mask[0] else None
    grad_weight = _grad_weight(full, x, dims[1], where) if mask[1] else None
    return (grad_x, grad_weight, grad_bias), 0


def _grads(grad: Any, x: Any, weight: Any, where: Any, groups: int, wanted: Any) -> Any:
    return _aten.convolution_backward.default(grad, x, weight, None, *where[:5], groups, [*wanted, False])[:2]


def _grad_input(full: Any, weight: torch.Tensor, w_dim: Any, where: Any) -> torch.Tensor:
    """`(M, B, C, *)`; with shared filters members join the batch."""
    if w_dim == 0:
        return _grads_apart(*full, where, (True, False))[0]
    grad, x, _ = full
    found = _grads(into_batch(grad), into_batch(x), weight, where, where[5], (True, False))[0]
    return out_of_batch(found, grad.shape[0])


def _grad_weight(full: Any, x: torch.Tensor, x_dim: Any, where: Any) -> torch.Tensor:
    """`(M, O, C, *)`; with a shared input the members' filters lie side by side."""
    grad, _, weight = full
    size, transposed, groups = grad.shape[0], where[3], where[5]
    if x_dim == 0 or groups > 1:
        return _grads_apart(*full, where, (False, True))[1]
    found = _grads(into_channels(grad), x, _wide(weight, transposed), where, 1, (False, True))[1]
    return out_of_channels(found, size) if transposed else out_of_batch(found, size)


def _grads_apart(grad: Any, x: Any, weight: Any, where: Any, wanted: Any) -> Any:
    """Gradients of input and filters, where both are the members' own."""
    size, groups = grad.shape[0], where[5]
    if not _is_grouped(x, weight, where[0], where[3]):
        return _grads_by_member(grad, x, weight, where, wanted)
    folded = into_channels(grad), into_channels(x), into_batch(weight)
    grad_x, grad_weight = _grads(*folded, where, size * groups, wanted)
    return (
        out_of_channels(grad_x, size) if wanted[0] else None,
        out_of_batch(grad_weight, size) if wanted[1] else None,
    )


def _grads_by_member(grad: Any, x: Any, weight: Any, where: Any, wanted: Any) -> Any:
    size, batch, channels, *space = x.shape
    grad_x = out_of_channels(x.new_empty((batch, size * channels, *space)), size) if wanted[0] else None
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if wanted[1] else None
    for i, own in enumerate(zip(grad.unbind(0), x.unbind(0), weight.unbind(0), strict=True)):
        found = _grads(*own, where, where[5], wanted)
        for whole, part in zip((grad_x, grad_weight), found, strict=True):
            if whole is not None:
                whole[i].copy_(part)
    return grad_x, grad_weight
