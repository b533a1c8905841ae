"""A recording compiled by regions: one compiled graph for each kind of region, and a graph that calls them in turn."""

from __future__ import annotations

import itertools
import operator
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import fx

from memberwise.capture.program import copied
from memberwise.capture.progress import told
from memberwise.capture.regions import Region, Uncut, regions

CALL = 25e-6
"""Seconds that a region's call takes by itself, at most."""

SHARE = 0.04
"""Of a step's time, how much all such calls may take, unless the recording is long."""

LONG = 1500
"""Operations beyond which a recording is cut whatever the calls take: 4300, compiled whole, took five minutes."""

MOST = 0.7
"""The part of a recording that may be left to compile, at most; else it is compiled whole."""

Compile = Callable[[fx.GraphModule, Sequence[torch.Tensor], Callable[[], Sequence[torch.Tensor]]], Callable[..., Any]]


class Call(torch.nn.Module):
    """One region in its place; compiled when it is first called, unless one like it was.

    Args:
        region: the operations.
        compiled: makes a graph a function.
        known: those made so far, by form and kinds of inputs.
    """

    def __init__(self, region: Region, compiled: Compile, known: dict[Hashable, Callable[..., Any]]) -> None:
        super().__init__()
        self.region = region
        self.compiled = compiled
        self.known = known
        self.run: Callable[..., Any] | None = None

    def forward(self, *inputs: torch.Tensor) -> Any:
        """The region's outputs; what it writes is written in place."""
        if self.run is None:
            self.run = self._made(inputs)
        return self.run(*inputs)

    def _made(self, inputs: Sequence[torch.Tensor]) -> Callable[..., Any]:
        key = self.region.form, tuple((t.shape, t.stride(), t.dtype, t.device) for t in inputs)
        if key not in self.known:
            writes = self.region.written_inputs()
            trial = lambda: [copied(x) if k in writes else x for k, x in enumerate(inputs)]  # noqa: E731 # short
            self.known[key] = self.compiled(fx.GraphModule({}, self.region.graph()), inputs, trial)
        return self.known[key]


def by_regions(
    module: fx.GraphModule, trial: Callable[[], Sequence[torch.Tensor]], compiled: Compile
) -> tuple[Callable[..., Any], int]:
    """The recording as calls of compiled regions, and how many there are. Raises `Uncut`.

    Args:
        module: the recording.
        trial: copies of its inputs to run on.
        compiled: makes a graph a function that has run once on what its trial gives.
    """
    found = regions(module.graph)
    total = sum(len(region.nodes) for region in found)
    distinct = {region.form: len(region.nodes) for region in found}
    if sum(distinct.values()) > MOST * total:
        raise Uncut("too little of it repeats")
    if total <= LONG and len(found) * CALL > SHARE * _seconds(module, trial):
        raise Uncut("its calls would take too much of the step")
    done = itertools.count()

    def counted(graph: fx.GraphModule, inputs: Any, trial: Any) -> Callable[..., Any]:
        told("compiling a step, by what repeats", next(done), len(distinct))
        return compiled(graph, inputs, trial)

    outline = _Outline(module, found, counted).module()
    outline.forward(*trial())
    return outline.forward, len(found)


def _seconds(module: fx.GraphModule, trial: Callable[[], Sequence[torch.Tensor]]) -> float:
    """What it takes, operation by operation, once it has run."""
    inputs = trial()
    module.forward(*inputs)
    start = time.perf_counter()
    module.forward(*inputs)
    return time.perf_counter() - start


class _Outline:
    """Writes the graph that calls the regions."""

    def __init__(self, module: fx.GraphModule, found: Sequence[Region], compiled: Compile) -> None:
        self.source = module
        self.regions = found
        self.aliases = found[0].aliases
        self.graph = fx.Graph()
        self.values: dict[fx.Node, fx.Node] = {}
        self.calls: dict[str, torch.nn.Module] = {}
        self.compiled = compiled
        self.known: dict[Hashable, Callable[..., Any]] = {}

    def module(self) -> fx.GraphModule:
        """All of it."""
        for node in self.source.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                self.values[node] = self.graph.node_copy(node)
        for region in self.regions:
            self._call(region)
        (last,) = (node for node in self.source.graph.nodes if node.op == "output")
        self.graph.output(fx.map_arg(last.args[0], self._value))
        return fx.GraphModule({**dict(self.source.named_buffers()), **self.calls}, self.graph)

    def _call(self, region: Region) -> None:
        name = f"region_{len(self.calls)}"
        self.calls[name] = Call(region, self.compiled, self.known)
        made = self.graph.call_module(name, tuple(self._value(node) for node in region.inputs))
        for position, k in enumerate(region.outputs):
            self.values[region.nodes[k]] = self.graph.call_function(operator.getitem, (made, position))

    def _value(self, node: fx.Node) -> fx.Node:
        """The node that stands for one of the recording's; a view is taken here, where it is first asked for."""
        node = self.aliases.same(node)
        if node not in self.values:
            assert self.aliases.is_view(node)
            self.values[node] = self.graph.node_copy(node, self._value)
        return self.values[node]
