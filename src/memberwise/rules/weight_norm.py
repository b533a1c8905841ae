"""A weight as directions times lengths: members' rows one above the other, or their columns side by side.

torch has no batching for it: on the CPU each member ran alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from memberwise.rules.axis import expanded
from memberwise.rules.folding import into_batch, out_of_batch
from memberwise.rules.registry import LONE_CONTIGUOUS, register_rule

_aten = torch.ops.aten


def _weight_norm(call: Callable[..., Any], tensors: int) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Any, *args: Any) -> Any:
        size, dim = info.batch_size, args[tensors] if len(args) > tensors else 0
        fold, unfold = (into_batch, out_of_batch) if dim == 0 else (_into_columns, _out_of_columns)
        values = (fold(expanded(value, at, size)) for value, at in zip(args[:tensors], in_dims, strict=False))
        return tuple(unfold(out, size) for out in call(*values, dim)), 0

    return rule


def _into_columns(value: torch.Tensor) -> torch.Tensor:
    """`(M, *s, C)` as `(*s, M * C)`."""
    return value.movedim(0, -2).flatten(-2)


def _out_of_columns(value: torch.Tensor, size: int) -> torch.Tensor:
    """`(*s, M * C)` as `(M, *s, C)`."""
    return value.unflatten(-1, (size, value.shape[-1] // size)).movedim(-2, 0)


for _op, _tensors in ((_aten._weight_norm_interface.default, 2), (_aten._weight_norm_interface_backward.default, 4)):
    register_rule(_op, _weight_norm(_op, _tensors))
    LONE_CONTIGUOUS.add(_op)
