"""Embedding tables: one look-up a table for all members, then the perceptron."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.folded.gpt import embedded
from benchmarks.folded.layers import Mode, Tensors
from benchmarks.folded.perceptron import layers


def clicks(params: Tensors, buffers: Tensors, rows: Tensor, mode: Mode) -> tuple[Tensor, Tensors]:
    """Of rows (B, tables): (M, B, 1)."""
    found = [embedded(params[f"tables.{number}.weight"], rows[:, number]) for number in range(rows.shape[1])]
    return layers(params, "mlp.", torch.cat(found, dim=2)), {}
