"""Composite rules: a whole layer as one autograd node, that unwraps once in forward and once in backward.

They are for speed alone: without them the layer's ATen operations go down the ladder one by one, with the same
result. A composite is a class with two static methods on stacked tensors, below autograd:

    forward(info, in_dims, *args)                           -> (out, kept), or a Decline
    backward(info, in_dims, needs, inputs, kept, grad)      -> one gradient an argument, (M, *s) or None

A class may also set `saves`, the places of the arguments that backward needs (all, unless it says so; the others
arrive as None), or a function of `needs` that answers them, and then gives `again(needs, inputs, kept, *grads)`: its
backward in differentiable torch functions on member tensors, for double backward. Without `saves` the layer is run
again by single operations.
`plain` is what is run then, if it is not the torch function itself. Results are taken to be contiguous alone; a
class whose lone results are not sets `lies_as_alone`, and returns them, and gradients, in the lone order a member.

`args` are positional as in `signature`; `kept` is a tuple of tensors (or None) for backward; `out` is one stacked
tensor or a tuple of them. The gradient of a shared argument is returned per member too; who shares it sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from memberwise._torch.dispatch import (
    applier,
    composites_must_stand_aside,
    mode_depth,
    pop_mode,
    push_mode,
    shorten_backward,
    top_mode,
)
from memberwise.engine import trace
from memberwise.engine.ambient import Region
from memberwise.engine.signals import Decline
from memberwise.engine.tensor import MemberTensor, stacked, wrap, wrap_contiguous
from memberwise.rules.registry import composites_disabled, register_composite

_ASIDE = Decline("a transform, autocast, a saved-tensor hook or a mode is active")
_UNSEEN = Decline("no member tensor, or members of several levels, among its arguments")


class _Node(torch.autograd.Function):
    """The autograd node of every composite."""

    @staticmethod
    def forward(ctx: Any, call: Composite, region: Region, dims: Any, values: Any, *args: Any) -> Any:
        out, kept = call.run(region, dims, values)
        ctx.set_materialize_grads(False)
        rest = [None if isinstance(arg, torch.Tensor) else arg for arg in args]
        wanted = call.saved_places(len(args), ctx.needs_input_grad[4:])
        places = [place for place in wanted if isinstance(args[place], torch.Tensor)]
        ctx.state = call, region, dims, places, rest
        if places:
            ctx.save_for_backward(*[args[place] for place in places], *kept)
        elif kept:
            ctx.save_for_backward(*kept)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        call, region, dims, places, args = ctx.state
        kept = ctx.saved_tensors
        if places:
            args, saved, kept = args.copy(), kept, kept[len(places) :]
            for place, tensor in zip(places, saved, strict=False):
                args[place] = tensor
        needs = ctx.needs_input_grad[4:]
        run = call.run_again if torch.is_grad_enabled() else call.run_backward
        return None, None, None, None, *run(region, dims, needs, args, kept, grads)


shorten_backward(_Node)
_apply = applier(_Node)


class Composite:
    """One layer's pair of functions, with the way in and out."""

    __slots__ = ("again", "backward", "forward", "function", "name", "saves", "signature", "wrap")

    def __init__(self, function: Callable[..., Any], rule: Any, signature: Callable[..., Any] | None) -> None:
        self.function = getattr(rule, "plain", function)
        self.name = f"composite::{rule.__name__.lower()}"
        self.forward = rule.forward
        self.backward = rule.backward
        self.signature = signature
        self.saves: Any = getattr(rule, "saves", None)
        self.wrap = wrap if getattr(rule, "lies_as_alone", False) else wrap_contiguous
        self.again: Callable[..., Any] | None = getattr(rule, "again", None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's result, or a Decline."""
        if composites_must_stand_aside():
            return _ASIDE
        if self.signature is not None:
            args = self.signature(*args, **kwargs)
            if type(args) is Decline:
                return args
        region: Region | None = None
        tracked = False
        dims: list[Any] = []
        values: list[Any] = []
        for arg in args:
            if isinstance(arg, MemberTensor):
                if region is None:
                    region = arg._region
                elif region is not arg._region:
                    return _UNSEEN
                dims.append(0 if arg._batched else None)
                values.append(arg._inner)
                tracked = tracked or arg.requires_grad
            else:
                dims.append(None)
                values.append(arg)
        if region is None:
            return _UNSEEN
        if region.running and mode_depth() != region.depth + 1:
            return _ASIDE
        try:
            if tracked and torch.is_grad_enabled():
                return _apply(self, region, dims, values, *args)
            return self.run(region, dims, values)[0]
        except Declined as signal:
            return signal.decline

    def saved_places(self, count: int, needs: Any) -> Iterable[int]:
        """Which arguments backward needs."""
        saves = self.saves
        return range(count) if saves is None else saves if type(saves) is tuple else saves(needs)

    def run(self, region: Region, dims: list[Any], values: Any) -> tuple[Any, Any]:
        """Forward on the stacked tensors; member tensors out."""
        record = trace.active
        start = trace.clock() if record is not None else 0.0
        found = _outside(region, self.forward, region, dims, *values)
        if type(found) is Decline:
            raise Declined(found)
        if record is not None:
            record.note(self.name, "rule", "", trace.clock() - start)
        out, kept = found
        if isinstance(out, torch.Tensor):
            return self.wrap(out, region), kept
        return tuple([self.wrap(entry, region) for entry in out]), kept

    def run_backward(self, region: Region, dims: Any, needs: Any, args: Any, kept: Any, grads: Any) -> list[Any]:
        """Backward on the stacked tensors; member tensors out."""
        record = trace.active
        start = trace.clock() if record is not None else 0.0
        if len(grads) == 1:
            grad: Any = None if grads[0] is None else stacked(grads[0], region)
        else:
            grad = [None if grad is None else stacked(grad, region) for grad in grads]
        own = [arg._inner if isinstance(arg, MemberTensor) else arg for arg in args]
        found = _outside(region, self.backward, region, dims, needs, own, kept, grad)
        if record is not None:
            record.note(self.name + "_backward", "rule", "", trace.clock() - start)
        return [None if grad is None else self.wrap(grad, region) for grad in found]

    def run_again(self, region: Region, dims: Any, needs: Any, args: Any, kept: Any, grads: Any) -> Any:
        """Gradients that can be differentiated again: the layer anew, by its single operations."""
        if self.again is not None:
            return self.again(needs, args, [wrap(value, region) for value in kept], *grads)
        with composites_disabled(), torch.enable_grad():
            # own nodes: where one argument was computed from another, its gradient must not flow on into that one here
            args = [torch.ops.aten.alias(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
            out = self.function(*args)
            outs = [out] if isinstance(out, torch.Tensor) else list(out)
            pairs = [(value, grad) for value, grad in zip(outs, grads, strict=True) if grad is not None]
            wanted = [arg for arg, need in zip(args, needs, strict=True) if need]
            ends, starts = [value for value, _ in pairs], [grad for _, grad in pairs]
            found = iter(torch.autograd.grad(ends, wanted, starts, create_graph=True, allow_unused=True))
        return [next(found) if need else None for need in needs]


def _outside(region: Region, function: Callable[..., Any], *args: Any) -> Any:
    """Call a rule on plain stacked tensors, the region's mode off if it is on."""
    if top_mode() is not region:
        return function(*args)
    pop_mode()
    try:
        return function(*args)
    finally:
        push_mode(region)


class Declined(Exception):
    """Carries a composite's Decline out of an autograd node."""

    def __init__(self, decline: Decline) -> None:
        self.decline = decline


def composite(*functions: Any, signature: Callable[..., tuple[Any, ...]] | None = None) -> Callable[[type], type]:
    """Make a class with `forward` and `backward` the composite rule of torch functions.

    `signature` turns a call's arguments into the positional ones of `forward`; it may answer a Decline.
    """

    def add(rule: type) -> type:
        for function in functions:
            register_composite(function)(Composite(function, rule, signature))
        return rule

    return add
