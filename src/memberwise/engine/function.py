"""Above autograd: composite rules, and the reads of memory that no dispatch sees."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn import functional as F

from memberwise._torch.compound import inside
from memberwise._torch.dispatch import DisableTorchFunctionSubclass
from memberwise.engine import closures, lowering, numbers, values
from memberwise.engine.closures import taken_in
from memberwise.engine.host import HOST
from memberwise.engine.retreat import function_by_members
from memberwise.engine.signals import Decline
from memberwise.engine.tensor import MemberTensor
from memberwise.engine.values import MemberValue
from memberwise.rules.registry import composite_for


def on_function(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """Entry from `__torch_function__`."""
    own = values.exist and numbers.among(args, kwargs)
    if func in COMPOUND and not own:
        return COMPOUND[func](*args, **(kwargs or {}))
    reason = ""
    if own:
        out = numbers.taken(func, args, kwargs or {}, own)
        if type(out) is not Decline:
            return out
        cls, reason = own[0]._region.tensor_class, out.reason
    with DisableTorchFunctionSubclass():
        rule = None if own else composite_for(func)
        if rule is not None:
            out = rule(*args, **kwargs) if kwargs else rule(*args)
            if type(out) is not Decline:
                return out
        if torch.is_grad_enabled():
            own_args, own_kwargs = taken_in(cls, args, kwargs)
            if rule is not None and (own_args is not args or own_kwargs is not kwargs):
                return on_function(cls, func, types, own_args, own_kwargs)
            args, kwargs = own_args, own_kwargs
        below = lowering.found_in(args, kwargs)
        if below:
            lowering.make_way(func, below)
            if not torch.is_grad_enabled():
                return _looking(below, func, args, kwargs, reason)
        return _single(func, args, kwargs, reason)


def _looking(below: list[MemberTensor], func: Any, args: Any, kwargs: Any, reason: str) -> Any:
    """Gradients being off, an operation reads lowered tensors as they are."""
    for member in below:
        if member._differs and member._lowered:
            lowering.settle_with_its_graph(member)
    region = below[0]._region
    before, region.looking = region.looking, True
    try:
        return _single(func, args, kwargs, reason)
    finally:
        region.looking = before


def _single(func: Any, args: Any, kwargs: Any, reason: str) -> Any:
    rule = HOST.get(func)
    if rule is not None:
        return rule(*args, **kwargs) if kwargs else rule(*args)
    reason = reason or BY_MEMBERS.get(func, "")
    if reason:
        return function_by_members(func, reason, args, kwargs or {})
    return func(*args, **kwargs) if kwargs else func(*args)


COMPOUND = {F.multi_head_attention_forward: inside(F.multi_head_attention_forward)}
"""Functions made of others that have composite rules, and how to run one such that those are met."""

HOST[torch.autograd.grad] = closures.grad
HOST[torch.Tensor.requires_grad.__get__] = lowering.requires_grad  # type: ignore[attr-defined] # a getset descriptor

BY_MEMBERS: dict[Any, str] = {
    F.linear_cross_entropy: "its backward writes gradients into plain tensors that it makes itself",
    torch.sparse.mm: "with a reduction, its kernel asks whether its arguments need a gradient",
}
"""Functions whose backward formula cannot see member tensors, and why: each member runs them alone."""


MemberValue._on_function = functools.partial(on_function, None)
MemberTensor.__torch_function__ = classmethod(on_function)  # type: ignore[assignment] # one call less an operation
