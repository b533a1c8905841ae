"""Tensors that a function uses and was not given: a weight in a closure, a member tensor of an outer call.

Where one that needs a gradient meets a member tensor, it is taken in like a shared argument, through an autograd node
of its own, so that it leaves with the sum of its members' gradients, as in a loop. What is computed from such tensors
alone stays plain: it is the same for all members, and its graph is the lone one.
"""

from __future__ import annotations

from typing import Any

import torch

from memberwise._torch.functorch import is_transformed
from memberwise.engine import lowering
from memberwise.engine.ambient import Region
from memberwise.engine.crossing import enter
from memberwise.engine.signals import part_ways


def taken_in(cls: type, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Arguments with every tensor that needs a gradient at the level of `cls`."""
    for arg in args:
        if type(arg) is not cls and _is_foreign(arg, cls):
            break
    else:
        if not kwargs or not any(_is_foreign(value, cls) for value in kwargs.values()):
            return args, kwargs
    region = _region(cls, [*args, *(kwargs or {}).values()])
    if region is None:
        return args, kwargs
    args = tuple(_replaced(arg, cls, region) for arg in args)
    return args, {name: _replaced(value, cls, region) for name, value in kwargs.items()} if kwargs else kwargs


def function_arguments(args: Any) -> Any:
    """The arguments of an `autograd.Function`, taken in at the innermost level among them."""
    members = [arg for arg in args if hasattr(arg, "stands_for_members")]
    if not members or not torch.is_grad_enabled():
        return args
    lowering.raise_for_function(args)
    return taken_in(type(max(members, key=lambda member: member._region.level)), args, None)[0]


def _is_foreign(arg: Any, cls: type) -> bool:
    if isinstance(arg, torch.Tensor):
        return type(arg) is not cls and arg.requires_grad and not is_transformed(arg)
    return type(arg) in (list, tuple) and any(_is_foreign(entry, cls) for entry in arg)


def _region(cls: type, values: Any) -> Region | None:
    for value in values:
        if type(value) is cls:
            return value._region
        if type(value) in (list, tuple):
            found = _region(cls, value)
            if found is not None:
                return found
    return None


def _replaced(arg: Any, cls: type, region: Region) -> Any:
    if type(arg) in (list, tuple):
        return type(arg)(_replaced(entry, cls, region) for entry in arg)
    return region_tensor(arg, region) if _is_foreign(arg, cls) else arg


def region_tensor(tensor: torch.Tensor, region: Region) -> torch.Tensor:
    """The shared member tensor of a plain one; the same for as long as nothing is written to it."""
    if tensor.layout is not torch.strided:
        part_ways(region, f"a tensor of layout {tensor.layout}, which no member tensor can show, needs a gradient")
    key = id(tensor), tensor._version
    if key not in region.closures:
        region.closures[key] = tensor, enter([tensor], [False], region)[0]
    return region.closures[key][1]


def grad(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    """`torch.autograd.grad` inside a call, with respect to what the function was not given.

    Each member asks for its own gradient, and there is one tensor for all: it is a matter for each alone.
    """
    members = [t for t in _several(outputs) if hasattr(t, "stands_for_members")]
    if members:
        region = members[0]._region
        if any(_is_foreign(entry, type(members[0])) for entry in _several(inputs)):
            part_ways(region, "torch.autograd.grad with respect to a tensor that the function was not given")
    return torch.autograd.grad(outputs, inputs, *args, **kwargs)


def _several(values: Any) -> Any:
    return values if isinstance(values, list | tuple) else (values,)
