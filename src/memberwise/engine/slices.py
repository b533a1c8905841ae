"""One operation's arguments for one member, and the members' results as one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from memberwise._torch.dispatch import without_dispatch
from memberwise._torch.functorch import restored_keys
from memberwise.engine.layout import relaid
from memberwise.engine.signals import part_ways

if TYPE_CHECKING:
    from memberwise.engine.ambient import Region
    from memberwise.engine.operation import Operation


def member_slice(value: Any, dim: Any, index: int) -> Any:
    if isinstance(dim, list):
        return [member_slice(entry, at, index) for entry, at in zip(value, dim, strict=True)]
    return value if dim is None else value.select(0, index)


def lone_strides(func: Any, values: Any, dims: Any, kwargs: Any) -> Any:
    """The strides of what `func` returns alone, in the structure of its result: of member 0, run for it.

    The meta device, which would need no run, gives others for some operations (group norm, in torch 2.14).
    """
    try:
        with without_dispatch(), restored_keys():
            return _strides(
                func(*(member_slice(value, dim, 0) for value, dim in zip(values, dims, strict=True)), **kwargs)
            )
    except (RuntimeError, NotImplementedError, TypeError):
        return None  # it runs for all members at once only: taken to be contiguous


def _strides(out: Any) -> Any:
    if isinstance(out, torch.Tensor):
        return out.stride()
    return [_strides(entry) for entry in out] if isinstance(out, list | tuple) else None


def stack_results(outs: list[Any], op: Operation, region: Region) -> Any:
    first = outs[0]
    if isinstance(first, torch.Tensor):
        if any(out.shape != first.shape for out in outs):
            part_ways(region, f"{op.name} gives the members results of different shapes")
        return relaid(torch.stack(outs), first.stride())
    if isinstance(first, list | tuple):
        return type(first)(stack_results(list(column), op, region) for column in zip(*outs, strict=True))
    if any(out != first for out in outs):
        part_ways(region, f"{op.name} gives the members different values")
    return first
