"""Matrix products: one batched product, one wide product where all members read one shared input."""

from __future__ import annotations

from typing import Any

import torch

from memberwise.rules.axis import expanded
from memberwise.rules.registry import LONE_CONTIGUOUS, register_rule

_aten = torch.ops.aten

LONE_CONTIGUOUS.update({_aten.mm.default, _aten.bmm.default, _aten.addmm.default})


def product(a: torch.Tensor, a_dim: Any, b: torch.Tensor, b_dim: Any) -> torch.Tensor:
    """`(M, n, p)` of `(M, n, k)` or `(n, k)` times `(M, k, p)` or `(k, p)`."""
    if a_dim is None:  # one shared left side: (n, k) @ (k, M * p) is one wide product
        if b.shape[0] * b.shape[2] == 0 or a.shape[0] == 0:
            return torch.matmul(a, b)
        wide = a @ b.permute(1, 0, 2).flatten(1)
        return wide.view(a.shape[0], b.shape[0], b.shape[2]).permute(1, 0, 2)
    if b_dim is None:  # one shared right side: the members' rows one above the other
        return torch.mm(a.flatten(0, 1), b).view(a.shape[0], a.shape[1], b.shape[1])
    return torch.bmm(a, b)


@register_rule(_aten.mm.default)
def mm(info: Any, in_dims: Any, a: torch.Tensor, b: torch.Tensor) -> Any:
    """torch's batching expands a shared side and reads it M times."""
    return product(a, in_dims[0], b, in_dims[1]), 0


@register_rule(_aten.bmm.default)
def bmm(info: Any, in_dims: Any, a: torch.Tensor, b: torch.Tensor) -> Any:
    """Members and batch fold into one batch."""
    size = info.batch_size
    a, b = expanded(a, in_dims[0], size), expanded(b, in_dims[1], size)
    out = torch.bmm(a.flatten(0, 1), b.flatten(0, 1))
    return out.view(size, a.shape[1], a.shape[2], b.shape[3]), 0


@register_rule(_aten.addmm.default)
def addmm(
    info: Any,
    in_dims: Any,
    bias: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    beta: Any = 1,
    alpha: Any = 1,
) -> Any:
    """torch's batching splits it into a product and an addition; baddbmm does both in one pass."""
    bias_dim, a_dim, b_dim = in_dims
    if a_dim == 0 and b_dim == 0:
        held = bias if bias_dim is None else bias.unsqueeze(1) if bias.ndim == 2 else bias
        return torch.baddbmm(held, a, b, beta=beta, alpha=alpha), 0
    out = product(a, a_dim, b, b_dim) if not (a_dim is None and b_dim is None) else torch.mm(a, b)
    held = bias if bias_dim is None else bias.unsqueeze(1) if bias.ndim == 2 else bias
    out = out if alpha == 1 else out * alpha
    return (out if beta == 0 else out + (held if beta == 1 else held * beta)), 0
