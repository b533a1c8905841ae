"""In which memory order a recording's convolutions are faster, the channels second or last: measured, one by one.

On the CPU, grouped convolutions, which is what members in one call are, take a quarter of the time with the channels
last (6 -> 16 channels, M = 5, batch 64: 5 ms instead of 18), depthwise ones a third, wide ones nothing less, and
normalisation then costs more than that (ResNet-18, batch 8: the step 455 ms with them second).
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from memberwise._torch.building import quiet
from memberwise._torch.folder import get, kept_at, put
from memberwise._torch.graphmodule import graph_module
from memberwise.capture.aliases import Aliases, tensor_at
from memberwise.capture.cache import structure
from memberwise.capture.program import Like
from memberwise.capture.record import note, shapes
from memberwise.capture.views import with_fewer_views

GAIN = 0.7
"""What part of their time convolutions must take with the channels last, for the rest of the step to lose less."""

TIMES = 3

_aten = torch.ops.aten
_IMAGES = {_aten.convolution.default: (0,), _aten.convolution_backward.default: (0, 1)}
"""Convolutions -> which arguments are images."""

Inputs = Callable[[], list[torch.Tensor]]


def laid_out(
    module: fx.GraphModule, inputs: Inputs, results: Sequence[Like] | None = None
) -> tuple[fx.GraphModule, bool]:
    """The recording in the memory order that its convolutions are fastest in, and whether that is another than it had.

    Args:
        module: the recording.
        inputs: makes copies of what it is called with.
        results: what it shall return, if that matters.
    """
    if all(node.target not in _IMAGES for node in module.graph.nodes):
        return module, False
    given = inputs()
    if any(value.device.type != "cpu" for value in given):
        return module, False
    path = kept_at(("memory order", structure(module, given), torch.get_num_threads())).with_suffix(".json")
    last = get(path, lambda known: bool(known["last"]))
    if last is None:
        last = channels_last_is_faster(module, given)
        put(path, {"last": last})
    if last:
        with contextlib.suppress(Exception), torch.no_grad():  # an operation may know one order only
            return _Relaying(with_fewer_views(module, given, copies=True), given, results).module(), True
    return module, False


class _Relaying:
    """Writes a recording anew while it runs, so that convolutions get images with the channels last.

    What lies so already is left as it is, and most operations keep the order, so few images are copied.

    Attributes:
        new: the node that stands for one of the recording.
        values: what it is in this run; of those that are read later.
        copies: images that were copied, with the channels last.
    """

    def __init__(self, source: fx.GraphModule, inputs: Sequence[torch.Tensor], results: Sequence[Like] | None) -> None:
        self.source = source
        self.graph = fx.Graph()
        self.new: dict[fx.Node, fx.Node] = {}
        self.values: dict[fx.Node, Any] = {}
        self.copies: dict[fx.Node, tuple[fx.Node, torch.Tensor]] = {}
        self._inputs = iter(inputs)
        self._results = results
        self._written = Aliases(source.graph).written

    def module(self) -> fx.GraphModule:
        """The new recording."""
        reader = {one: node for node in self.source.graph.nodes for one in node.all_input_nodes}  # the last of each
        for node in self.source.graph.nodes:
            if node.op == "output":
                self.graph.output(tuple(map(self._result, range(len(node.args[0])), node.args[0])))
                continue
            self._run(node)
            for one in node.all_input_nodes:
                if reader[one] is node:
                    del self.values[one]
        return graph_module(self.source, self.graph)

    def _run(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.new[node], self.values[node] = self.graph.node_copy(node), next(self._inputs)
            return
        if node.op == "get_attr":
            self.new[node], self.values[node] = self.graph.node_copy(node), getattr(self.source, str(node.target))
            return
        other: dict[fx.Node, tuple[fx.Node, torch.Tensor]] = {}  # what it gets in another order
        target: Any = node.target
        for k in _IMAGES.get(target, ()):
            image = tensor_at(node.args[k])
            other[image] = self._with_channels_last(image)
        self.new[node] = self.graph.node_copy(node, lambda one: other[one][0] if one in other else self.new[one])
        args, kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda one: other[one][1] if one in other else self.values[one]
        )
        self.values[node] = target(*args, **kwargs)
        if isinstance(self.values[node], torch.Tensor):
            note(self.new[node], self.values[node])

    def _with_channels_last(self, image: fx.Node) -> tuple[fx.Node, torch.Tensor]:
        value = self.values[image]
        if value.ndim != 4 or value.is_contiguous(memory_format=torch.channels_last):
            return self.new[image], value
        if image in self._written:
            return self._copied(image, torch.channels_last)
        if image not in self.copies:
            self.copies[image] = self._copied(image, torch.channels_last)
        return self.copies[image]

    def _copied(self, one: fx.Node, order: torch.memory_format) -> tuple[fx.Node, torch.Tensor]:
        node = self.graph.call_function(_aten.clone.default, (self.new[one],), {"memory_format": order})
        value = self.values[one].clone(memory_format=order)
        node.meta = dict(one.meta)
        note(node, value)
        return node, value

    def _result(self, index: int, node: fx.Node) -> fx.Node:
        """In the memory order that it had."""
        if self._results is None or self.values[node].stride() == self._results[index].stride:
            return self.new[node]
        made, copy = self._copied(node, torch.contiguous_format)
        if copy.stride() != self._results[index].stride:
            raise ValueError("a result lies in an order of its own")
        return made


def channels_last_is_faster(graph: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> bool:
    """Whether the convolutions of a recorded step are, all together, on the CPU."""
    calls = _calls(graph, inputs)
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
        if node.target in _IMAGES:
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
    quiet()
    for _ in range(TIMES):
        start = time.perf_counter()
        function(*given)
        best = min(best, time.perf_counter() - start)
    return best
