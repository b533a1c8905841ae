"""A recording compiled by regions: one compiled graph for each kind of region, and a graph that calls them in turn."""

from __future__ import annotations

import itertools
import operator
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import fx

from memberwise._torch.building import quiet
from memberwise._torch.graphmodule import graph_module
from memberwise._torch.inductor import Trial
from memberwise.capture.program import copied
from memberwise.capture.progress import told
from memberwise.capture.regions import Region, Uncut, joined, regions

CALL = 60e-6
"""Seconds that a region takes by itself: its call (some 25 us), and memory that one graph would have used again. A
step of a two-layer transformer, 25 regions: 1.4 ms more than whole, for one member and for eight."""

SHARE = 0.005
"""Of a step's time, operation by operation, how much all of that may take, unless the recording is long."""

JOINED = (2, 4, 8)
"""How many neighbours of one form become one region where calls would take more: as few as do, for each is compiled."""

SURELY = 0.5
"""Seconds of a first run in which what is only made once, in it, hardly counts."""

LONG = 1500
"""Operations beyond which a recording is cut whatever the calls take: 4300, compiled whole, took five minutes."""

MOST = 0.7
"""The part of a recording that may be left to compile, at most; else it is compiled whole."""

Run = Callable[..., Any]
Begin = Callable[[fx.GraphModule, Sequence[torch.Tensor]], Callable[[Trial], Run]]


class Kind:
    """What all regions of one form share, that have inputs of one kind: a graph, until it is compiled.

    Args:
        region: one of them.
        inputs: what it is called with.
        begin: begins to compile its graph; what that returns takes a trial, and ends it.
    """

    def __init__(self, region: Region, inputs: Sequence[torch.Tensor], begin: Begin) -> None:
        graph = graph_module({}, region.graph())
        self.plain: Run = graph.forward
        self.run: Run | None = None
        self._inputs = inputs
        self._written = region.written_inputs()
        self._end = begin(graph, inputs)

    def end(self) -> None:
        """Wait until it is compiled."""
        self.run = self._end(self._trial)
        self._inputs = ()

    def _trial(self) -> list[torch.Tensor]:
        return [copied(x) if k in self._written else x for k, x in enumerate(self._inputs)]


class Kinds:
    """All kinds so far. While `waits` is false, those found are begun, and run operation by operation."""

    def __init__(self, begin: Begin) -> None:
        self.begin = begin
        self.known: dict[Hashable, Kind] = {}
        self.waits = False

    def of(self, region: Region, inputs: Sequence[torch.Tensor]) -> Kind:
        key = region.form, tuple((t.shape, t.stride(), t.dtype, t.device) for t in inputs)
        if key not in self.known:
            self.known[key] = Kind(region, inputs, self.begin)
            if self.waits:
                self.known[key].end()
        return self.known[key]

    def end(self) -> None:
        """Wait for all of them."""
        for done, kind in enumerate(self.known.values()):
            told("compiling a step, by what repeats", done, len(self.known))
            kind.end()
        self.waits = True


class Call(torch.nn.Module):
    """One region in its place."""

    def __init__(self, region: Region, kinds: Kinds) -> None:
        super().__init__()
        self.region = region
        self.kinds = kinds
        self.run: Run | None = None

    def forward(self, *inputs: torch.Tensor) -> Any:
        """The region's outputs; what it writes is written in place."""
        if self.run is None:
            kind = self.kinds.of(self.region, inputs)
            if kind.run is None:
                return kind.plain(*inputs)
            self.run = kind.run
        return self.run(*inputs)


def by_regions(module: fx.GraphModule, trial: Trial, begin: Begin) -> tuple[Callable[[], Run], int]:
    """Begins to compile the recording as calls of regions: what ends that, and how many there are. Raises `Uncut`.

    It runs twice on what `trial` gives: operation by operation, to begin all kinds of regions one after the other,
    while compilers work on those begun; and, where it ends, compiled.

    Args:
        module: the recording.
        trial: copies of its inputs to run on.
        begin: as `Kind` takes it.
    """
    found = _chosen(module, trial)
    distinct = len({region.form for region in found})
    begun = itertools.count()

    def counted(graph: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Callable[[Trial], Run]:
        told("preparing a step, by what repeats", next(begun), distinct)
        return begin(graph, inputs)

    kinds = Kinds(counted)
    outline = _Outline(module, found, kinds).module()
    outline.forward(*trial())

    def end() -> Run:
        kinds.end()
        outline.forward(*trial())
        return outline.forward

    return end, len(found)


def _chosen(module: fx.GraphModule, trial: Trial) -> list[Region]:
    """The regions: the smallest whose calls take little of the step, or else the largest of a long one."""
    smallest = found = regions(module.graph)
    if not _repeats(smallest):
        raise Uncut("too little of it repeats")
    allowed = SHARE * _seconds(module, trial)
    larger = itertools.takewhile(_repeats, (joined(smallest, most) for most in JOINED))
    for found in itertools.chain([smallest], larger):
        if len(found) * CALL <= allowed:
            return found
    if _size(smallest) <= LONG:
        raise Uncut("its calls would take too much of the step")
    return found


def _repeats(found: Sequence[Region]) -> bool:
    """Whether enough of the recording need not be compiled again."""
    kinds = {region.form: len(region.nodes) for region in found}
    return sum(kinds.values()) <= MOST * _size(found)


def _size(found: Sequence[Region]) -> int:
    return sum(len(region.nodes) for region in found)


def _seconds(module: fx.GraphModule, trial: Callable[[], Sequence[torch.Tensor]]) -> float:
    """What it takes, operation by operation, once it has run; what takes long need not run again."""
    inputs, taken = trial(), 0.0
    quiet()
    for _ in range(2):
        start = time.perf_counter()
        module.forward(*inputs)
        taken = time.perf_counter() - start
        if taken > SURELY:
            break
    return taken


class _Outline:
    """Writes the graph that calls the regions."""

    def __init__(self, module: fx.GraphModule, found: Sequence[Region], kinds: Kinds) -> None:
        self.source = module
        self.regions = found
        self.aliases = found[0].aliases
        self.graph = fx.Graph()
        self.values: dict[fx.Node, fx.Node] = {}
        self.calls: dict[str, torch.nn.Module] = {}
        self.kinds = kinds

    def module(self) -> fx.GraphModule:
        """All of it."""
        for node in self.source.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                self.values[node] = self.graph.node_copy(node)
        for region in self.regions:
            self._call(region)
        (last,) = (node for node in self.source.graph.nodes if node.op == "output")
        self.graph.output(fx.map_arg(last.args[0], self._value))
        return graph_module({**dict(self.source.named_buffers()), **self.calls}, self.graph)

    def _call(self, region: Region) -> None:
        name = f"region_{len(self.calls)}"
        self.calls[name] = Call(region, self.kinds)
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
