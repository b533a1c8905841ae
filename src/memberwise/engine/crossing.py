"""Where autograd goes in and out of a call: plain stacked tensors to member tensors, and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from memberwise._torch.dispatch import applier, functorch_active, mode_depth, shorten_backward, top_mode
from memberwise.engine.tensor import MemberTensor, stacked, wrap, wrap_unbatched
from memberwise.errors import EngineError, fail

if TYPE_CHECKING:
    from memberwise.engine.ambient import Region


class Enter(torch.autograd.Function):
    """`(M, *s)` tensors, or shared ones, as member tensors; their gradients stacked, or summed over members."""

    @staticmethod
    def forward(ctx: Any, region: Region, batched: tuple[bool, ...], *tensors: torch.Tensor) -> Any:
        ctx.region, ctx.batched = region, batched
        ctx.set_materialize_grads(False)
        return tuple([_inside(t, held, region) for t, held in zip(tensors, batched, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        region = ctx.region
        if region.running or (mode_depth() and top_mode() is region):
            region.note_backward(_leaves(ctx))
        pairs = zip(grads, ctx.batched, strict=True)
        return (
            None,
            None,
            *[None if grad is None else leave(grad, region) if held else total(grad, region) for grad, held in pairs],
        )


def _leaves(node: Any) -> Iterator[torch.Tensor]:
    """The tensors in which a backward pass that reaches `node` ends."""
    seen, waiting = set(), [node]
    while waiting:
        for below, _ in waiting.pop().next_functions:
            if hasattr(below, "variable"):
                yield below.variable
            elif below is not None and below not in seen:
                seen.add(below)
                waiting.append(below)


class _EnterTransforms(Enter):
    """The same inside a transform of functorch, which asks for another form of Function."""

    @staticmethod
    def forward(region: Region, batched: tuple[bool, ...], *tensors: torch.Tensor) -> Any:  # type: ignore[override] # so
        return tuple(_inside(t, held, region) for t, held in zip(tensors, batched, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.region, ctx.batched = inputs[0], inputs[1]
        ctx.set_materialize_grads(False)
        fixed = [member for member, tensor in zip(output, inputs[2:], strict=True) if not tensor.requires_grad]
        if fixed:  # buffers come along, which must not require a gradient
            ctx.mark_non_differentiable(*fixed)

    @staticmethod
    def vmap(info: Any, in_dims: Any, region: Region, batched: Any, *tensors: torch.Tensor) -> Any:
        moved = [
            t if dim is None else t.movedim(dim, 1 if held else 0)
            for t, dim, held in zip(tensors, in_dims[2:], batched, strict=True)
        ]
        out_dims = tuple(None if dim is None else 0 for dim in in_dims[2:])
        return _EnterTransforms.apply(region, batched, *moved), out_dims


class Exit(torch.autograd.Function):
    """A member tensor as the plain `(M, *s)` tensor it holds."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, region: Region) -> torch.Tensor:
        ctx.region = region
        ctx.set_materialize_grads(False)
        # never the inner tensor itself: a rule may have kept it for backward, and would keep the node that it gets here
        return stacked(value, region).detach()

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return (None if grad is None else enter([grad], [True], ctx.region)[0]), None


class _ExitTransforms(Exit):
    """The same inside a transform of functorch."""

    @staticmethod
    def forward(value: torch.Tensor, region: Region) -> torch.Tensor:  # type: ignore[override] # see _EnterTransforms
        return stacked(value, region).detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.region = inputs[1]
        ctx.set_materialize_grads(False)

    @staticmethod
    def vmap(info: Any, in_dims: Any, value: torch.Tensor, region: Region) -> Any:
        return _ExitTransforms.apply(value, region), None if in_dims[0] is None else in_dims[0] + 1


shorten_backward(Enter)
shorten_backward(Exit)
_enter = applier(Enter)
_exit = applier(Exit)


def _inside(tensor: torch.Tensor, batched: bool, region: Region) -> MemberTensor:
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    if not batched:
        return wrap_unbatched(tensor, region, outside=True)
    if tensor.layout is not torch.strided:
        what = f"an input with a member axis has layout {tensor.layout}; only strided tensors can be stacked"
        fail(EngineError, "MW204", what, do="Pass it dense, or share it (in_dims=None)")
    member = wrap(tensor, region, tensor.storage_offset() or None)
    member._outside = True
    return member


def _lowered(tensor: torch.Tensor, batched: bool, region: Region) -> MemberTensor:
    if not tensor.requires_grad:
        return _inside(tensor, batched, region)
    if batched and not (tensor.is_conj() or tensor.is_neg()):  # a parameter, as good as always
        member = wrap(tensor, region, tensor.storage_offset() or None)
        member._outside = True
    else:
        member = _inside(tensor, batched, region)
    member._lowered = True
    return member


def enter(
    tensors: list[torch.Tensor], batched: list[bool], region: Region, *, lowered: bool = False
) -> list[torch.Tensor]:
    """Member tensors for plain ones; `batched[k]` says whether `tensors[k]` has the member axis, at 0.

    `lowered`: what needs a gradient keeps its graph below, see `memberwise.engine.lowering`.
    """
    if lowered and all([t.layout is torch.strided for t in tensors]):
        return [_lowered(t, held, region) for t, held in zip(tensors, batched, strict=True)]
    if functorch_active():
        return list(_EnterTransforms.apply(region, tuple(batched), *tensors))  # type: ignore[arg-type] # a tuple of tensors
    tracked = [k for k, t in enumerate(tensors) if t.requires_grad and (batched[k] or t.layout is torch.strided)]
    if tracked and not torch.is_grad_enabled():
        with torch.enable_grad():  # alone a parameter requires a gradient where gradients are off, too
            return enter(tensors, batched, region)
    if len(tracked) == len(tensors) and tensors:
        return list(_enter(region, tuple(batched), *tensors))
    pairs = zip(tensors, batched, strict=True)
    out: list[Any] = [t if t.requires_grad else _inside(t, held, region) for t, held in pairs]
    if tracked:
        entered = _enter(region, tuple(batched[k] for k in tracked), *(tensors[k] for k in tracked))
        for k, member in zip(tracked, entered, strict=True):
            out[k] = member
    return out


def leave(value: torch.Tensor, region: Region) -> torch.Tensor:
    """The plain `(M, *s)` tensor of a member tensor, or of a tensor that is equal in all members."""
    if functorch_active():
        return _ExitTransforms.apply(value, region)  # type: ignore[return-value] # one tensor
    if getattr(value, "_lowered", False):
        found = stacked(value, region)
        return found if torch.is_grad_enabled() and not value._outside else torch.ops.aten.alias(found)  # type: ignore[attr-defined] # a member tensor
    if torch.is_grad_enabled() and value.requires_grad:
        return _exit(value, region)
    out = stacked(value, region)
    return torch.ops.aten.alias(out) if getattr(value, "_outside", True) else out


def total(grad: torch.Tensor, region: Region | None = None) -> torch.Tensor:
    """The sum over members of a gradient: what a shared tensor receives."""
    if region is None:
        region = grad._region  # type: ignore[attr-defined] # the hook that calls so has a member tensor
    return leave(grad, region).sum(0)
