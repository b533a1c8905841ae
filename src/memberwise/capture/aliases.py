"""Which nodes of a recording are the same memory, and which of that is written."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from memberwise.engine.operation import describe, written_among


class Unclear(Exception):
    """What a recording does to its memory cannot be told."""


class Aliases:
    """Which nodes of a recording are the same memory. Raises `Unclear`.

    Attributes:
        written: the nodes whose memory an operation writes, by whatever view of it.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._base: dict[fx.Node, fx.Node] = {}
        self._same: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            self._note(node)
        changed = {self.base(one) for node in graph.nodes for one in written(node)}
        self.written = {node for node, base in self._base.items() if base in changed}

    def base(self, node: fx.Node) -> fx.Node:
        """The node that made the memory that `node` lies in."""
        return self._base[node]

    def same(self, node: fx.Node) -> fx.Node:
        """The node whose very tensor this one is: what an operation in place returns is its argument."""
        return self._same[node]

    def is_view(self, node: fx.Node) -> bool:
        """Whether the node is another look at a tensor that is there."""
        return self._same[node] is node is not self._base[node]

    def _note(self, node: fx.Node) -> None:
        self._base[node] = self._same[node] = node
        if node.op != "call_function":
            return
        if node.target is operator.getitem:
            made, index = node.args
            if not isinstance(made, fx.Node) or not isinstance(index, int):
                raise Unclear("it takes a result apart in an unknown way")
            if describe(made.target).is_view:
                self._base[node] = self._base[made]
            else:
                self._note_returned(node, made, index)
            return
        facts = describe(node.target)
        if facts.moves_in_place or facts.swaps_memory:
            raise Unclear(f"{node.target} gives a tensor another shape in place")
        if facts.is_view or node.target is torch.ops.aten._unsafe_view.default:  # which does not say so
            self._base[node] = self._base[tensor_at(node.args[0])]
        else:
            self._note_returned(node, node, 0)

    def _note_returned(self, node: fx.Node, made: fx.Node, index: int) -> None:
        """What an operation returns may be what it was given to write."""
        returned = describe(made.target).returned
        place = returned[index] if index < len(returned) else None
        if place is not None:
            argument = tensor_at(made.kwargs[place] if isinstance(place, str) else made.args[place])
            self._same[node], self._base[node] = self._same[argument], self._base[argument]


def written(node: fx.Node) -> list[fx.Node]:
    """The nodes that an operation writes."""
    if node.op != "call_function" or not hasattr(node.target, "_schema"):
        return []
    return written_among(node.target, node.args, node.kwargs)


def tensor_at(value: Any) -> fx.Node:
    """An argument that is a tensor."""
    assert isinstance(value, fx.Node)
    return value
