"""W11: a graph convolutional network (Kipf and Welling, 2017) on one graph of ten thousand nodes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import folded, objectives
from benchmarks.case import Batch, Case

NODES, EDGES, FEATURES, HIDDEN, CLASSES = 10_000, 50_000, 64, 64, 16


class Convolution(nn.Module):
    """Each node's features, linearly, summed over its neighbours by the weights of the edges."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(ins, outs, bias=False)
        self.bias = nn.Parameter(torch.zeros(outs))

    def forward(self, x: Tensor, source: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        h = self.linear(x)
        messages = h.index_select(0, source) * weight[:, None]
        return torch.zeros_like(h).index_add(0, target, messages) + self.bias


class GCN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Convolution(FEATURES, HIDDEN), Convolution(HIDDEN, CLASSES)

    def forward(self, x: Tensor, source: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x, source, target, weight)), source, target, weight)


def graph(generator: torch.Generator) -> Batch:
    """A random graph with loops and symmetric normalisation, features and labels of its nodes."""
    loops = torch.arange(NODES)
    source = torch.cat([torch.randint(NODES, (EDGES,), generator=generator), loops])
    target = torch.cat([torch.randint(NODES, (EDGES,), generator=generator), loops])
    degree = torch.bincount(target, minlength=NODES).float()
    weight = (degree[source] * degree[target]).rsqrt()
    features = torch.randn(NODES, FEATURES, generator=generator)
    return features, source, target, weight, torch.randint(CLASSES, (NODES,), generator=generator)


CASES = (
    Case(
        "W11",
        "GCN 64-64-16, 10k nodes, 60k edges",
        GCN,
        graph,
        objectives.cross_entropy,
        members=(10,),
        workload="W11",
        objective="cross_entropy",
        folded=folded.gcn,
        in_jax="gcn",
    ),
)
