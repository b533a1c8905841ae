"""Graph networks: PyTorch Geometric's layers, each member on a graph of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch_geometric.nn as gnn
from egnn_pytorch import EGNN_Network
from torch import nn
from torch.nn import functional as F

from survey.third_party.case import Case, Inputs, call_in_order, tokens

NODES, EDGES, WIDTH = 9, 20, 6


class Net(nn.Module):
    """Two layers of a kind, and a readout a graph."""

    def __init__(self, layer: Callable[[int, int], nn.Module], norm: nn.Module | None = None, pool: Any = None) -> None:
        super().__init__()
        self.one, self.two = layer(WIDTH, 8), layer(8, 8)
        self.norm = norm
        self.pool = pool or gnn.global_mean_pool
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor, batch: torch.Tensor, **more: Any) -> torch.Tensor:
        x = F.elu(self.one(x, edge_index, **more))
        x = x if self.norm is None else self.norm(x)
        x = F.dropout(self.two(x, edge_index, **more), 0.2, self.training)
        return self.head(self.pool(x, batch, size=2))


def graph(generator: torch.Generator) -> Inputs:
    """Two graphs' nodes, and edges among them: another graph for each member."""
    batch = (torch.arange(NODES) > 4).long()
    edges = tokens(generator, 2, EDGES, below=NODES)
    return {
        "x": torch.randn(NODES, WIDTH, generator=generator, dtype=torch.float64),
        "edge_index": edges[:, edges[1].argsort(stable=True)],
        "batch": batch,
    }


def weighted(generator: torch.Generator) -> Inputs:
    return {**graph(generator), "edge_attr": torch.rand(EDGES, 4, generator=generator, dtype=torch.float64)}


def keyword(model: nn.Module, **inputs: torch.Tensor) -> Any:
    return model(**inputs)


def mlp(a: int, b: int) -> nn.Module:
    return nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU(), nn.Linear(b, b))


def case(name: str, layer: Callable[[int, int], nn.Module], inputs: Any = graph, **options: Any) -> Case:
    return Case(name, "torch-geometric", lambda: Net(layer, **options), inputs, keyword)


def points(generator: torch.Generator) -> Inputs:
    return {
        "feats": tokens(generator, 1, 8, below=5),
        "coors": torch.randn(1, 8, 3, generator=generator, dtype=torch.float64),
    }


CASES = [
    case("GCN", gnn.GCNConv),
    case("GAT", lambda a, b: gnn.GATConv(a, b // 2, heads=2, dropout=0.2)),
    case("GATv2 with edge features", lambda a, b: gnn.GATv2Conv(a, b // 2, heads=2, edge_dim=4), weighted),
    case("GIN with batch norm", lambda a, b: gnn.GINConv(mlp(a, b), train_eps=True)),
    case("GraphSAGE, max", lambda a, b: gnn.SAGEConv(a, b, aggr="max")),
    case("GraphSAGE, LSTM", lambda a, b: gnn.SAGEConv(a, b, aggr="lstm")),
    case("graph transformer", lambda a, b: gnn.TransformerConv(a, b // 2, heads=2, edge_dim=4, dropout=0.1), weighted),
    case(
        "PNA",
        lambda a, b: gnn.PNAConv(
            a, b, ["mean", "max", "std"], ["identity", "amplification"], torch.tensor([1, 3, 5, 2])
        ),
        graph,
    ),
    case("Chebyshev", lambda a, b: gnn.ChebConv(a, b, K=3)),
    case("EdgeConv", lambda a, b: gnn.EdgeConv(mlp(2 * a, b))),
    case("GCN, sum pool", gnn.GCNConv, pool=gnn.global_add_pool),
    case("GraphConv, max pool", gnn.GraphConv, pool=gnn.global_max_pool),
    Case("EGNN", "egnn-pytorch", lambda: EGNN_Network(num_tokens=5, dim=8, depth=2), points, call_in_order),
]
