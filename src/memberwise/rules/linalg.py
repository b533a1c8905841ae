"""Operations on matrices that torch runs for any leading dimensions at once, and has no batching rule for."""

from __future__ import annotations

from typing import Any

import torch

from memberwise.engine.signals import Decline
from memberwise.rules.axis import expanded
from memberwise.rules.registry import register_rule

_aten = torch.ops.aten

RANKS = {
    _aten.linalg_lu.default: (2,),
    _aten.linalg_ldl_solve.default: (2, 1, 2),
    _aten.ormqr.default: (2, 1, 2),
}
"""Operation -> how many dimensions of each tensor are those of one matrix, or one vector."""


def _leading(call: Any, ranks: tuple[int, ...]) -> Any:
    """The member axis before all leading dimensions."""

    def rule(info: Any, in_dims: Any, *args: Any, **kwargs: Any) -> Any:
        own = [expanded(value, dim, info.batch_size) for value, dim in zip(args, in_dims[: len(ranks)], strict=False)]
        if len({value.shape[: value.ndim - rank] for value, rank in zip(own, ranks, strict=True)}) > 1:
            return Decline(
                "leading dimensions that differ, for which torch reads memory beyond a tensor", by_member=True
            )
        return call(*own, *args[len(own) :], **kwargs), 0

    return rule


for _op, _ranks in RANKS.items():
    register_rule(_op, _leading(_op, _ranks))
