"""Layers whose settings may differ from member to member: a dropout rate, eps, momentum, a slope.

Each is written as a formula of torch functions, in which the numbers are `MemberValue`s. What a formula does not serve
it answers with a `Decline`, and the function runs for each member alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional as F

from memberwise._torch.dispatch import suspended
from memberwise.engine.signals import Decline
from memberwise.engine.tensor import MemberTensor, wrap
from memberwise.engine.values import combined, is_own
from memberwise.rules.registry import register_settings

_IN_PLACE = Decline("it is in place")


@register_settings(F.dropout)
def dropout(input: Any, p: Any = 0.5, training: bool = True, inplace: bool = False) -> Any:
    """Each member drops with its own rate, and draws as it does alone: nothing, where its rate is 0 or 1."""
    if not is_own(p) or not isinstance(input, MemberTensor) or inplace:
        return Decline("it is in place, or its input is no member's")
    if not training:
        return input
    region = input._region
    if region.randomness != "different" or input.device.type != "cpu" or not input.is_floating_point():
        return Decline("a draw that is refused, off the CPU, or equal in all members")
    if p._region is not region or not _is_dense(input) or any(not 0 <= rate <= 1 for rate in p._values):
        return Decline("memory with gaps, of which a lone run's draws make no copy, or a rate that torch refuses")
    region.keep_streams()
    with suspended(region):
        sizes, strides = (region.batch_size, *input.shape), (input.numel(), *input.stride())
        noise = torch.empty_strided(sizes, strides, dtype=input.dtype)  # drawn in the order of memory, as alone
        for member, rate in enumerate(p._values):
            _keep(noise[member], rate, None if region.generators is None else region.generators[member])
    region.drawn()
    return input * wrap(noise, region)


def _is_dense(tensor: torch.Tensor) -> bool:
    return tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True)).is_contiguous()


def _keep(noise: torch.Tensor, rate: float, generator: torch.Generator | None) -> None:
    """What torch multiplies with, drawn as it draws it."""
    if rate in (0, 1) or not noise.numel():
        noise.fill_(1 - rate)
    else:
        noise.bernoulli_(1 - rate, generator=generator).div_(1 - rate)


def _common(eps: Any) -> tuple[Any, Any]:
    """`(eps, factor)`: to normalise an input times `factor` with that `eps` is to normalise it with each one's own.

    `(c x - c m) / sqrt(c^2 v + e) = (x - m) / sqrt(v + e / c^2)`, to which each member chooses its c.
    """
    if not is_own(eps):
        return eps, 1.0
    if not all(type(value) is float and value > 0 for value in eps._values):
        return Decline("an eps that is no positive number"), None
    one = eps._values[0]
    return one, combined(lambda value: math.sqrt(one / value), eps)


def _with_own_eps(norm: Any, input: Any, over: Any, weight: Any, bias: Any, eps: Any) -> Any:
    """A norm of torch's that writes nothing, over shapes or groups that all members have alike."""
    eps, factor = _common(eps)
    if type(eps) is Decline or is_own(over):
        return Decline("an eps that is no positive number, or other shapes or groups")
    return norm(input * factor, over, weight, bias, eps)


@register_settings(F.layer_norm)
def layer_norm(input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-5) -> Any:
    """Each member with its own eps."""
    return _with_own_eps(F.layer_norm, input, normalized_shape, weight, bias, eps)


@register_settings(F.group_norm)
def group_norm(input: Any, num_groups: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-5) -> Any:
    """Each member with its own eps."""
    return _with_own_eps(F.group_norm, input, num_groups, weight, bias, eps)


@register_settings(F.batch_norm)
def batch_norm(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: Any = 0.1,
    eps: Any = 1e-5,
) -> Any:
    """Each member with its own eps and momentum; its running statistics are brought up to date here."""
    eps, factor = _common(eps)
    if type(eps) is Decline or is_own(training):
        return Decline("an eps that is no positive number, or other modes")
    x = input * factor if is_own(factor) else input
    if not training:
        mean, var = running_mean * factor, running_var * factor**2
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
    if running_mean is None or running_var is None:
        return F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
    with torch.no_grad():
        mean, var = running_mean.clone().zero_(), running_var.clone().zero_()
    out = F.batch_norm(x, mean, var, weight, bias, True, 1.0, eps)  # momentum 1: the batch's own statistics
    with torch.no_grad():
        running_mean.mul_(1 - momentum).add_(mean * (momentum / factor))
        running_var.mul_(1 - momentum).add_(var * (momentum / factor**2))
    return out


@register_settings(F.leaky_relu)
def leaky_relu(input: Any, negative_slope: Any = 0.01, inplace: bool = False) -> Any:
    """Each member with its own slope."""
    return _IN_PLACE if inplace else torch.where(input > 0, input, input * negative_slope)


@register_settings(F.elu)
def elu(input: Any, alpha: Any = 1.0, inplace: bool = False) -> Any:
    """Each member with its own alpha. The clamp keeps the side that is not taken finite, and its gradient with it."""
    return _IN_PLACE if inplace else torch.where(input > 0, input, torch.expm1(input.clamp(max=0)) * alpha)
