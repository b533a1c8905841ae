"""The LSTM: the inputs of all steps as one product, then a cell of all members a step."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.folded.layers import Mode, Tensors, linear


def lstm(params: Tensors, buffers: Tensors, x: Tensor, mode: Mode) -> tuple[Tensor, Tensors]:
    """Of (M, B, T, ins): (M, B, classes)."""
    members, batch, time, _ = x.shape
    weight = params["lstm.weight_hh_l0"].mT
    bias = params["lstm.bias_ih_l0"] + params["lstm.bias_hh_l0"]
    entering = torch.baddbmm(bias[:, None], x.flatten(1, 2), params["lstm.weight_ih_l0"].mT)
    entering = entering.view(members, batch, time, -1)
    hidden = cell = entering.new_zeros(members, batch, weight.shape[1])
    for step in range(time):
        i, f, g, o = torch.baddbmm(entering[:, :, step], hidden, weight).chunk(4, dim=2)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
    return linear(params, "head", hidden), {}
