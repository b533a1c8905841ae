"""A recording for one member, whose member axis of one entry stands in nobody's way.

Rules fold members into batches or channels and back, and between them elementwise operations see `(1, *s)`. A compiler
takes such views for what they are, until memory orders differ: normalisation with the channels last then takes half as
long again. So elementwise operations get the folded tensors, and views that only move an axis of one entry go.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from memberwise.capture.record import shapes
from memberwise.engine.operation import written_among

_aten = torch.ops.aten
_VIEWS = {_aten.view.default, _aten.reshape.default, _aten.unflatten.int, _aten.unsqueeze.default, _aten.squeeze.dim}


def alone(module: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> fx.GraphModule:
    """The same program, by fewer views.

    >>> graph = fx.Graph()
    >>> x = graph.placeholder("x")
    >>> for name, value in (("unsqueeze", (0,)), ("exp", ()), ("squeeze", (0,))):
    ...     overload = {"squeeze": "dim"}.get(name, "default")
    ...     x = graph.call_function(getattr(getattr(_aten, name), overload), (x, *value))
    ...     x.meta["kind"] = ((2, 3) if name == "squeeze" else (1, 2, 3), None)
    >>> _ = graph.output((x,))
    >>> [str(node.target) for node in alone(fx.GraphModule({}, graph), [torch.zeros(2, 3)]).graph.nodes]
    ['x', 'aten.exp.default', 'output']
    """
    return fx.GraphModule(module, _Rewriting(module.graph, inputs).graph)


class _Rewriting:
    """Rewrites a copy of a graph.

    Attributes:
        shapes: of its nodes.
        core: of a view that only has its axes of one entry elsewhere, what it is a view of.
    """

    def __init__(self, graph: fx.Graph, inputs: Sequence[torch.Tensor]) -> None:
        self.graph = fx.Graph()
        self.graph.output(self.graph.graph_copy(graph, {}))
        self.shapes = shapes(self.graph, inputs)
        self.core: dict[fx.Node, fx.Node] = {}
        self.written = {one for node in self.graph.nodes for one in _written(node)}
        for node in list(self.graph.nodes):
            if node.op == "call_function" and node in self.shapes and node not in self.written:
                self._view(node) or self._elementwise(node)
        self.graph.eliminate_dead_code(lambda node: node.op != "call_function" or bool(_written(node)))

    def _view(self, node: fx.Node) -> bool:
        """Note what it is a view of; where that has the same shape, it stands for the view."""
        if node.target not in _VIEWS and node.target is not _aten.transpose.int:
            return False
        source: Any = node.args[0]
        before, now = self.shapes.get(source), self.shapes[node]
        if source in self.written or before is None or _long(before) != _long(now):
            return False
        if node.target is _aten.transpose.int and not _moves_ones(before, *node.args[1:]):
            return False
        core = self.core.get(source, source)
        if core in self.written:
            return False
        self.core[node] = core
        if self.shapes.get(core) == now:
            node.replace_all_uses_with(core)
        return True

    def _elementwise(self, node: fx.Node) -> bool:
        """Let it take what its arguments are views of, and view its result instead."""
        given = node.all_input_nodes
        shape = self.shapes[node]
        if torch.Tag.pointwise not in getattr(node.target, "tags", ()) or _written(node) or not given or not shape:
            return False
        if any(self.shapes.get(one) != shape for one in given) or shape[0] != 1:
            return False
        cores = {one: self.core.get(one) for one in given}
        if any(core is None or self.shapes.get(core) != shape[1:] or core in self.written for core in cores.values()):
            return False
        with self.graph.inserting_before(node):
            own = self.graph.node_copy(node, lambda one: cores[one] or one)
            view = self.graph.call_function(_aten.unsqueeze.default, (own, 0))
        self.shapes |= {own: shape[1:], view: shape}
        own.meta, view.meta = {**node.meta, "kind": (shape[1:], None)}, dict(node.meta)
        node.replace_all_uses_with(view)
        self.graph.erase_node(node)
        self.core[view] = own
        return True


def _long(shape: Sequence[int] | None) -> list[int]:
    return [size for size in shape or () if size != 1]


def _moves_ones(shape: Sequence[int], first: int, second: int) -> bool:
    """Whether the axes longer than one keep their order when two are exchanged."""
    order = list(range(len(shape)))
    order[first], order[second] = order[second], order[first]
    long = [axis for axis in order if shape[axis] != 1]
    return long == sorted(long)


def _written(node: fx.Node) -> list[fx.Node]:
    """What a node writes to."""
    if node.op != "call_function" or not hasattr(node.target, "_schema"):
        return []
    return written_among(node.target, node.args, node.kwargs)
