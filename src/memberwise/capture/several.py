"""Several steps in one call: their data handed over at once, each chunk of members taken through all of them in turn.

What a chunk needs stays in the processor's caches from one step to the next; and guards, hyperparameters and the way in
and out cost once. It computes what as many calls would: each step's draws are taken beforehand, in order.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from memberwise.capture.step import CapturedStep
from memberwise.capture.within import Within
from memberwise.errors import ArgumentError, fail
from memberwise.trees import Each, tree_leaves, tree_map, tree_transpose_map


def several_steps(captured: CapturedStep | Within, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a step for each entry of the arguments' first dimension; what they return, stacked there."""
    return tree_transpose_map(_together, captured.several(steps_of(args, kwargs)))


def steps_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments of each step; raises ArgumentError unless all tensors have as many entries [MW506].

    >>> steps_of((torch.tensor([[1, 2], [3, 4]]), "mean"), {})
    [((tensor([1, 2]), 'mean'), {}), ((tensor([3, 4]), 'mean'), {})]
    """
    tensors = [_tensor(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Each | torch.Tensor)]
    lengths = {tensor.shape[0] if tensor.ndim else 0 for tensor in tensors}
    if len(lengths) != 1 or 0 in lengths:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors) or "no tensor"
        what = (
            f"a call for several steps: expected tensors with an entry a step in their first dimension, found {shapes}"
        )
        fail(ArgumentError, "MW506", what, do="Stack the data of the steps: torch.stack([x0, x1, ...])")
    return [tree_map(partial(_of_step, step), (args, kwargs)) for step in range(lengths.pop())]


def _tensor(leaf: Any) -> torch.Tensor:
    return leaf.value if isinstance(leaf, Each) else leaf


def _of_step(step: int, leaf: Any) -> Any:
    if isinstance(leaf, Each):
        return Each(leaf.value[step], leaf.dim)
    return leaf[step] if isinstance(leaf, torch.Tensor) else leaf


def _together(row: list[Any]) -> Any:
    """Tensors, stacked; of other values the last, as a loop leaves it."""
    return torch.stack(row) if isinstance(row[0], torch.Tensor) else row[-1]
