"""Composite rules: a whole layer as one autograd node, that unwraps once in forward and once in backward.

They are for speed alone: without them the layer's ATen operations go down the ladder one by one, with the same
result. A composite is a class with two static methods on stacked tensors, below autograd:

    forward(info, in_dims, *args)                           -> (out, kept), or a Decline
    backward(info, in_dims, needs, inputs, kept, grad)      -> one gradient an argument, (M, *s) or None

`args` are positional as in `signature`; `kept` is a tuple of tensors (or None) for backward; `out` is one stacked
tensor or a tuple of them. The gradient of a shared argument is returned per member too; who shares it sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from memberwise._torch.dispatch import (
    applier,
    composites_must_stand_aside,
    mode_depth,
    pop_mode,
    push_mode,
    top_mode,
)
from memberwise.engine import trace
from memberwise.engine.ambient import Region
from memberwise.engine.signals import Decline
from memberwise.engine.tensor import MemberTensor, wrap_contiguous
from memberwise.rules.registry import composites_disabled, register_composite

_ASIDE = Decline("a transform, autocast, a saved-tensor hook or a mode is active")


class _Node(torch.autograd.Function):
    """The autograd node of every composite."""

    @staticmethod
    def forward(ctx: Any, call: Composite, region: Region, *args: Any) -> Any:
        dims = [_dim(arg) for arg in args]
        out, kept = call.run(region, dims, args)
        ctx.set_materialize_grads(False)
        ctx.call, ctx.region, ctx.dims = call, region, dims
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        ctx.args = [None if isinstance(arg, torch.Tensor) else arg for arg in args]
        ctx.slots = [isinstance(arg, torch.Tensor) for arg in args]
        ctx.count = len(tensors)
        ctx.save_for_backward(*tensors, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        saved = ctx.saved_tensors
        tensors = iter(saved[: ctx.count])
        args = [next(tensors) if held else arg for arg, held in zip(ctx.args, ctx.slots, strict=True)]
        needs = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            return None, None, *_recomputed(ctx.call, args, needs, grads)
        return None, None, *ctx.call.run_backward(ctx.region, ctx.dims, needs, args, saved[ctx.count :], grads)


_apply = applier(_Node)


def _dim(arg: Any) -> int | None:
    return 0 if isinstance(arg, MemberTensor) and arg._batched else None


def _inner(arg: Any) -> Any:
    return arg._inner if isinstance(arg, MemberTensor) else arg


def _recomputed(call: Composite, args: list[Any], needs: Any, grads: Any) -> list[Any]:
    """Gradients that can be differentiated again: the layer anew, by its single operations."""
    with composites_disabled(), torch.enable_grad():
        out = call.function(*args)
        outs = [out] if isinstance(out, torch.Tensor) else list(out)
        pairs = [(o, g) for o, g in zip(outs, grads, strict=True) if g is not None]
        wanted = [arg for arg, need in zip(args, needs, strict=True) if need]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, allow_unused=True
            )
        )
    return [next(found) if need else None for need in needs]


class Composite:
    """One layer's pair of functions, with the way in and out."""

    __slots__ = ("backward", "forward", "function", "name")

    def __init__(self, function: Callable[..., Any], rule: Any) -> None:
        self.function = function
        self.name = f"composite::{rule.__name__.lower()}"
        self.forward = rule.forward
        self.backward = rule.backward

    def __call__(self, *args: Any) -> Any:
        """The layer's result, or a Decline."""
        if composites_must_stand_aside():
            return _ASIDE
        region = _region(args)
        if region is None or (mode_depth() and region.running and top_mode() is not region):
            return _ASIDE
        if torch.is_grad_enabled() and any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args):
            for arg in args:
                if isinstance(arg, torch.Tensor) and arg.requires_grad and not isinstance(arg, MemberTensor):
                    region.watch(arg)
            try:
                return _apply(self, region, *args)
            except Declined as signal:
                return signal.decline
        try:
            return self.run(region, [_dim(arg) for arg in args], args)[0]
        except Declined as signal:
            return signal.decline

    def run(self, region: Region, dims: list[Any], args: Any) -> tuple[Any, Any]:
        """Forward on the stacked tensors; member tensors out."""
        start = trace.clock() if trace.active is not None else 0.0
        inside = region.running and top_mode() is region
        if inside:
            pop_mode()
        try:
            found = self.forward(region, dims, *map(_inner, args))
        finally:
            if inside:
                push_mode(region)
        if type(found) is Decline:
            raise Declined(found)
        if trace.active is not None:
            trace.active.note(self.name, "rule", "", trace.clock() - start)
        out, kept = found
        return _wrapped(out, region), kept

    def run_backward(self, region: Region, dims: Any, needs: Any, args: Any, kept: Any, grads: Any) -> list[Any]:
        """Backward on the stacked tensors; member tensors out."""
        start = trace.clock() if trace.active is not None else 0.0
        inside = region.running and top_mode() is region
        if inside:
            pop_mode()
        try:
            stacked = [None if grad is None else _stacked(grad, region) for grad in grads]
            found = self.backward(
                region, dims, needs, [*map(_inner, args)], kept, stacked[0] if len(stacked) == 1 else stacked
            )
        finally:
            if inside:
                push_mode(region)
        if trace.active is not None:
            trace.active.note(self.name + "_backward", "rule", "", trace.clock() - start)
        return [None if grad is None else wrap_contiguous(grad, region) for grad in found]


class Declined(Exception):
    """Carries a composite's Decline out of an autograd node."""

    def __init__(self, decline: Decline) -> None:
        self.decline = decline


def _region(args: Any) -> Region | None:
    """The region of the innermost level among the arguments; None if outer levels' are mixed in."""
    found = None
    for arg in args:
        if isinstance(arg, MemberTensor):
            if found is not None and arg._region is not found:
                return None
            found = arg._region
    return found


def _stacked(grad: torch.Tensor, region: Region) -> torch.Tensor:
    if isinstance(grad, MemberTensor):
        if grad._batched:
            return grad._inner
        grad = grad._inner
    return grad.expand(region.batch_size, *grad.shape)


def _wrapped(out: Any, region: Region) -> Any:
    if isinstance(out, torch.Tensor):
        return wrap_contiguous(out, region)
    return tuple(wrap_contiguous(entry, region) for entry in out)


def composite(*functions: Any, signature: Callable[..., tuple[Any, ...]] | None = None) -> Callable[[type], type]:
    """Make a class with `forward` and `backward` the composite rule of torch functions.

    `signature` turns a call's arguments into the positional ones of `forward`; it may answer a Decline.
    """

    def add(rule: type) -> type:
        for function in functions:
            call = Composite(_from_positional(function, rule), rule)
            register_composite(function)(call if signature is None else _arranged(call, signature))
        return rule

    return add


def _from_positional(function: Any, rule: Any) -> Callable[..., Any]:
    """How to call the torch function with the composite's positional arguments."""
    return getattr(rule, "plain", function)


def _arranged(call: Composite, signature: Callable[..., Any]) -> Callable[..., Any]:
    def rule(*args: Any, **kwargs: Any) -> Any:
        arranged = signature(*args, **kwargs)
        return arranged if type(arranged) is Decline else call(*arranged)

    return rule
