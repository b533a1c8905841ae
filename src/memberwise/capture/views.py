"""A recording by fewer views: elementwise operations get what their arguments are views of.

Rules fold members into batches or channels and back, and between them elementwise operations see `(M, B, C, H, W)`. A
compiler takes such views for what they are, until memory orders differ: normalisation with the channels last then takes
half as long again. A fold that follows on its undoing goes, and so do views that only move an axis of one entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from memberwise._torch.graphmodule import graph_module
from memberwise.capture.aliases import Aliases, Unclear, written
from memberwise.capture.record import shapes

_aten = torch.ops.aten
_RESHAPED = {
    _aten.view.default, _aten.reshape.default, _aten.unflatten.int, _aten.unsqueeze.default, _aten.squeeze.dim,
    _aten.detach.default,
}  # fmt: skip
"""Views that keep the order of entries."""

_COPIES = {_aten.clone.default, _aten.contiguous.default, _aten._unsafe_view.default}
"""Copies, and views of such."""

Shape = tuple[int, ...]


class View(NamedTuple):
    """One view of another: with those axes exchanged, or, in the same order, in another shape."""

    before: Shape
    shape: Shape
    axes: tuple[int, int] | None = None

    def of(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        """A node that is this view of `node`."""
        if self.axes is not None:
            return graph.call_function(_aten.transpose.int, (node, *self.axes))
        return graph.call_function(_aten.reshape.default, (node, list(self.shape)))


Views = tuple[View, ...]


def with_fewer_views(module: fx.GraphModule, inputs: Sequence[torch.Tensor], copies: bool = False) -> fx.GraphModule:
    """The same program.

    Args:
        module: a recording.
        inputs: what it is called with.
        copies: whether copies count as views. Then a tensor may lie in another memory order than it did.

    >>> graph = fx.Graph()
    >>> x = graph.placeholder("x")
    >>> for name, value in (("unsqueeze", (0,)), ("exp", ()), ("squeeze", (0,))):
    ...     overload = {"squeeze": "dim"}.get(name, "default")
    ...     x = graph.call_function(getattr(getattr(_aten, name), overload), (x, *value))
    ...     x.meta["kind"] = ((2, 3) if name == "squeeze" else (1, 2, 3), None)
    >>> _ = graph.output((x,))
    >>> [str(node.target) for node in with_fewer_views(fx.GraphModule({}, graph), [torch.zeros(2, 3)]).graph.nodes]
    ['x', 'aten.exp.default', 'output']
    """
    reshaped = _RESHAPED | _COPIES if copies else _RESHAPED
    try:
        return graph_module(module, _Rewriting(module.graph, inputs, reshaped).graph)
    except Unclear:
        return module


class _Rewriting:
    """Rewrites a copy of a graph.

    Attributes:
        reshaped: operations that keep the order of entries.
        shapes: of its nodes.
        views: of a node that views another, which that is, and how.
        copies: those of them with a copy between.
    """

    def __init__(self, graph: fx.Graph, inputs: Sequence[torch.Tensor], reshaped: set[Any]) -> None:
        self.reshaped = reshaped
        self.graph = fx.Graph()
        self.graph.output(self.graph.graph_copy(graph, {}))
        self.shapes = shapes(self.graph, inputs)
        self.views: dict[fx.Node, tuple[fx.Node, Views]] = {}
        self.copies: set[fx.Node] = set()
        self.written = Aliases(self.graph).written
        for node in list(self.graph.nodes):
            if node.op == "call_function" and node in self.shapes and node not in self.written:
                self._view(node) or self._elementwise(node)
            if node.target in (_aten.view.default, _aten._unsafe_view.default) and node not in self.written:
                node.target = _aten.reshape.default  # what it is a view of may lie in another order now
        self.graph.eliminate_dead_code(lambda node: node.op != "call_function" or bool(written(node)))

    def _view(self, node: fx.Node) -> bool:
        """Note what it is a view of, and how; where nothing is left of that, the one stands for the other."""
        source: Any = node.args[0] if node.args else None
        before = self.shapes.get(source)
        if before is None or (node.target not in self.reshaped and node.target is not _aten.transpose.int):
            return False
        source, views = self.views.get(source, (source, ()))
        if source in self.written or node.args[0] in self.written:
            return False
        axes = _axes(node.args[1:], before) if node.target is _aten.transpose.int else None
        views = _followed(views, View(before, self.shapes[node], axes))
        self.views[node] = source, views
        if node.target in _COPIES or node.args[0] in self.copies:
            self.copies.add(node)
        if not views:  # of what was copied, the copy is returned
            node.replace_all_uses_with(source, lambda user: user.op != "output" or node not in self.copies)
        return True

    def _elementwise(self, node: fx.Node) -> bool:
        """Let it take what its arguments are the same views of, and view its result instead."""
        given, shape = node.all_input_nodes, self.shapes[node]
        if torch.Tag.pointwise not in getattr(node.target, "tags", ()) or written(node) or not given:
            return False
        if node.target in _COPIES:  # made for the order in which the copy lies
            return False
        found = {one: self.views[one] for one in given if one in self.views and self.shapes[one] == shape}
        if len(found) < len(given) or len({views for _, views in found.values()}) > 1:
            return False
        views = found[given[0]][1]
        if not views or any(source in self.written for source, _ in found.values()):
            return False
        with self.graph.inserting_before(node):
            own = last = self.graph.node_copy(node, lambda one: found[one][0])
            own.meta = {**node.meta, "kind": (views[0].before, None)}
            for view in views:
                last = view.of(self.graph, last)
                last.meta = {**node.meta, "kind": (view.shape, None)}
                self.shapes[last] = view.shape
        self.shapes[own] = views[0].before
        self.views[last] = own, views
        node.replace_all_uses_with(last)
        self.graph.erase_node(node)
        return True


def _followed(views: Views, view: View) -> Views:
    """One more view, or fewer where it undoes the last.

    >>> fold = View((4, 6), (4, 3, 2)), View((4, 3, 2), (3, 4, 2), (0, 1))
    >>> _followed(_followed(fold, View((3, 4, 2), (4, 3, 2), (0, 1))), View((4, 3, 2), (4, 6)))
    ()
    """
    if view.axes is None and view.before == view.shape:
        return views
    if views and view.axes == views[-1].axes:
        before = views[-1].before
        views = views[:-1]
        return views if view.axes or before == view.shape else (*views, View(before, view.shape))
    return *views, view


def _axes(given: Sequence[Any], shape: Shape) -> tuple[int, int] | None:
    """The axes that are exchanged; None if those longer than one keep their order."""
    first, second = sorted(int(axis) % len(shape) for axis in given)
    order = list(range(len(shape)))
    order[first], order[second] = second, first
    long = [axis for axis in order if shape[axis] != 1]
    return None if long == sorted(long) else (first, second)
