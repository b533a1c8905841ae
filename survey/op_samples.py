"""Sample inputs of an operation for M members: the same shapes and options, other values."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy
import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

MEMBERS = 3
MOST = 100
"""Of the operations that have more samples (a product of all options of pooling), so many, spread over all."""


@dataclass
class Sample:
    """One call of an operation, for M members.

    Attributes:
        columns: for each tensor among the arguments, its M values, which lie in memory alike.
        leaves: all leaves of the arguments; a tensor is the number of its column.
        spec: the structure of the arguments, `(input, args, kwargs)`.
        finish: what torch applies to results before it differentiates them (an eigenvector's sign is anybody's).
        broadcasts: whether the first argument grows by broadcasting, so that no in-place call is possible.
        firsts: how many tensors are in the first argument.
    """

    columns: list[list[torch.Tensor]]
    leaves: list[Any]
    spec: TreeSpec
    finish: Callable[[Any], Any]
    broadcasts: bool
    firsts: int

    def arguments(self, tensors: list[torch.Tensor]) -> Any:
        """`(input, args, kwargs)` with these tensors in their places."""
        return tree_unflatten([tensors[leaf.index] if type(leaf) is Place else leaf for leaf in self.leaves], self.spec)


@dataclass(frozen=True)
class Place:
    """Where a tensor stands among the leaves."""

    index: int


def samples(op: Any, dtype: torch.dtype, stop: int | None = None) -> Iterator[Sample]:
    """The sample inputs of an OpInfo, each for M members; the first `stop`, or all, or MOST of them."""
    runs = [_seeded(op, dtype, seed, stop) for seed in range(MEMBERS)]
    step = max(len(runs[0]) / MOST, 1)
    for k in range(min(len(runs[0]), MOST)):
        place = int(k * step)
        yield _together([run[place] if place < len(run) else runs[0][place] for run in runs])


def _seeded(op: Any, dtype: torch.dtype, seed: int, stop: int | None) -> list[Any]:
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)
    return [*islice(op.sample_inputs_func(op, "cpu", dtype, op.supports_autograd), stop)]


def _together(own: list[Any]) -> Sample:
    flat = [tree_flatten((one.input, one.args, one.kwargs)) for one in own]
    first, spec = flat[0]
    alike = [leaves if _alike(leaves, first) else _reordered(first, i) for i, (leaves, _) in enumerate(flat)]
    columns: list[list[torch.Tensor]] = []
    leaves = []
    for row in zip(*alike, strict=True):
        if isinstance(row[0], torch.Tensor):
            leaves.append(Place(len(columns)))
            columns.append([*row])
        else:
            leaves.append(row[0])
    firsts = sum(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(own[0].input))
    return Sample(columns, leaves, spec, own[0].output_process_fn_grad, own[0].broadcasts_input, firsts)


def _alike(leaves: list[Any], first: list[Any]) -> bool:
    return len(leaves) == len(first) and all(map(_fit, leaves, first))


def _fit(one: Any, other: Any) -> bool:
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return type(one) is type(other) and (repr(one) == repr(other) or callable(one))
    if one.layout is not torch.strided and one.layout is other.layout:
        return one.shape == other.shape and one.dtype == other.dtype
    return (one.shape, one.dtype, one.layout) == (other.shape, other.dtype, other.layout)


def _reordered(leaves: list[Any], seed: int) -> list[Any]:
    """The same values in another order, where another seed gives other shapes."""
    stream = torch.Generator().manual_seed(seed)
    return [_shuffled(leaf, stream) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]


def _shuffled(tensor: torch.Tensor, stream: torch.Generator) -> torch.Tensor:
    if tensor.layout is not torch.strided:
        return tensor
    order = torch.randperm(tensor.numel(), generator=stream)
    return tensor.detach().reshape(-1)[order].reshape(tensor.shape).requires_grad_(tensor.requires_grad)
