"""A recording that writes its results into tensors that it is given, a chunk's into its part of those for all members.

Put together afterwards, they would be read and written once more; gradients are as large as the parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from memberwise._torch.graphmodule import graph_module
from memberwise.capture.aliases import Aliases, Unclear


def writing_into(module: fx.GraphModule) -> fx.GraphModule:
    """The same, with one more input for each output, which it writes instead of returning it.

    >>> graph = fx.Graph()
    >>> x = graph.placeholder("x")
    >>> _ = graph.output((graph.call_function(torch.ops.aten.exp.default, (x,)),))
    >>> result = torch.empty(2)
    >>> writing_into(fx.GraphModule({}, graph))(torch.zeros(2), result)
    ()
    >>> result
    tensor([1., 1.])
    """
    graph = fx.Graph()
    outputs: Any = graph.graph_copy(module.graph, {})
    last = _last_uses(graph)
    end = next((node for node in reversed(graph.nodes) if node.op == "placeholder"), None)
    given = []
    for number in range(len(outputs)):
        with graph.inserting_after(end):
            end = graph.placeholder(f"into_{number}")
        given.append(end)
    for value, into in zip(outputs, given, strict=True):
        use = last(value)
        with graph.inserting_after(end if use.op == "placeholder" else use):
            graph.call_function(torch.ops.aten.copy_.default, (into, value))
    graph.output(())
    return graph_module(module, graph)


def _last_uses(graph: fx.Graph) -> Callable[[fx.Node], fx.Node]:
    """Of a node, the last that reads or writes its memory: if the recording is cut, a copy is in one region with it."""
    nodes = list(graph.nodes)
    try:
        aliases = Aliases(graph)
    except Unclear:  # then it is compiled whole
        return lambda value: nodes[-1]
    last = {aliases.base(one): node for node in nodes for one in (node, *node.all_input_nodes)}
    return lambda value: last[aliases.base(value)]
