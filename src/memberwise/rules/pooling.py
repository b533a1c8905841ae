"""Pooling, and its undoing: members among the batch, or among the channels where they lie so (after a convolution)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from memberwise._torch.tracing import tracing
from memberwise.engine.signals import Decline
from memberwise.rules.axis import expanded
from memberwise.rules.folding import as_it_lies, into_batch, is_channels_last, out_of_batch
from memberwise.rules.registry import LONE_CONTIGUOUS, register_rule

_aten = torch.ops.aten
_MANY = 1 << 16


def _folded(call: Callable[..., Any], space: int, places: tuple[int, ...]) -> Any:
    """Run `call` once for all members' tensors at `places`; `space` dimensions are pooled over."""

    def rule(info: Any, in_dims: Any, *args: Any) -> Any:
        values, size = list(args), info.batch_size
        for place in places:
            values[place] = expanded(values[place], in_dims[place], size)
        if any(is_channels_last(values[place]) for place in places):
            return Decline("memory in channels_last order")
        if values[0].ndim == space + 2:  # one sample a member, no batch: members are one
            for place in places:  # torch reads the places of maxima in 3d from other memory wrongly
                values[place] = values[place].contiguous()
            return call(*values), 0
        into, out_of = as_it_lies(values[places[-1]])
        for place in places:
            values[place] = into(values[place])
        found = call(*values)
        return (tuple(out_of(one, size) for one in found) if type(found) is tuple else out_of(found, size)), 0

    return rule


def _max_pool2d(folded: Any) -> Any:
    def rule(info: Any, in_dims: Any, x: torch.Tensor, *window: Any) -> Any:
        """In windows of two by two torch's CPU kernel looks at each value in turn: 5.7 ms for (16, 32, 8, 16, 16),
        where comparing columns and then rows takes 3.0."""
        if _is_two_by_two(*window) and _is_halved(x) and not tracing():  # a compiler's own loops are as fast
            return by_halves(x), 0
        return folded(info, in_dims, x, *window)

    return rule


def _is_two_by_two(kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False) -> bool:
    given = (kernel, 2), (stride or kernel, 2), (padding, 0), (dilation, 1)
    return all(set(value if isinstance(value, list | tuple) else (value,)) == {wanted} for value, wanted in given)


def _is_halved(x: torch.Tensor) -> bool:
    """Whether `by_halves` serves, and wins: from some ten thousand results on."""
    even = x.shape[-1] % 2 == 0 and x.shape[-2] % 2 == 0
    return even and x.numel() >= _MANY and x.device.type == "cpu" and x.is_floating_point()


def by_halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Maxima and their places, as `max_pool2d_with_indices` gives them, of windows of two by two.

    The first of equal values counts, and a NaN more than any number: columns are compared before rows.
    """
    width = x.shape[-1]
    rows, right = _larger(x[..., 0::2], x[..., 1::2])
    out, lower = _larger(rows[..., 0::2, :], rows[..., 1::2, :])
    above = right[..., 0::2, :]
    right = above ^ ((above ^ right[..., 1::2, :]) & lower)  # of the row that won; `where` takes 10 times as long
    corner = torch.arange(0, x.shape[-2] * width, 2 * width, device=x.device).unsqueeze(1)
    corner = corner + torch.arange(0, width, 2, device=x.device)
    return out, right.long().add_(corner).add_(lower, alpha=width)


def _larger(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The larger of two, and whether it is the second."""
    return torch.maximum(first, second), torch.gt(second, first).logical_or_(second != second)


_POOLS = {
    "max_pool2d_with_indices": 2,
    "max_pool3d_with_indices": 3,
    "avg_pool2d": 2,
    "avg_pool3d": 3,
    "_adaptive_avg_pool2d": 2,
    "_adaptive_avg_pool3d": 3,
    "adaptive_max_pool2d": 2,
    "adaptive_max_pool3d": 3,
}
"""Pooling -> how many dimensions it pools over."""


def _tensor_places(overload: Any) -> tuple[int, ...]:
    return tuple(k for k, arg in enumerate(overload._schema.arguments) if str(arg.type) == "Tensor")


for _name, _space in _POOLS.items():
    for _op in (getattr(_aten, _name).default, getattr(_aten, _name + "_backward").default):
        _rule = _folded(_op, _space, _tensor_places(_op))
        register_rule(_op, _max_pool2d(_rule) if _op is _aten.max_pool2d_with_indices.default else _rule)
        LONE_CONTIGUOUS.add(_op)

for _op, _space in ((_aten.max_unpool2d.default, 2), (_aten.max_unpool3d.default, 3)):  # differentiated as a gather
    register_rule(_op, _folded(_op, _space, (0, 1)))
    LONE_CONTIGUOUS.add(_op)


def _fractional(call: Callable[..., Any], space: int) -> Any:
    """Windows at random places, which are given: of each sample and channel their own."""

    def rule(info: Any, in_dims: Any, x: Any, kernel: Any, output: Any, places: Any) -> Any:
        size = info.batch_size
        x = expanded(x, in_dims[0], size)
        has_batch = x.ndim == space + 3
        places = expanded(places, in_dims[3], size)[:, : x.shape[1] if has_batch else 1]  # torch reads no more of them
        if is_channels_last(x):
            return Decline("memory in channels_last order")
        found = call(into_batch(x) if has_batch else x, kernel, output, into_batch(places))
        return (tuple(out_of_batch(one, size) for one in found) if has_batch else found), 0

    return rule


for _name, _space in (("fractional_max_pool2d", 2), ("fractional_max_pool3d", 3)):
    _op, _back = getattr(_aten, _name).default, getattr(_aten, _name + "_backward").default
    register_rule(_op, _fractional(_op, _space))
    register_rule(_back, _folded(_back, _space, _tensor_places(_back)))
    LONE_CONTIGUOUS.update({_op, _back})
