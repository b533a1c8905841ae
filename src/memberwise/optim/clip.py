"""Clipping gradients by their norm, each member alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import torch

from memberwise._torch import fused
from memberwise._torch.tracing import watched
from memberwise.errors import ArgumentError, EngineError, StackWarning, fail, text
from memberwise.optim.adoption import count_members, is_shared
from memberwise.optim.parts import Part, count_in_parts, own_values, part_of, total
from memberwise.optim.values import Hyper, accept, numbers, plain


@runtime_checkable
class HasParameters(Protocol):
    """A stack, or any module."""

    def parameters(self) -> Iterable[torch.Tensor]: ...


@torch.no_grad()
def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor] | HasParameters,
    max_norm: Hyper,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> torch.Tensor:
    """Scale each member's gradients, in place, to a norm of at most `max_norm`; answer the norms before, (M,).

    Member i is clipped as by `torch.nn.utils.clip_grad_norm_` over its own gradients alone: the norm is taken over
    all its parameters, and a member whose norm is infinite or NaN leaves the others untouched.

    `parameters`: a stack or another module, tensors (M, *s), or one. `max_norm`: one number, or M of them. A shared
    parameter's gradient, the sum over the members, is no member's own: the shared parameters are clipped together
    by their own norm, to `max_norm` (that needs to be one number), and the norms that are returned leave them out.
    `foreach` is there for torch's sake. Any floating or complex dtype.

    Raises, before any gradient changes, ArgumentError for a wrong number of values (MW401, MW403) or of members
    (MW404), and, if `error_if_nonfinite`, EngineError naming the members whose norm is not finite (MW407).

    >>> import torch
    >>> weight = torch.zeros(2, 3, requires_grad=True)
    >>> weight.grad = torch.tensor([[3.0, 4.0, 0.0], [0.3, 0.4, 0.0]])
    >>> clip_grad_norm_([weight], 1.0)
    tensor([5.0000, 0.5000])
    >>> weight.grad
    tensor([[0.6000, 0.8000, 0.0000],
            [0.3000, 0.4000, 0.0000]])
    """
    found = _listed(parameters)
    count = total(found)
    if count is not None:
        return _clip_in_parts(found, count, max_norm, norm_type, error_if_nonfinite)
    members = count_members([(f"parameter {i}", parameter) for i, parameter in enumerate(found)])
    limit = accept("max_norm", max_norm, members)
    limit = max_norm if isinstance(max_norm, torch.Tensor) else plain(limit)  # recordings know the user's tensor
    own = [p.grad for p in found if p.grad is not None and not is_shared(p)]
    common = [p.grad[None] for p in found if p.grad is not None and is_shared(p)]  # as if of a single member
    common_limit = _one(limit) if common else limit
    own_norms, common_norms = _norms(own, members, norm_type), _norms(common, 1, norm_type)
    if error_if_nonfinite:
        _check_finite(own_norms, common_norms, norm_type)
    _scale(own, limit, own_norms)
    _scale(common, common_limit, common_norms)
    return own_norms


def _clip_in_parts(
    found: list[torch.Tensor], count: int, max_norm: Hyper, norm_type: float, error_if_nonfinite: bool
) -> torch.Tensor:
    """The same for the parameters of a group: the members of each stack by themselves."""
    count_in_parts([(f"parameter {i}", parameter) for i, parameter in enumerate(found)])
    by_part: dict[Part | None, list[torch.Tensor]] = {}
    for parameter in found:
        by_part.setdefault(part_of(parameter), []).append(parameter)
    norms = torch.zeros(count)
    for part, own in by_part.items():
        if part is not None:
            grads = [parameter.grad for parameter in own if parameter.grad is not None]
            norms[[*part[0]]] = _norms(grads, len(part[0]), norm_type).to(norms)
    if error_if_nonfinite:
        _check_finite(norms, norms[:0], norm_type)
    for part, own in by_part.items():
        clip_grad_norm_(own, own_values(max_norm, part), norm_type, error_if_nonfinite)
    return norms


def _listed(parameters: torch.Tensor | Iterable[torch.Tensor] | HasParameters) -> list[torch.Tensor]:
    if isinstance(parameters, torch.Tensor):
        return [parameters]
    # A stack is an iterable too: of its members.
    found = list(parameters.parameters() if isinstance(parameters, HasParameters) else parameters)
    if not found:
        warnings.warn(text("MW412", "there are no parameters to clip"), StackWarning, stacklevel=4)
    return found


def _one(limit: float | torch.Tensor) -> float:
    """The value that all members have."""
    values = set(numbers(limit, 1))
    if len(values) > 1:
        what = f"max_norm: expected one value, as there are shared parameters, found {numbers(limit, 1)}"
        fail(ArgumentError, "MW403", what, do="Clip the shared parameters in a call of their own")
    return values.pop()


def _norms(grads: list[torch.Tensor], members: int | None, norm_type: float) -> torch.Tensor:
    """The norms (M,) over all of a member's gradients, as if they were one vector."""
    grads = [grad for grad in grads if grad.numel()]
    if not grads:
        return torch.zeros(members or 0)
    # one parameter after the other, so that a recording repeats itself by layers
    norms = [torch.linalg.vector_norm(g.reshape(g.shape[0], -1), norm_type, dim=1).to(grads[0].device) for g in grads]
    return torch.linalg.vector_norm(torch.stack(norms), norm_type, dim=0)


def _scale(grads: list[torch.Tensor], limit: float | torch.Tensor, norms: torch.Tensor) -> None:
    """Multiply each member's gradients by `limit / norm` where that is less than 1, by 1 elsewhere."""
    limit = limit.to(norms.device, norms.dtype) if isinstance(limit, torch.Tensor) else limit
    factors = torch.clamp(limit / (norms + 1e-6), max=1.0)
    cast = {key: factors.to(*key) for key in {(grad.device, grad.real.dtype) for grad in grads}}
    beside = (cast[g.device, g.real.dtype].view(-1, *[1] * (g.ndim - 1)) for g in grads)
    if grads and not watched():
        fused.mul_(grads, [*beside])
        return
    for grad, factor in zip(grads, beside, strict=True):
        grad.mul_(factor)


def _check_finite(own: torch.Tensor, common: torch.Tensor, norm_type: float) -> None:
    found = [f"member {i}: {norm}" for i, norm in enumerate(own.tolist()) if not math.isfinite(norm)]
    found += [f"the shared parameters: {norm}" for norm in common.tolist() if not math.isfinite(norm)]
    if found:
        what = f"expected finite gradient norms of order {norm_type}, found {'; '.join(found[:10])}"
        fail(EngineError, "MW407", what, do="Set error_if_nonfinite=False to let the other members go on")
