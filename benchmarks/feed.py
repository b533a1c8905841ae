"""Data indexing, a part of a training step: rows picked from what lies in memory, the same for every rival."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.case import Batch, Case, side_by_side


class Data(NamedTuple):
    """All rows there are, and the numbers of those that make each batch; without numbers the batches are `ready`."""

    rows: Batch
    picks: tuple[Tensor, ...]
    axis: int
    """Along which rows are picked: 0, or 1 behind a member axis."""
    ready: tuple[Batch, ...]


def of(case: Case, batches: list[Batch]) -> Data:
    """Data from which `batches` are picked, in this order, among others up to the case's number of rows."""
    axis = 0 if case.shared else 1
    if case.rows is None:
        return Data((), (), axis, tuple(batches))
    size = batches[0][0].shape[axis]
    device = batches[0][0].device
    order = torch.randperm(max(case.rows, size * len(batches)), generator=torch.Generator().manual_seed(0)).to(device)
    picks = order[: size * len(batches)].split(size)
    return Data(tuple(_spread(parts, order, axis) for parts in zip(*batches, strict=True)), picks, axis, ())


def _spread(parts: tuple[Tensor, ...], order: Tensor, axis: int) -> Tensor:
    """Rows among which row `order[i]` is the i-th of the batches' rows; the rest repeats them."""
    known = torch.cat(parts, axis)
    repeated = torch.arange(len(order), device=known.device) % known.shape[axis]
    out = torch.empty_like(known.index_select(axis, repeated))
    return out.index_copy_(axis, order, known.index_select(axis, repeated))


def in_torch(data: Data) -> Callable[[int], Batch]:
    """Batch number i, round and round; that it is copied out of the rows is what takes the time."""
    if data.ready:
        return lambda number: data.ready[number % len(data.ready)]
    rows, picks, axis = data.rows, data.picks, data.axis

    def batch(number: int) -> Batch:
        pick = picks[number % len(picks)]
        return tuple(part.index_select(axis, pick) for part in rows)

    return batch


def together(batch: Callable[[int], Batch], steps: int) -> Callable[[int], Batch]:
    """Call number i gets the batches of `steps` steps, stacked."""
    return lambda number: side_by_side([batch(number * steps + step) for step in range(steps)])
