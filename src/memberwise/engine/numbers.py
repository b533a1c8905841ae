"""What a torch function does with a number of which each member has its own.

A rule takes it (`rules/settings.py`: dropout, the norms); arithmetic takes it as a tensor of no dimension, of the type
that a Python number leaves the result; any other function runs for each member alone, with the member's number.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from memberwise._torch.dispatch import suspended
from memberwise.engine import trace
from memberwise.engine.signals import Decline, part_ways
from memberwise.engine.tensor import wrap
from memberwise.engine.values import MemberValue, is_own
from memberwise.rules.registry import SETTINGS
from memberwise.trees import tree_map

_BINARY = {"add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow"}
_ARITHMETIC = _BINARY | {f"{side}{name}" for side in "ri" for name in _BINARY}
_ARITHMETIC |= {
    "subtract",
    "multiply",
    "divide",
    "true_divide",
    "floor_divide",
    "remainder",
    "fmod",
    "maximum",
    "minimum",
}
_ARITHMETIC |= {"eq", "ne", "lt", "le", "gt", "ge", "fill", "where", "lerp"}
"""By name, less underscores: functions to which a number and a tensor of no dimension are the same."""


def among(args: Any, kwargs: Any) -> list[MemberValue]:
    """The member values among a function's arguments."""
    return [*_found(args), *_found(kwargs.values())] if kwargs else [*_found(args)]


def _found(values: Any) -> Iterator[MemberValue]:
    for value in values:
        if is_own(value):
            yield value
        elif type(value) in (list, tuple):
            yield from _found(value)


def taken(func: Any, args: Any, kwargs: dict[str, Any], found: list[MemberValue]) -> Any:
    """The result where a rule or arithmetic takes the values; a Decline where each member has to run alone."""
    rule = SETTINGS.get(func)
    out = Decline("no rule takes a number of which each member has its own")
    if rule is not None:
        out = rule(*args, **kwargs)
    elif getattr(func, "__name__", "").strip("_") in _ARITHMETIC and not kwargs:
        out = _computed(func, args)
    if type(out) is Decline:
        _refuse_writes(func, kwargs, found[0])
        name = getattr(func, "__name__", str(func))
        what = f"{name} ran member by member: {out.reason}"
        trace.warn_slow("MW206", what, "Its results are right; give the members one value if it is slow")
    return out


def _computed(func: Any, args: Any) -> Any:
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    if func is torch.where or func is torch.Tensor.where:
        tensors = [arg for arg in tensors if arg.dtype != torch.bool] or tensors
    kinds = {type(value) for arg in args if is_own(arg) for value in arg._values}
    if len(kinds) > 1 or not kinds <= {int, float, complex} or not tensors:
        return Decline("the members' values are of several types, or no numbers")
    one = kinds.pop()(0)
    dtype = tensors[0].dtype if len(tensors) == 1 else torch.result_type(*tensors[:2])
    dtype = torch.result_type(torch.empty((1,) * max(t.ndim for t in tensors), dtype=dtype, device="meta"), one)
    return func(*tree_map(lambda arg: as_tensor(arg, dtype, tensors[0].device) if is_own(arg) else arg, tuple(args)))


def as_tensor(value: MemberValue, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The numbers as a tensor of no dimension."""
    with suspended(value._region):
        stacked = torch.tensor(value._values, dtype=dtype, device=device)
    return wrap(stacked, value._region)


def _refuse_writes(func: Any, kwargs: dict[str, Any], value: MemberValue) -> None:
    """What returns an argument itself cannot run alone: a stacked result is another object."""
    name = getattr(func, "__name__", "")
    if (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace") or kwargs.get("out") is not None:
        part_ways(value._region, f"{name} writes in place, with a number of which each member has its own")
