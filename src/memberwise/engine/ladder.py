"""The rungs below the unwrapping: a rule, torch's batching of one op, the op member by member; and agreement."""

from __future__ import annotations

from typing import Any

import torch

from memberwise._torch.functorch import Unbatchable, batch, restored_keys
from memberwise.engine import draws, trace
from memberwise.engine.ambient import Region
from memberwise.engine.layout import relaid
from memberwise.engine.operation import Operation, has_mask
from memberwise.engine.signals import Decline, part_ways
from memberwise.engine.slices import lone_strides, member_slice, stack_results
from memberwise.engine.strict import blame
from memberwise.errors import EngineError, fail


def descend(op: Operation, region: Region, values: Any, dims: Any, kwargs: Any) -> tuple[Any, Any, str]:
    """`(out, out_dims, path)` of one operation with at least one stacked argument, or drawn apart."""
    record = trace.active
    start = trace.clock() if record is not None else 0.0
    path, reason, apart = "rule", "", False
    found = None
    if op.rule is not None:
        try:
            found = op.rule(region, dims, *values, **kwargs)
        except Exception as error:
            blame(error, op.name, op.func, region.batch_size, values, dims, kwargs)
            raise
        if type(found) is Decline:
            reason, apart, found = found.reason, found.by_member, None
    if found is None and op.is_random and draws.draws(op, values, kwargs):
        found = draws.draw(op, region, values, dims, kwargs)
        path = "rule"
    if found is None:
        found, path, reason = _without_rule(op, region, values, dims, kwargs, reason, apart)
    if record is not None:
        record.note(op.name, path, reason, trace.clock() - start)
    return *found, path


def _without_rule(
    op: Operation, region: Region, values: Any, dims: Any, kwargs: Any, reason: str, apart: bool
) -> tuple[Any, str, str]:
    if torch.Tag.dynamic_output_shape in op.func.tags and not _is_by_numbers(op, values, dims):
        reason, apart = "the shape of its result depends on values", True
    if not apart:
        try:
            out = batch(op.func, dims, values, kwargs, region.batch_size, region.randomness)
            if not op.is_view and not op.returned:
                out = _as_alone(op, out, values, dims, kwargs)
            return (out, 0), "vmap", reason
        except Unbatchable:
            reason = reason or "torch has no batching rule for it"
            found = _in_new_memory(op, region, values, dims, kwargs)
            if found is not None:
                return *found, reason
            what = f"{op.name} ran member by member: {reason}"
            trace.warn_slow("MW206", what, "Register a rule for it with memberwise.register_rule")
    return by_member(op, region, values, dims, kwargs), "loop", reason


def _is_by_numbers(op: Operation, values: Any, dims: Any) -> bool:
    """Whether this is an indexing whose result has one shape in all members: by no mask of a member's own."""
    if op.func is not torch.ops.aten.index.Tensor:
        return False
    own = dims[1] if isinstance(dims[1], list) else [dims[1]] * len(values[1])
    return not has_mask(index for index, dim in zip(values[1], own, strict=True) if dim == 0)


def _in_new_memory(op: Operation, region: Region, values: Any, dims: Any, kwargs: Any) -> Any:
    """`(out, out_dims, path)` of what writes its first argument: by the same operation out of place, and a copy."""
    twin = op.twin
    if twin is None or dims[0] is None:
        return None
    found = twin.rule(region, dims, *values, **kwargs) if twin.rule is not None else None
    path = "rule"
    if found is None or type(found) is Decline:
        try:
            found, path = (batch(twin.func, dims, values, kwargs, region.batch_size, region.randomness), 0), "vmap"
        except Unbatchable:
            return None
    target, (out, _) = values[0], found
    if (out.shape, out.dtype) != (target.shape, target.dtype):
        return None
    return (target.copy_(out), 0), path


def _as_alone(op: Operation, out: Any, values: Any, dims: Any, kwargs: Any) -> Any:
    """torch's batching may leave a member's part in another memory order than the lone result's."""
    if op.name not in _TURNED and _is_contiguous(out) and all(_is_contiguous(value) for value in values):
        return out
    key = (op.func, _geometry(values, dims), tuple(kwargs), _geometry(list(kwargs.values()), [None] * len(kwargs)))
    try:
        known = _STRIDES.get(key, _STRIDES)
    except TypeError:  # an argument that has no hash
        return _relaid(out, lone_strides(op.func, values, dims, kwargs))
    if known is _STRIDES:
        if len(_STRIDES) > _MOST_STRIDES:
            _STRIDES.clear()
        known = _STRIDES[key] = lone_strides(op.func, values, dims, kwargs)
    return _relaid(out, known)


_TURNED = frozenset(("aten::geqrf",))
"""Of contiguous arguments the lone result lies column by column, and the batched one does not."""
_STRIDES: dict[Any, Any] = {}
"""What `lone_strides` found."""
_MOST_STRIDES = 10_000


def _geometry(values: Any, dims: Any) -> Any:
    return tuple(
        (value.shape, value.stride(), value.dtype, value.device, dim)
        if isinstance(value, torch.Tensor)
        else _geometry(value, dim if isinstance(dim, list) else [dim] * len(value))
        if isinstance(value, list | tuple)
        else value
        for value, dim in zip(values, dims, strict=True)
    )


def _is_contiguous(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_contiguous, value))
    return not isinstance(value, torch.Tensor) or value.is_contiguous()


def _relaid(out: Any, strides: Any) -> Any:
    if isinstance(out, list | tuple):
        known = strides if isinstance(strides, list) else [None] * len(out)
        return type(out)(_relaid(entry, own) for entry, own in zip(out, known, strict=True))
    if not isinstance(out, torch.Tensor):
        return out
    return out.contiguous() if strides is None else relaid(out, tuple(strides))


def by_member(op: Operation, region: Region, values: Any, dims: Any, kwargs: Any) -> tuple[Any, Any]:
    """Run one operation on each member's slices; results stacked."""
    with restored_keys():
        outs = _for_each_member(op, region, values, dims, kwargs)
    return stack_results(outs, op, region), 0


def _for_each_member(op: Operation, region: Region, values: Any, dims: Any, kwargs: Any) -> list[Any]:
    return [
        op.func(*(member_slice(value, dim, i) for value, dim in zip(values, dims, strict=True)), **kwargs)
        for i in range(region.batch_size)
    ]


def shared(op: Operation, values: Any, kwargs: Any) -> Any:
    """Run an operation that is the same for all members."""
    if op.quick or op.is_view:
        return op.func(*values, **kwargs)
    with restored_keys():
        return op.func(*values, **kwargs)


def agreement(op: Operation, region: Region, values: Any, dims: Any, kwargs: Any) -> Any:
    """The one value that all members read on the host, or a retreat where they differ."""
    outs = _for_each_member(op, region, values, dims, kwargs)
    first = outs[0]
    if any(out != first and not (out != out and first != first) for out in outs):
        part_ways(region, f"{op.name} reads a value on the host, and the members differ in it")
    if trace.active is not None:
        trace.active.note(op.name, "agreement", "", 0.0)
    return first


def draws_apart(op: Operation, region: Region, batched: bool, values: Any, kwargs: Any) -> bool:
    """Whether each member draws its own; raises under randomness="error"."""
    if not draws.draws(op, values, kwargs):
        return False
    if region.randomness == "error":
        fail(
            EngineError,
            "MW202",
            f"vmap: called random operation while in randomness error mode: {op.name}",
            do="Pass randomness='different' or 'same', or one generator a member (generators=)",
        )
    region.keep_streams()
    return region.randomness == "different" or batched
