"""Autograd below: between layers, the graph of a call lies in the stacked tensors, where it needs no node of ours.

A *lowered* member tensor has its graph in `_inner`, and none of its own. A call's parameters come in lowered; a layer
with a composite rule takes them so, and what it returns is lowered, too; what leaves the call is `_inner`. A step of
layers alone then has no node at its borders, and its gradients are plain.

Any other operation raises its arguments first, in place: from there on autograd follows the member tensor. What asks
for a member tensor's place in the graph (a hook, `autograd.grad`), after a layer has taken it lowered, asks for what
is not there: then the call is undone and run with all tensors raised, and it is remembered for the function. So is
any operation that reaches a lowered tensor on another way than through `__torch_function__`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from memberwise._torch.dispatch import (
    DisableTorchFunctionSubclass,
    applier,
    composites_must_stand_aside,
    forward_of_function,
    functorch_active,
    has_tangents,
    mode_depth,
    shorten_backward,
    without_dispatch,
)
from memberwise._torch.versions import set_versions, version
from memberwise.engine.crossing import Enter
from memberwise.engine.kinds import COMPUTES, LOOKS, kind_of
from memberwise.engine.layout import settle
from memberwise.engine.signals import Unlowered
from memberwise.engine.tensor import MemberTensor
from memberwise.errors import EngineError, fail
from memberwise.rules.registry import composites_enabled

if TYPE_CHECKING:
    from memberwise.engine.ambient import Region


class _Raise(Enter):
    """Member tensors that autograd followed below, and follows itself from here on."""

    @staticmethod
    def forward(ctx: Any, region: Region, batched: tuple[bool, ...], *tensors: torch.Tensor) -> Any:
        members = tensors[len(batched) :]
        ctx.region, ctx.batched = region, batched
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(*members)
        return members

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if ctx.region.running and any(
            not (node is None or hasattr(node, "variable")) for node, _ in ctx.next_functions
        ):
            unlower(ctx.region, "a backward pass inside the call goes on below it")
        return *Enter.backward(ctx, *grads), *(None for _ in grads)


shorten_backward(_Raise)
_raise = applier(_Raise)


def may_lower(region: Region) -> bool:
    """Whether a call that begins now could take its tensors in lowered."""
    return region.level == 0 and composites_enabled() and mode_depth() == 0 and not composites_must_stand_aside()


class Raised:
    """The functions that have asked for what a lowered tensor cannot give: their calls run with all tensors raised."""

    def __init__(self) -> None:
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __contains__(self, func: Callable[..., Any]) -> bool:
        return bool(self._known) and code_of(func) in self._known

    def add(self, func: Callable[..., Any]) -> None:
        self._known.add(code_of(func))


def code_of(func: Callable[..., Any]) -> Any:
    """What all functions that one line of a program makes have in common."""
    while isinstance(func, partial):
        func = func.func
    return getattr(func, "__code__", type(func))


raised = Raised()
"""Of calls without a stack; a stack has its own."""


def found_in(args: Any, kwargs: Any) -> list[MemberTensor]:
    """The member tensors among a function's arguments whose graph lies, or lay for some layer, below."""
    found: list[MemberTensor] = []
    _find(args, found)
    if kwargs:
        _find(kwargs.values(), found)
    return found


def _find(values: Any, found: list[MemberTensor]) -> None:
    for value in values:
        if isinstance(value, MemberTensor):
            if value._lowered or value._bypassed:
                found.append(value)
        elif type(value) in (list, tuple):
            _find(value, found)


def make_way(func: Any, members: list[MemberTensor]) -> None:
    """Before `func` runs on `members`: raise them, if it computes; undo the call, if it may ask for their graph."""
    kind = kind_of(func)
    if kind is LOOKS:
        return
    region = members[0]._region
    lowered = [member for member in members if member._lowered]
    if not torch.is_grad_enabled():
        if kind is COMPUTES or not lowered:
            check_no_function(region)
            return
    elif kind is COMPUTES and not (functorch_active() or has_tangents() or _is_covered(region)):
        if lowered:
            raise_(lowered)
        return
    unlower(region, f"{getattr(func, '__name__', func)} may ask for a tensor's place in the graph")


def raise_for_function(args: Any) -> None:
    """Raise the arguments of an `autograd.Function`, which makes its node by what it sees of them."""
    below = found_in(args, None)
    if below:
        with DisableTorchFunctionSubclass():
            make_way(torch.clone, below)


def _is_covered(region: Region) -> bool:
    """Whether another call, or a mode, lies over this one."""
    return region.running and mode_depth() != region.depth + 1


def raise_(members: list[MemberTensor]) -> None:
    """From here on, autograd follows `members` themselves."""
    members = [*{id(member): member for member in members}.values()]
    versions = [version(member) for member in members]  # to raise is no write
    batched = tuple([member._batched for member in members])
    _raise(members[0]._region, batched, *[member._inner for member in members], *members)
    set_versions(members, versions)
    for member in members:
        member._lowered = False


def settle_with_its_graph(member: MemberTensor) -> None:
    """Bring a lowered tensor into the declared order here, above dispatch: below, its graph would be lost."""
    with without_dispatch(), torch.inference_mode(False), torch.enable_grad():
        settle(member)


def check_no_function(region: Region) -> None:
    """With gradients off: an `autograd.Function` that was given a lowered tensor has made no node for it."""
    if forward_of_function():
        unlower(region, "an autograd.Function of torch was given it")


def unlower(region: Region, why: str) -> Any:
    """Undo the running call, to run it with all tensors raised."""
    if region.running:
        raise Unlowered(why, region)
    what = f"a member tensor was kept from a call that is over, and {why}"
    fail(EngineError, "MW208", what, do="Return it from the function, or do that inside")


def requires_grad(member: torch.Tensor) -> bool:
    """`member.requires_grad`, wherever its graph lies; with gradients off, a view of what requires a gradient does."""
    if member.requires_grad or not isinstance(member, MemberTensor):
        return member.requires_grad
    return member._lowered or (member._root is not None and member._root.requires_grad)
