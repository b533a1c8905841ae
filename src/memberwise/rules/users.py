"""Rules of users: the same table, and each answer is looked at, so that a slip is an error with a name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from memberwise.engine.signals import Decline
from memberwise.errors import ArgumentError, EngineError, KindError, fail
from memberwise.rules import registry

_OVERLOAD, _PACKET = type(torch.ops.aten.mm.default), type(torch.ops.aten.mm)
_FORM = "A rule is rule(info, in_dims, *args, **kwargs) -> (out, out_dims), or a Decline('why')"


def register_rule(op: Any, rule: Callable[..., Any] | None = None) -> Any:
    """Register how `op` (an `OpOverload`, or a custom op) runs for all members at once.

    The rule has the signature of `torch.library.register_vmap`: `rule(info, in_dims, *args, **kwargs)` returns
    `(out, out_dims)`. `in_dims` holds 0 or None for each argument (the member axis M is first, or absent; a list
    for a list of tensors), `info.batch_size` is M. `out_dims` is 0, or a list of 0 and None, one a result. A rule that
    does not serve a call returns `Decline("reason")`, and the operation goes down the ladder.

    Raises:
        KindError: (a TypeError) `op` is no operator, or `rule` cannot be called with its arguments [MW213].
        ArgumentError: (a ValueError) the operation has a rule already [MW213].
        EngineError: (a RuntimeError), in a call: the rule's answer is not of this form [MW213].

    >>> import torch
    >>> @torch.library.custom_op("memberwise_doc::twice", mutates_args=())
    ... def twice(x: torch.Tensor) -> torch.Tensor:
    ...     return x * 2
    >>> @register_rule(twice)
    ... def twice_rule(info, in_dims, x):
    ...     return x * 2, 0
    """
    key = _operator(op)
    if rule is None:
        return lambda given: register_rule(op, given)
    if not callable(rule):
        fail(KindError, "MW213", f"the rule of {key} is a {type(rule).__name__}, which cannot be called", do=_FORM)
    _check_signature(key, rule)
    if key in registry.RULES:
        fail(ArgumentError, "MW213", f"{key} has a rule already; a second one would hide it", do="Keep one of them")
    registry.register_rule(key, _looked_at(key, rule))
    return rule


def _operator(op: Any) -> Any:
    key = getattr(op, "_opoverload", op)
    if isinstance(key, _OVERLOAD):
        return key
    what, do = f"expected an operator, got {op!r}", "Give torch.ops.NAMESPACE.NAME.OVERLOAD, or what custom_op returns"
    if isinstance(op, _PACKET):
        what, do = f"{op} has several overloads", f"Name one: {', '.join(f'{op}.{name}' for name in op.overloads())}"
    fail(KindError, "MW213", what, do=do)


def _check_signature(key: Any, rule: Callable[..., Any]) -> None:
    """What the operation may be called with, the rule must take."""
    own = key._schema.arguments
    positional, named = [arg.name for arg in own if not arg.kwarg_only], [arg.name for arg in own if arg.kwarg_only]
    try:
        inspect.signature(rule).bind(None, [], *positional, **dict.fromkeys(named))
    except TypeError as error:
        taken = ", ".join(("info", "in_dims", *positional, *named))
        what = f"the rule of {key} cannot take its arguments ({taken}): {error}"
        fail(KindError, "MW213", what, do=_FORM)
    except ValueError:  # a callable without a signature
        return


def _looked_at(key: Any, rule: Callable[..., Any]) -> Callable[..., Any]:
    count = len(key._schema.returns)

    @functools.wraps(rule)
    def looked_at(info: Any, in_dims: Any, *args: Any, **kwargs: Any) -> Any:
        answer = rule(info, in_dims, *args, **kwargs)
        if type(answer) is not Decline:
            fault = _fault(answer, count, info.batch_size)
            if fault is not None:
                fail(EngineError, "MW213", f"the rule of {key} answered {fault}, with in_dims {in_dims}", do=_FORM)
        return answer

    return looked_at


def _fault(answer: Any, count: int, size: int) -> str | None:
    """What is wrong with a rule's answer, or None."""
    if not isinstance(answer, tuple) or len(answer) != 2:
        return f"a {type(answer).__name__}, expected a pair (out, out_dims)"
    out, dims = answer
    if not count:
        return None  # it writes, and returns nothing
    outs = [out] if isinstance(out, torch.Tensor) else out
    count = len(outs) if count == 1 and isinstance(outs, list | tuple) else count  # a list of tensors is one result
    if not isinstance(outs, list | tuple) or len(outs) != count:
        return f"a {type(out).__name__} of results, expected {count}"
    each = dims if isinstance(dims, list | tuple) else [dims] * count
    if len(each) != count:
        return f"{len(each)} out_dims for {count} results"
    return next(filter(None, map(functools.partial(_fault_of_one, size), range(count), outs, each)), None)


def _fault_of_one(size: int, place: int, out: Any, dim: Any) -> str | None:
    if dim is not None and (type(dim) is not int or dim != 0):
        return (
            f"out_dims {dim!r} for result {place}; the member axis comes first: 0, or None where members hold the same"
        )
    for tensor in out if isinstance(out, list | tuple) else [out]:
        if isinstance(tensor, torch.Tensor) and dim == 0 and tensor.shape[:1] != (size,):
            return f"result {place} of shape {tuple(tensor.shape)}, expected the member axis of size {size} first"
    return None
