"""A recording in float64: where two float32 runs differ, it tells rounding from something else.

A network with kinks (ReLU, max pooling) turns a last bit into a step: an activation beside a kink falls to the other
side, and a gradient is another by a percent. Among millions of activations in float32 that is common; in float64, not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from memberwise._torch.graphmodule import graph_module


def widened(module: fx.GraphModule) -> fx.GraphModule:
    """The same operations, in float64 where they were in float32; inputs are to be such, too.

    >>> graph = fx.Graph()
    >>> x = graph.placeholder("x")
    >>> _ = graph.output(graph.call_function(torch.ops.aten._to_copy.default, (x,), {"dtype": torch.float32}))
    >>> widened(fx.GraphModule({}, graph))(torch.ones(2, dtype=torch.float64)).dtype
    torch.float64
    """
    graph, new = fx.Graph(), {}
    for node in module.graph.nodes:
        copy: Any = graph.node_copy(node, new.__getitem__)
        copy.args, copy.kwargs = map_aggregate(copy.args, wide_type), map_aggregate(copy.kwargs, wide_type)
        new[node] = copy
    held = {name: wide(value) for name, value in module.named_buffers()}
    return graph_module(held, graph)


def wide_type(argument: Any) -> Any:
    """float64 for float32; anything else as it is."""
    return torch.float64 if argument is torch.float32 else argument


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """In float64 if it is in float32; in the same memory order."""
    return tensor.to(wide_type(tensor.dtype))
