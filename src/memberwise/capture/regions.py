"""A recorded step cut where it repeats: a layer, a time step, the optimizer's share of each are compiled once.

The recording is a list of operations in the order in which they ran, so any cut of it into stretches is one that can be
run. What recurs in it (`memberwise.capture.repeats`) becomes a region, and regions that compute the same share one
compiled graph. What passes from one to the next is whole tensors, never views of them: views are taken anew where they
are used. One that picks a part is taken outside of all regions, if what it looks at is not written there, so that
`x[0]`, `x[1]`, ... of one time step after the other are no difference; one of the whole in another shape, inside, where
it is free.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Sequence
from functools import cached_property
from itertools import groupby, pairwise
from typing import Any

from torch import fx

from memberwise.capture.aliases import Aliases, Unclear, tensor_at, written
from memberwise.capture.repeats import Repeat, repeats
from memberwise.engine.operation import describe

SHORTEST, LEAST = 20, 60
"""Operations of a region, at least, and how many must be saved for a stretch to become one."""


PARTS = {
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "unbind",
    "chunk",
    "narrow",
    "as_strided",
    "diagonal",
    "unfold",
}
"""Operations whose result is a part of a tensor."""


class Uncut(Exception):
    """A recording that is better compiled whole."""


class Region:
    """Operations that run one after the other, as one graph of their own.

    Attributes:
        all_nodes: the operations, in order.
        nodes: those that are not left outside, as some views are.
        inputs: the nodes outside that they read, in order of first use.
        outputs: the nodes of it that are read outside, filled in by who knows what is read of its like.
    """

    def __init__(self, nodes: Sequence[fx.Node], aliases: Aliases) -> None:
        self.aliases = aliases
        self.all_nodes = nodes
        self._changed = {aliases.base(one) for node in nodes for one in written(node)}
        self._inside: set[fx.Node] = set()
        own = set(nodes)
        looks = self._looks(nodes, own)
        self._inside = {base for base in self._changed - own if len(looks.get(base, ())) > 1}
        hoisted = {node for node in nodes if self._is_outside(node, own)}
        self.nodes = [node for node in nodes if node not in hoisted]
        self._own = set(self.nodes)
        self.inputs: list[fx.Node] = []
        self.chains: list[fx.Node] = []
        for node in self.nodes:
            for one in node.all_input_nodes:
                self._read(one)
        self._index = {node: k for k, node in enumerate(self.nodes)}
        self.outputs: list[int] = []

    def _looks(self, nodes: Sequence[fx.Node], own: set[fx.Node]) -> dict[fx.Node, set[fx.Node]]:
        """By base outside, the tensors through which it is read, once views are taken outside."""
        found: dict[fx.Node, set[fx.Node]] = {}
        for node in nodes:
            if self._is_outside(node, own):
                continue
            for one in map(self.aliases.same, node.all_input_nodes):
                if one not in own or self._is_outside(one, own):
                    found.setdefault(self.aliases.base(one), set()).add(one)
        return found

    def _is_outside(self, node: fx.Node, own: set[fx.Node]) -> bool:
        """Whether this is a part of what is outside, and may be taken there."""
        base = self.aliases.base(node)
        if base in own or base in self._inside:
            return False
        return node.target is operator.getitem or _name(node) in PARTS

    def _read(self, node: fx.Node) -> None:
        """Note a node outside as an input; or its memory's, and how it is looked at, if it must be seen inside."""
        node = self.aliases.same(node)
        if node in self._own or node in self.inputs or node in self.chains:
            return
        base = self.aliases.base(node)
        if base in self._own:
            raise Uncut("a tensor is looked at before it is made")
        if node is not base and base in self._inside:
            for one in node.all_input_nodes:
                self._read(one)
            self.chains.append(node)
        else:
            self.inputs.append(node)

    def number(self, node: fx.Node) -> tuple[str, int]:
        """What a node is to the region, whatever it is called."""
        if node in self._index:
            return "own", self._index[node]
        node = self.aliases.same(node)
        if node in self._index:
            return "own", self._index[node]
        return ("chain", self.chains.index(node)) if node in self.chains else ("input", self.inputs.index(node))

    @cached_property
    def form(self) -> Hashable:
        """Equal for regions that do the same."""
        return tuple(_described(node, self.number) for node in (*self.chains, *self.nodes)), len(self.inputs)

    def escapes(self) -> set[int]:
        """Which of its own results are read outside, themselves or a view of them."""
        found = set()
        for node in self.nodes:
            base = self.aliases.base(node)
            if base in self._own and any(user not in self._own for user in node.users):
                found.add(self._index[base])
        return found

    def written_inputs(self) -> set[int]:
        """Which inputs it writes."""
        return {k for k, node in enumerate(self.inputs) if self.aliases.base(node) in self._changed}

    def graph(self) -> fx.Graph:
        """The region as a graph: placeholders are `inputs`, it returns `outputs`."""
        graph = fx.Graph()
        new = {node: graph.placeholder(f"input_{k}") for k, node in enumerate(self.inputs)}
        for node in (*self.chains, *self.nodes):
            new[node] = graph.node_copy(node, lambda one: new[one] if one in new else new[self.aliases.same(one)])
        graph.output(tuple(new[self.nodes[k]] for k in self.outputs))
        return graph


