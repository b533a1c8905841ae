"""Matrix products: one batched product, by the faster of its two orientations."""

from __future__ import annotations

from typing import Any

import torch

from memberwise._torch.dispatch import functorch_active
from memberwise._torch.tracing import tracing
from memberwise.engine.signals import Decline
from memberwise.rules.axis import expanded, lift
from memberwise.rules.registry import LONE_CONTIGUOUS, register_rule

_aten = torch.ops.aten

LONE_CONTIGUOUS.update({_aten.mm.default, _aten.bmm.default, _aten.addmm.default})


def is_narrow(rows: int, columns: int, like: torch.Tensor) -> bool:
    """Whether a product of `rows` x `columns` is faster turned around, as the transpose of `(b.T @ a.T)`.

    On the CPU, MKL's kernels lose on results of few columns. One thread, AVX512, float32, us for 4 products, straight
    and turned: 256 x 10 (inner size 256) 409, 87; 256 x 23 355, 167; 256 x 33 292, 210; 64 x 10 (64) 25, 7; 64 x 23
    22, 13; and where it does not pay: 64 x 33 19, 15 (with a copy 22); 256 x 16 141, 110; 32 x 12 8, 10.

    Measured too, and not found: a size at which one product a member beats the batched one, where each core has as
    many members (`left_over`). From 32 x 32 to 1024 x 1024, M even, from 2 to 256, one thread and two, `bmm` took 0.3
    to 1.05 times as long as that many `mm`; a shared side, expanded, is as fast as one wide product of it, whose result
    the next operation would have to copy.
    """
    if columns < 2 or columns % 16 == 0 or rows < columns * (3 if columns < 16 else 8):
        return False
    return _is_librarys(like)


def _is_librarys(like: torch.Tensor) -> bool:
    return like.device.type == "cpu" and like.dtype in (torch.float32, torch.float64)


SHARED = 1_000_000
"""Products of a member, for each core, from which on all cores work on one member faster than one core does."""


def left_over(a: torch.Tensor, b: torch.Tensor, *added: torch.Tensor) -> int:
    """How many of the last members run one by one, each on all cores; the others in one batched product.

    MKL gives whole members to cores, so with M = 5 on two cores one of them idles for a sixth of the time: 5 x (1024,
    256) @ (256, 1024) 15.2 ms, 13.0 one by one; M = 3 10.3, 7.9. A recording keeps one product: chunks serve there.
    """
    cores = torch.get_num_threads()
    rest = a.shape[0] % cores
    if not rest or a.shape[1] * a.shape[2] * b.shape[2] < cores * SHARED or a.shape[2] != b.shape[1]:
        return 0
    if not _is_librarys(a) or tracing() or functorch_active():
        return 0
    given = a, b, *added
    followed = torch.is_grad_enabled() and any(each.requires_grad for each in given)  # in a backward of a backward
    return 0 if followed or any(type(each) is not torch.Tensor for each in given) else rest


def _apart(rest: int, many: Any, one: Any, *operands: torch.Tensor, **scales: float) -> torch.Tensor:
    """`many` of the first members, `one` of each of the last `rest`; the last two operands are the factors."""
    *_, a, b = operands
    members, out = a.shape[0], a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    full = members - rest
    many(*[each[:full] for each in operands], **scales, out=out[:full])
    for k in range(full, members):
        one(*[each[k] for each in operands], **scales, out=out[k])
    return out


def batched(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`(M, n, p)` of `(M, n, k)` times `(M, k, p)`; it may lie transposed in memory."""
    if a.shape[2] == 1:
        return a * b
    if is_narrow(a.shape[1], b.shape[2], a):
        return torch.bmm(b.transpose(1, 2), a.transpose(1, 2)).transpose(1, 2)
    rest = left_over(a, b)
    if not rest:
        return torch.bmm(a, b)
    return _apart(rest, torch.bmm, torch.mm, a, b)


def batched_plus(
    bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    """As `batched`, plus a bias that broadcasts against `(M, n, p)`."""
    if is_narrow(a.shape[1], b.shape[2], a):
        bias = bias if bias.ndim == 0 else bias.unsqueeze(-1) if bias.ndim == 1 else bias.transpose(-1, -2)
        out = torch.baddbmm(bias, b.transpose(1, 2), a.transpose(1, 2), beta=beta, alpha=alpha)
        return out.transpose(1, 2)
    rest = left_over(a, b, bias)
    if not rest:
        return torch.baddbmm(bias, a, b, beta=beta, alpha=alpha)
    held = bias.expand(a.shape[0], a.shape[1], b.shape[2])
    return _apart(rest, torch.baddbmm, torch.addmm, held, a, b, beta=beta, alpha=alpha)


def _sparse(*factors: torch.Tensor) -> Decline | None:
    """A shared sparse factor meets each member's dense one by itself."""
    return None if all(factor.layout is torch.strided for factor in factors) else Decline("a factor is sparse")


def product(a: torch.Tensor, a_dim: Any, b: torch.Tensor, b_dim: Any) -> torch.Tensor:
    """`(M, n, p)` of `(M, n, k)` or `(n, k)` times `(M, k, p)` or `(k, p)`, of which one is stacked."""
    if b_dim is None and (_is_turned(b) or not _is_turned(a)):  # the members' rows one above the other
        return torch.mm(a.flatten(0, 1), b).view(a.shape[0], a.shape[1], b.shape[1])
    size = (a if b_dim is None else b).shape[0]
    return batched(expanded(a, a_dim, size), expanded(b, b_dim, size))


def _is_turned(factor: torch.Tensor) -> bool:
    """Whether its columns lie in one piece, as of a transposed gradient. Rows of such are put together by a copy, which
    takes as long as it saves, and of half precision on a processor without it the product then nine times as long (M =
    10, (128, 64) by (64, 784): bfloat16 55 ms, members by themselves 6.1; float32 1.7, 1.3)."""
    return factor.shape[-2] > 1 and factor.stride(-2) == 1


@register_rule(_aten.mm.default)
def mm(info: Any, in_dims: Any, a: torch.Tensor, b: torch.Tensor) -> Any:
    """torch's batching does the same, at 13 us more, and never turns a narrow product around."""
    return _sparse(a, b) or (product(a, in_dims[0], b, in_dims[1]), 0)


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
    if _sparse(bias, a, b) is not None:
        return _sparse(bias, a, b)
    bias_dim, a_dim, b_dim = in_dims
    size = info.batch_size
    held = lift(bias, 2) if bias_dim == 0 else bias
    return batched_plus(held, expanded(a, a_dim, size), expanded(b, b_dim, size), beta, alpha), 0


@register_rule(_aten._trilinear.default)
def trilinear(info: Any, in_dims: Any, a: Any, b: Any, c: Any, *where: Any) -> Any:
    """The product of three tensors and its sum, of which a bilinear layer and its gradients are made; torch has no
    batching rule for it. Members are one more dimension that all three have."""
    full = (expanded(value, dim, info.batch_size) for value, dim in zip((a, b, c), in_dims, strict=False))
    *lists, unroll = where if len(where) == 5 else (*where, 1)
    return _aten._trilinear.default(*full, *([k + 1 for k in own] for own in lists), unroll + 1), 0
