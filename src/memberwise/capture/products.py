"""Which products of a recording run by our own kernel: those in which it is faster, measured one by one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import fx

from memberwise._torch.folder import get, kept_at, put
from memberwise.capture.aliases import tensor_at
from memberwise.capture.record import shapes
from memberwise.kernels.product import available, product

GAIN = 0.95
"""What part of the time of torch's own a product must take."""

TIMES = 5

MOST = 1 << 23
"""Elements of a factor in a trial, which leaves members out above that: the time of one hardly depends on them."""

_aten = torch.ops.aten
_THEIRS = {_aten.bmm.default: torch.bmm, _aten.mm.default: torch.mm}


class Matrix(NamedTuple):
    """A factor, `(m, k)`, or one of each member."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def example(self, most: int) -> torch.Tensor:
        """One like it, of ones (a draw would advance the user's streams), of so many members at most."""
        count = tuple(min(one, most) for one in self.shape[:-2])
        return torch.empty_strided((*count, *self.shape[-2:]), self.stride).fill_(1)


def multiplied(module: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> fx.GraphModule:
    """A recording that computes the same, within rounding, with the faster of two kernels for each product."""
    products = [node for node in module.graph.nodes if node.target in _THEIRS]
    if not products or any(value.device.type != "cpu" for value in inputs):
        return module
    factors = _Factors(module.graph, inputs)
    ours = {node for node in products if _can_choose(node, factors) and _is_faster(node, factors)}
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        new[node] = graph.node_copy(node, new.__getitem__)
        if node in ours:
            new[node].target = product
    return fx.GraphModule(module, graph)


class _Factors:
    """What the products of a recording multiply."""

    def __init__(self, graph: fx.Graph, inputs: Sequence[torch.Tensor]) -> None:
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        self._shapes = shapes(graph, inputs)
        self._strides = {node: node.meta["kind"][1] for node in graph.nodes if "kind" in node.meta}
        self._strides |= {node: value.stride() for node, value in zip(placeholders, inputs, strict=True)}

    def of(self, node: fx.Node) -> tuple[Matrix, Matrix]:
        """Both, of one product."""
        first, second = node.args
        return self._matrix(tensor_at(first)), self._matrix(tensor_at(second))

    def _matrix(self, node: fx.Node) -> Matrix:
        shape = self._shapes[node]
        stride = self._strides.get(node) or torch.empty(shape, device="meta").stride()
        return Matrix(tuple(shape), tuple(stride))


def _can_choose(node: fx.Node, factors: _Factors) -> bool:
    """Whether both would do. A product with a side of one is none to Inductor, which fuses it with what is around."""
    if node.meta.get("dtype") is not torch.float32 or node.kwargs:
        return False
    return all(size > 1 for one in factors.of(node) for size in one.shape[-2:]) and available()


def _is_faster(node: fx.Node, factors: _Factors) -> bool:
    a, b = factors.of(node)
    path = kept_at(("product", a, b, torch.get_num_threads())).with_suffix(".json")
    faster = get(path, lambda known: bool(known["faster"]))
    if faster is None:
        most = max(1, min(MOST // math.prod(one.shape[-2:]) for one in (a, b)))
        theirs, ours = _seconds(_THEIRS[node.target], product, a.example(most), b.example(most))
        faster = ours < GAIN * theirs
        put(path, {"faster": faster, "seconds": [theirs, ours]})
    return faster


def _seconds(theirs: Callable[..., object], ours: Callable[..., object], *factors: torch.Tensor) -> list[float]:
    """The least time of each, taken in turns."""
    best = [float("inf")] * 2
    with torch.no_grad():
        for _ in range(TIMES):
            for k, run in enumerate((theirs, ours)):
                start = time.perf_counter()
                run(*factors)
                best[k] = min(best[k], time.perf_counter() - start)
    return best
