"""In which memory order a lone member's convolutions are faster, the channels second or last: measured, one by one.

A compiler can give convolutions the order that they like, and all that lies between. Depthwise ones take half the time
with the channels last (MobileNetV2-like, batch 32: 50 ms instead of 110, the whole step 139 instead of 177), others
gain little, and normalisation then costs more than that (ResNet-18, batch 8: the step 455 ms with them second).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from memberwise.capture.record import shapes

GAIN = 0.7
"""What part of their time convolutions must take with the channels last, for the rest of the step to lose less."""

TIMES = 3

_CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)


def channels_last_is_faster(graph: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> bool:
    """Whether the convolutions of a recorded step are, all together, on the CPU."""
    calls = _calls(graph, inputs)
    if not calls or any(value.device.type != "cpu" for value in inputs):
        return False
    second, last = (
        sum(count * _seconds(*call, order) for call, count in calls.items())
        for order in (torch.contiguous_format, torch.channels_last)
    )
    return last < GAIN * second


class _Image(tuple[int, ...]):
    """Stands for a tensor of this shape."""


def _calls(graph: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Counter[Any]:
    """Two-dimensional convolutions, forward and backward: each with its arguments, and how often."""
    known = shapes(graph.graph, inputs)
    found: Counter[Any] = Counter()
    for node in graph.graph.nodes:
        if node.target in _CONVOLUTIONS:
            args = tuple(_Image(known[one]) if isinstance(one, fx.Node) else one for one in node.args)
            if len(args[1]) == 4:
                found[node.target, _frozen(args)] += 1
    return found


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) and not isinstance(value, _Image) else value


def _seconds(function: Any, args: Any, order: torch.memory_format) -> float:
    """The least time of one."""

    def made(shape: _Image) -> torch.Tensor:
        value = torch.ones(*shape)  # no draw: the streams are the user's
        return value.contiguous(memory_format=order) if value.ndim == 4 else value

    given = [made(one) if isinstance(one, _Image) else one for one in args]
    best = float("inf")
    for _ in range(TIMES):
        start = time.perf_counter()
        function(*given)
        best = min(best, time.perf_counter() - start)
    return best
