"""Draws of single members, merged: M fills of the slices of one tensor become one input of the graph.

Members with streams of their own draw one after the other, each into its slice of a stacked tensor. Recorded as
it comes, that is M inputs and a chain of M writes, each of which a compiler turns into a copy of the whole.
"""

from __future__ import annotations

import operator
from itertools import groupby
from typing import Any

import torch
from torch import fx

from memberwise.capture.draws import Draw, MemberDraws, is_dense

_aten = torch.ops.aten


def merge_draws(graph: fx.Graph, inputs: list[Any]) -> list[Any]:
    """Merge what can be merged in `graph`, whose placeholders are `inputs`; the inputs of the new graph."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    values = dict(zip(placeholders, inputs, strict=True))
    order = {node: k for k, node in enumerate(graph.nodes)}
    fills = [_fill(node, value) for node, value in values.items() if isinstance(value, Draw)]
    for whole, run in groupby(fills, key=lambda fill: fill and _whole(fill)[0]):
        found = [fill for fill in run if fill is not None]
        orders = {values[_node(fill.args[1])].example.stride() for fill in found}
        if whole is not None and len(orders) == 1 and _is_all_of(whole, found, order):
            _merge(graph, whole, found, values)
    return [values[node] for node in graph.nodes if node.op == "placeholder"]


def _fill(drawn: fx.Node, draw: Draw) -> fx.Node | None:
    """The write of a drawn tensor over another, if nothing else reads it."""
    user = _only_user(drawn)
    fills = user is not None and user.target is _aten.copy_.default and user.args[1] is drawn
    return user if fills and is_dense(draw.example) else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _whole(fill: fx.Node) -> tuple[fx.Node | None, Any]:
    """The stacked tensor of which a fill writes one slice, and which; or which it is put into afterwards."""
    target = _node(fill.args[0])
    if target.target is _aten.select.int and target.args[1] == 0:
        return _node(target.args[0]), target.args[2]
    if target.target is operator.getitem and _node(target.args[0]).target is _aten.unbind.int:
        unbound = _node(target.args[0])
        return (_node(unbound.args[0]), target.args[1]) if unbound.args[1:] in ((), (0,)) else (None, None)
    user = _only_user(fill)
    if user is not None and user.target is _aten.stack.default and user.args[1:] in ((), (0,)):
        return user, list(user.args[0]).index(fill)  # type: ignore[arg-type] # a list of nodes, by the schema
    return None, None


def _node(value: Any) -> fx.Node:
    assert isinstance(value, fx.Node)
    return value


def _is_all_of(whole: fx.Node, fills: list[fx.Node], order: dict[fx.Node, int]) -> bool:
    """Whether these write all slices of a tensor, in order, before anything else looks at it."""
    shape = whole.meta.get("kind", ((),))[0]
    if not shape or [_whole(fill)[1] for fill in fills] != list(range(shape[0])):
        return False
    targets = [_node(fill.args[0]) for fill in fills]
    if not all(_only_user(target) is fill for target, fill in zip(targets, fills, strict=True)):
        return False
    if whole.target is _aten.stack.default:
        return len(list(whole.args[0])) == len(fills)  # type: ignore[arg-type] # a list of nodes, by the schema
    slicing = {*targets, *(_node(target.args[0]) for target in targets)}
    last = max(order[fill] for fill in fills)
    return all(user in slicing or order.get(user, last) > last for user in whole.users)


def _merge(graph: fx.Graph, whole: fx.Node, fills: list[fx.Node], values: dict[fx.Node, Any]) -> None:
    """Put one input in the place of the fills' M."""
    drawn = [_node(fill.args[1]) for fill in fills]
    targets = [_node(fill.args[0]) for fill in fills]
    with graph.inserting_before(drawn[0]):
        merged = graph.placeholder(f"{drawn[0]}_merged")
    values[merged] = MemberDraws([values.pop(one) for one in drawn])
    if whole.target is _aten.stack.default:
        with graph.inserting_before(whole):
            whole.replace_all_uses_with(graph.call_function(_aten.clone.default, (merged,)))
        unused = [whole, *fills, *targets, *drawn]
    else:
        _write_whole(graph, whole, merged, fills)
        unbound = {_node(target.args[0]) for target in targets} - {whole}
        unused = [*fills, *targets, *unbound, *drawn]
    for node in unused:
        graph.erase_node(node)


def _write_whole(graph: fx.Graph, whole: fx.Node, merged: fx.Node, fills: list[fx.Node]) -> None:
    """Write the drawn tensor over the whole, and let those who read a filled slice read it from there."""
    with graph.inserting_after(whole):
        written = graph.call_function(_aten.copy_.default, (whole, merged))
    for index, fill in enumerate(fills):
        if fill.users:
            with graph.inserting_after(written):
                fill.replace_all_uses_with(graph.call_function(_aten.select.int, (whole, 0, index)))
