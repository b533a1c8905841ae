"""Composite rules: a whole layer as one autograd node, that unwraps once in forward and once in backward.

They are for speed alone: without them the layer's ATen operations go down the ladder one by one, with the same
result. A composite is a class with two static methods on stacked tensors, below autograd:

    forward(info, in_dims, *args)                           -> (out, kept), or a Decline
    backward(info, in_dims, needs, inputs, kept, grad)      -> one gradient an argument, (M, *s) or None

A class may also set `saves`, the places of the arguments that backward needs (all, unless it says so; the others
arrive as None), or a function of `needs` that answers them, and `again(needs, inputs, kept, *grads)`: its backward in
differentiable torch functions on member tensors, for double backward. Without `again` the layer is then run again by
single operations; an argument that was written since is an error there, and there alone.
`below(info, in_dims, *args)`, if there is one, is the layer in functions that torch differentiates itself, on stacked
tensors; it serves where the graph lies in them (see `memberwise.engine.lowering`), and it may answer a Decline.
A class that sets `only_below` serves there alone.
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
from memberwise._torch.versions import version
from memberwise.engine import trace
from memberwise.engine.ambient import Region
from memberwise.engine.crossing import enter, leave, total
from memberwise.engine.lowering import check_no_function, unlower
from memberwise.engine.signals import Decline
from memberwise.engine.strict import blame
from memberwise.engine.tensor import MemberTensor, stacked, wrap, wrap_contiguous
from memberwise.errors import EngineError, fail
from memberwise.rules.registry import composites_disabled, register_composite

_ASIDE = Decline("a transform, autocast, a saved-tensor hook or a mode is active")
_FOREIGN = Decline("a tensor that needs a gradient and was not taken into the call, yet")
_ABOVE = Decline("torch's own node serves where the graph lies in the member tensors")
_UNSEEN = Decline("no member tensor, or members of several levels, among its arguments")


class _Node(torch.autograd.Function):
    """The autograd node of every composite. Its tensors are member tensors or, where those are lowered, plain ones."""

    @staticmethod
    def forward(ctx: Any, call: Composite, region: Region, dims: Any, values: Any, below: Any, *args: Any) -> Any:
        found = call.compute(region, dims, values)
        if type(found) is Decline:
            raise Declined(found)
        out, kept = found
        ctx.set_materialize_grads(False)
        rest = [None if isinstance(arg, torch.Tensor) else arg for arg in args]
        wanted = call.saved_places(len(args), ctx.needs_input_grad[5:])
        places = [place for place in wanted if isinstance(args[place], torch.Tensor)]
        if call.again is None and len(places) < len(args):
            tensors = {place: arg for place, arg in enumerate(args) if isinstance(arg, torch.Tensor)}
            ctx.unsaved = [(place, tensors[place], version(tensors[place])) for place in tensors.keys() - {*places}]
        ctx.state = call, region, dims, below, places, rest
        if places:
            ctx.save_for_backward(*[args[place] for place in places], *kept)
        elif kept:
            ctx.save_for_backward(*kept)
        return _no_views(out, region) if below[-1] else call.wrapped(out, region)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        call, region, dims, below, places, args = ctx.state
        if grads[0] is None and all(grad is None for grad in grads):  # a Function above may have none to give
            return *_NONE, *(None for _ in args)
        if below[-1] and region.running:
            unlower(region, "a backward pass inside the call reaches it")
        kept = ctx.saved_tensors
        if places:
            args, saved, kept = args.copy(), kept, kept[len(places) :]
            for place, tensor in zip(places, saved, strict=False):
                args[place] = tensor
        needs = ctx.needs_input_grad[5:]
        if not torch.is_grad_enabled():
            return *_NONE, *call.run_backward(region, dims, below, needs, args, kept, grads)
        if call.again is None:
            args = _with_unsaved(call, args, getattr(ctx, "unsaved", ()))
        return *_NONE, *call.run_again(region, dims, below, needs, args, kept, grads)


_NONE = (None,) * 5


def _no_views(out: Any, region: Region) -> Any:
    """Results that are no views to autograd, as alone: of a view that a Function made, other writes are an error."""
    if type(out) is tuple:
        return tuple([_no_views(entry, region) for entry in out])
    return _outside(region, torch.ops.aten._unsafe_view.default, out, out.shape) if out._is_view() else out


def _with_unsaved(call: Composite, args: list[Any], unsaved: Any) -> list[Any]:
    """All arguments, those too that backward itself has not kept."""
    args = args.copy()
    for place, tensor, count in unsaved:
        if version(tensor) != count:
            what = f"{call.name}: argument {place} has been modified by an inplace operation since the forward pass"
            fail(EngineError, "MW210", what, do="Clone it before you write, or take no second derivative")
        args[place] = tensor
    return args


shorten_backward(_Node)
_apply = applier(_Node)


class Composite:
    """One layer's pair of functions, with the way in and out."""

    __slots__ = (
        "again",
        "backward",
        "below",
        "forward",
        "function",
        "name",
        "only_below",
        "saves",
        "signature",
        "wrap",
    )

    def __init__(self, function: Callable[..., Any], rule: Any, signature: Callable[..., Any] | None) -> None:
        self.function = getattr(rule, "plain", function)
        self.name = f"composite::{rule.__name__.lower()}"
        self.forward = rule.forward
        self.backward = rule.backward
        self.below: Callable[..., Any] | None = getattr(rule, "below", None)
        self.signature = signature
        self.saves: Any = getattr(rule, "saves", None)
        self.wrap = wrap if getattr(rule, "lies_as_alone", False) else wrap_contiguous
        self.only_below: bool = getattr(rule, "only_below", False)
        self.again: Callable[..., Any] | None = getattr(rule, "again", None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's result, or a Decline."""
        if composites_must_stand_aside():
            return _ASIDE
        if self.signature is not None:
            args = self.signature(*args, **kwargs)
            if type(args) is Decline:
                return args
        tracks = torch.is_grad_enabled()
        region: Region | None = None
        raised = False
        lowered: list[MemberTensor] = []
        dims: list[Any] = []
        values: list[Any] = []
        for arg in args:
            if isinstance(arg, MemberTensor):
                if arg._region is not region:
                    if region is not None:
                        return _UNSEEN
                    region = arg._region
                dims.append(0 if arg._batched else None)
                values.append(arg._inner)
                if arg._lowered:
                    lowered.append(arg)
                elif tracks and arg.requires_grad:
                    raised = True
            else:
                if tracks and isinstance(arg, torch.Tensor) and arg.requires_grad:
                    return _FOREIGN
                dims.append(None)
                values.append(arg)
        if region is None:
            return _UNSEEN
        if region.running and mode_depth() != region.depth + 1:
            return _ASIDE
        if lowered and not tracks:
            check_no_function(region)
        if raised and self.only_below:
            return _ABOVE
        if not tracks or not (lowered or raised):
            found = self.compute(region, dims, values)
            return found if type(found) is Decline else self.wrapped(found[0], region)
        if lowered and not raised and self.below is not None and trace.active is None:  # which looks at nodes
            out = self.compute(region, dims, values, self.below)
            if type(out) is not Decline:
                return self.wrapped(out, region, lowered)
        try:
            return self.apply(region, dims, values, args, lowered, raised)
        except Declined as signal:
            return signal.decline

    def apply(
        self, region: Region, dims: Any, values: Any, args: Any, lowered: list[MemberTensor], raised: bool
    ) -> Any:
        """As a node. Where no argument is raised it lies below, and so does the graph of what it returns."""
        below = [isinstance(arg, MemberTensor) and arg._lowered for arg in args]
        given = [value if low else arg for arg, value, low in zip(args, values, below, strict=True)]
        out = _apply(self, region, dims, values, (*below, not raised), *given)
        if not raised:
            return self.wrapped(out, region, lowered)
        for member in lowered:
            member._bypassed = True
        return out

    def saved_places(self, count: int, needs: Any) -> Iterable[int]:
        """Which arguments backward needs."""
        saves = self.saves
        return range(count) if saves is None else saves if type(saves) is tuple else saves(needs)

    def compute(self, region: Region, dims: list[Any], values: Any, formula: Any = None) -> Any:
        """Forward on the stacked tensors, or another formula for it."""
        record = trace.active
        start = trace.clock() if record is not None else 0.0
        try:
            found = _outside(region, formula or self.forward, region, dims, *values)
        except Exception as error:
            blame(error, self.name, self.function, region.batch_size, values, dims, {})
            raise
        if record is not None and type(found) is not Decline:
            record.note(self.name, "rule", "", trace.clock() - start)
        return found

    def wrapped(self, out: Any, region: Region, lowered: Iterable[MemberTensor] = ()) -> Any:
        """Results as member tensors; from `lowered` arguments they have their graph below, as those do."""
        for member in lowered:
            member._bypassed = True
        if not isinstance(out, torch.Tensor):
            return tuple([self.wrapped(entry, region, lowered) for entry in out])
        result = self.wrap(out, region)
        if lowered and out.requires_grad:
            result._lowered = True
        return result

    def run_backward(
        self, region: Region, dims: Any, below: Any, needs: Any, args: Any, kept: Any, grads: Any
    ) -> list[Any]:
        """Backward on the stacked tensors; each gradient as its argument is, below or above."""
        record = trace.active
        start = trace.clock() if record is not None else 0.0
        if not below[-1]:
            grads = [None if grad is None else stacked(grad, region) for grad in grads]
        own = [arg._inner if isinstance(arg, MemberTensor) else arg for arg in args]
        grad = grads[0] if len(grads) == 1 else grads
        try:
            found = _outside(region, self.backward, region, dims, needs, own, kept, grad)
        except Exception as error:
            blame(error, self.name + "_backward", None, region.batch_size, own, dims, {})
            raise
        if record is not None:
            record.note(self.name + "_backward", "rule", "", trace.clock() - start)
        return [
            None if grad is None else self.wrap(grad, region) if not low else grad if dim == 0 else grad.sum(0)
            for grad, low, dim in zip(found, below, dims, strict=False)
        ]

    def run_again(self, region: Region, dims: Any, below: Any, needs: Any, args: Any, kept: Any, grads: Any) -> Any:
        """Gradients that can be differentiated again: the layer anew, by its single operations."""
        if below[-1]:
            grads = [None if grad is None else enter([grad], [True], region)[0] for grad in grads]
        args = [
            enter([arg], [dim == 0], region)[0] if low and isinstance(arg, torch.Tensor) else arg
            for arg, low, dim in zip(args, below, dims, strict=False)
        ]
        found = self._found_again(region, needs, args, kept, grads)
        return [
            grad if grad is None or not low else leave(grad, region) if dim == 0 else total(grad, region)
            for grad, low, dim in zip(found, below, dims, strict=False)
        ]

    def _found_again(self, region: Region, needs: Any, args: Any, kept: Any, grads: Any) -> Any:
        if self.again is not None:
            return self.again(needs, args, [_kept_again(value, region) for value in kept], *grads)
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


def _kept_again(value: torch.Tensor, region: Region) -> Any:
    """What was kept, as a member tensor; a result that was kept has its graph, as alone."""
    return enter([value], [True], region)[0] if value.requires_grad else wrap(value, region)


def _outside(region: Region, function: Any, *args: Any) -> Any:
    """Call a rule on plain stacked tensors, the region's mode off if it is on."""
    if top_mode() is not region:
        return function(*args)
    pop_mode()
    try:
        return function(*args)
    finally:
        push_mode(region)


def without_kept(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A `below` for a class whose `forward` is made of functions that torch differentiates."""

    def below(info: Any, in_dims: Any, *args: Any) -> Any:
        found = forward(info, in_dims, *args)
        return found if type(found) is Decline else found[0]

    return below


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