def _described(node: fx.Node, number: Any) -> Hashable:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda one: _Numbered(number(one)))
    return node.target, repr(args), repr(kwargs)


class _Numbered:
    """A node's number, where an argument was."""

    def __init__(self, number: tuple[str, int]) -> None:
        self.number = number

    def __repr__(self) -> str:
        return "{} {}".format(*self.number)


def regions(graph: fx.Graph) -> list[Region]:
    """The recording as regions, in order; those of one form have the same outputs. Raises `Uncut`.

    They hold all operations but for `get_attr` and the views that are taken outside.
    """
    try:
        aliases = Aliases(graph)
    except Unclear as reason:
        raise Uncut(str(reason)) from reason
    units = _units(graph)
    tokens = [_token(unit) for unit in units]

    def crossing(repeat: Repeat) -> int:
        """How much passes in and out of a region if it begins here."""
        start = repeat.starts[len(repeat.starts) // 2]
        region = Region([node for unit in units[start : start + repeat.length] for node in unit], aliases)
        return len(region.inputs) + len(region.escapes())

    found = repeats(tokens, SHORTEST, LEAST, crossing)
    if not found:
        raise Uncut("nothing in it repeats")
    begins = {start for repeat in found for start in repeat.starts}
    ends = {start + repeat.length for repeat in found for start in repeat.starts}
    cuts = sorted({0, len(units), *begins, *ends})
    stretches = [[node for unit in units[a:b] for node in unit] for a, b in pairwise(cuts)]
    return _with_outputs([region for region in (Region(nodes, aliases) for nodes in stretches) if region.nodes])


def joined(found: Sequence[Region], most: int) -> list[Region]:
    """The same recording in fewer regions: of neighbours of one form, `most` become one."""
    made = []
    for _, run in groupby(found, key=lambda region: region.form):
        alike = [*run]
        for start in range(0, len(alike), most):
            nodes = [node for region in alike[start : start + most] for node in region.all_nodes]
            made.append(Region(nodes, alike[0].aliases))
    return _with_outputs(made)


def _with_outputs(made: list[Region]) -> list[Region]:
    """All of them, those of one form with the same outputs."""
    alike: dict[Hashable, list[Region]] = {}
    for region in made:
        alike.setdefault(region.form, []).append(region)
    for group in alike.values():
        outputs = sorted(set().union(*(region.escapes() for region in group)))
        for region in group:
            region.outputs = outputs
    return made


def _units(graph: fx.Graph) -> list[list[fx.Node]]:
    """The operations, each with what takes its results apart."""
    units: list[list[fx.Node]] = []
    owner: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is operator.getitem:
            owner[tensor_at(node.args[0])].append(node)
            continue
        owner[node] = [node]
        units.append(owner[node])
    return units


def _token(unit: Sequence[fx.Node]) -> Hashable:
    """What an operation is, apart from what it is given; of a view, not even where it looks."""
    node = unit[0]
    kind = tuple(one.meta.get("kind", ((),))[0] for one in unit)
    args = "" if describe(node.target).is_view else _described(node, lambda _: ("", 0))[1:]
    return node.target, args, kind


def _name(node: fx.Node) -> str:
    return node.target._schema.name.partition("::")[2]  # type: ignore[union-attr] # an operation
