"""What a call writes to tensors from outside, and gives out of them, is told to autograd outside.

A member tensor has the memory of the tensor it stands for, and a graph of its own. So a write to it, with a gradient
(`state.copy_(new)`), changes the values outside and not the graph there; and a view of an input that leaves the call
is no view to autograd outside, so that a later write to one would not be known of the other. Gradients would be wrong
without a word.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from memberwise._torch.dispatch import DisableTorchFunctionSubclass, applier, functorch_active
from memberwise._torch.versions import set_versions, version
from memberwise.engine.crossing import Enter, enter, leave
from memberwise.engine.signals import part_ways
from memberwise.engine.tensor import MemberTensor
from memberwise.errors import EngineError, fail

if TYPE_CHECKING:
    from memberwise.engine.ambient import Region


class _Written(torch.autograd.Function):
    """A tensor from outside, after the call has written it: its graph is that of the member tensor."""

    @staticmethod
    def forward(ctx: Any, outside: torch.Tensor, member: MemberTensor) -> torch.Tensor:
        ctx.region, ctx.batched = member._region, member._batched
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(outside)
        return outside

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        if grad is None:
            return None, None
        if not ctx.batched:  # written once, for all members: the first one's gradient, or it would count M times
            rest = ctx.region.batch_size - 1
            grad = torch.cat([grad.unsqueeze(0), grad.new_zeros(rest, *grad.shape)])
        return None, enter([grad], [True], ctx.region)[0]


_written = applier(_Written)


def hand_over(region: Region) -> None:
    """At the end of a call: what it has written with a gradient has that gradient outside, too."""
    with DisableTorchFunctionSubclass():
        members = {id(one): one for one in map(_base, region.written)}.values()
        region.written = [one for one in members if one.requires_grad and not _is_as_entered(one)]
        for member in region.written:
            if functorch_active() or member._root is not None:
                part_ways(region, "a tensor from outside was written with a gradient")
            outside = member._inner
            if outside.is_leaf and outside.requires_grad:
                what = "a leaf Variable that requires grad is being used in an in-place operation"
                shape = f"the tensor of shape {tuple(member.shape)} (of one member)"
                fail(EngineError, "MW212", f"{what}: {shape}", do="Write under torch.no_grad(), or to a copy")
            count = version(outside)
            _written(outside, member)
            set_versions([outside], [count])  # the write itself was counted when it was made


def _base(member: MemberTensor) -> MemberTensor:
    base = member._base
    return member if base is None else base  # type: ignore[return-value] # views of member tensors are such


def _is_as_entered(member: MemberTensor) -> bool:
    return issubclass(getattr(member.grad_fn, "_forward_cls", object), Enter)


def from_outside(member: MemberTensor) -> torch.Tensor | None:
    """What stands outside for a tensor that came from there, itself or a view of it; None where there is no such thing.

    A view that has a graph is a copy, as the members' results put together are: a node of ours cannot lie in a view
    that may be written, and torch's own would not have the member's hooks.
    """
    if not member._outside or functorch_active():
        return None
    if not member._batched:
        return None if member.requires_grad else _of_all(member)
    if member._root is None and _has_the_graph_outside(member):
        return member._inner
    if member.requires_grad:
        return leave(member, member._region).clone()
    return _seen(member)


def _of_all(member: MemberTensor) -> torch.Tensor | None:
    """A view of what all members share, for each of them."""
    seen = None if member._root is None else _seen(member)
    return None if seen is None else seen.expand(member._region.batch_size, *seen.shape)


def _seen(member: MemberTensor) -> torch.Tensor | None:
    if member._root is None or isinstance(member._root, MemberTensor) or not _shows(member._root, member._inner):
        return None  # the outer call finds it, when it leaves that
    return _view(member._root.detach() if member._root.requires_grad else member._root, member._inner)


def _has_the_graph_outside(member: MemberTensor) -> bool:
    if member._lowered or not member.requires_grad:
        return member._lowered or not member._inner.requires_grad
    if member._backward_hooks or member.retains_grad:
        return False
    return _is_as_entered(member) or any(one is member for one in member._region.written)


def _shows(outside: torch.Tensor, seen: torch.Tensor) -> bool:
    """Whether `seen` has the memory of `outside`, and numbers of the same kind."""
    of_one_kind = seen.dtype == outside.dtype or (
        seen.is_complex() != outside.is_complex() and seen.dtype.to_complex() == outside.dtype.to_complex()
    )
    return of_one_kind and outside.untyped_storage()._cdata == seen.untyped_storage()._cdata


def _view(outside: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """`seen` as a view of `outside`."""
    size, stride, start = seen.shape, seen.stride(), seen.storage_offset()
    if seen.is_complex() and not outside.is_complex():
        pairs = outside.as_strided((*size, 2), (*(2 * step for step in stride), 1), 2 * start)
        return torch.view_as_complex(pairs)
    if outside.is_complex() and not seen.is_complex():
        outside = torch.view_as_real(outside)
    return outside.as_strided(size, stride, start)
