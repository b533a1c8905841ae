"""Operations on matrices that torch runs for any leading dimensions at once, and has no batching rule for, or a wrong
one: that of `solve` sets the members of a right-hand side against the first of a member's own leading dimensions."""

from __future__ import annotations

from typing import Any

import torch

from memberwise.engine.signals import Decline
from memberwise.rules.axis import aligned, expanded, lift, member_ndim
from memberwise.rules.registry import register_rule
from memberwise.trees import tree_map

_aten = torch.ops.aten

RANKS = {
    _aten.linalg_lu.default: (2,),
    _aten.linalg_ldl_solve.default: (2, 1, 2),
    _aten.ormqr.default: (2, 1, 2),
    _aten.lu_unpack.default: (2, 1),
}
"""Operation -> how many dimensions of each tensor are those of one matrix, or one vector."""


def _leading(call: Any, ranks: tuple[int, ...]) -> Any:
    """The member axis and all leading dimensions as one, as kernels go from a matrix to the next by the last stride."""

    def rule(info: Any, in_dims: Any, *args: Any, **kwargs: Any) -> Any:
        own = [expanded(value, dim, info.batch_size) for value, dim in zip(args, in_dims[: len(ranks)], strict=False)]
        leads = {value.shape[: value.ndim - rank] for value, rank in zip(own, ranks, strict=True)}
        if len(leads) > 1:
            return Decline(
                "leading dimensions that differ, for which torch reads memory beyond a tensor", by_member=True
            )
        (lead,) = leads
        rows = [_in_a_row(value, lead, rank) for value, rank in zip(own, ranks, strict=True)]
        out = call(*rows, *args[len(own) :], **kwargs)
        return tree_map(lambda made: _as_before(made, lead), out), 0

    return rule


for _op, _ranks in RANKS.items():
    register_rule(_op, _leading(_op, _ranks))


def _in_a_row(value: torch.Tensor, lead: torch.Size, rank: int) -> torch.Tensor:
    own = value.shape[-rank:]
    return value.expand(*lead, *own).reshape(lead.numel(), *own)


def _as_before(made: torch.Tensor, lead: torch.Size) -> torch.Tensor:
    """A result with its leading dimensions; what was not asked for (`unpack_data=False`) has none."""
    return made.new_empty(lead[0], 0) if made.shape == (0,) else made.reshape(*lead, *made.shape[1:])


def _is_vector(a: Any, b: Any) -> bool:
    """Whether a right-hand side of these shapes is a vector, or a batch of such, as `torch.linalg.solve` tells."""
    return len(b) == 1 or (len(a) - 1 == len(b) and a[:-1] == b)


@register_rule(_aten._linalg_solve_ex.default)
def linalg_solve_ex(info: Any, in_dims: Any, a: torch.Tensor, b: torch.Tensor, **options: Any) -> Any:
    """Matrices and right-hand sides brought to as many leading dimensions."""
    size, lead = info.batch_size, a.shape[:-2]
    own_a, own_b = (value.shape[dim is not None :] for value, dim in zip((a, b), in_dims, strict=True))
    if _is_vector(own_a, own_b):
        a = expanded(a, in_dims[0], size)
        b = lift(expanded(b, in_dims[1], size), len(own_a) - 1).expand(size, *own_a[:-1])
        out, *factors = _aten._linalg_solve_ex.default(a, b, **options)
        return (out.contiguous() if len(own_a) == 2 else out, *factors), 0
    # with a dimension for the members in any case, or the right-hand sides might be taken for vectors
    wide_a, wide_b = aligned((a, b if in_dims[1] == 0 else b[None]), (in_dims[0], 0))
    out, *factors = _aten._linalg_solve_ex.default(wide_a, wide_b, **options)
    factors = [factor.reshape([*lead, *factor.shape[wide_a.ndim - 2 :]]) for factor in factors]
    return (out, *factors), (0, *[in_dims[0]] * 3)


@register_rule(_aten.linalg_lu_solve.default)
def linalg_lu_solve(
    info: Any, in_dims: Any, factors: torch.Tensor, pivots: torch.Tensor, b: torch.Tensor, **options: Any
) -> Any:
    """As `linalg_solve_ex`; in full, as torch's kernel takes wrong factors where it has to repeat some."""
    ndim = max(member_ndim(factors, in_dims[0]), member_ndim(b, in_dims[2]))
    values = zip((factors, pivots, b), (ndim, ndim - 1, ndim), in_dims, strict=True)
    factors, pivots, b = (lift(expanded(value, dim, info.batch_size), rank) for value, rank, dim in values)
    lead = torch.broadcast_shapes(factors.shape[:-2], b.shape[:-2])
    rows = [_in_a_row(value, lead, rank) for value, rank in ((factors, 2), (pivots, 1), (b, 2))]
    out = _aten.linalg_lu_solve.default(*rows, **options)
    return out.reshape(*lead, *out.shape[-2:]), 0
