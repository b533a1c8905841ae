"""The graph network: one gather and one scatter of all members' features."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.folded.layers import Mode, Tensors, linear


def gcn(
    params: Tensors, buffers: Tensors, x: Tensor, source: Tensor, target: Tensor, weight: Tensor, mode: Mode
) -> tuple[Tensor, Tensors]:
    """Of features (nodes, ins): (M, nodes, classes)."""

    def convolution(name: str, x: Tensor) -> Tensor:
        h = linear(params, f"{name}.linear", x)
        messages = h.index_select(1, source) * weight[:, None]
        return torch.zeros_like(h).index_add(1, target, messages) + params[f"{name}.bias"][:, None]

    return convolution("second", convolution("first", x).relu()), {}
