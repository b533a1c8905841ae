"""The few moves of a member axis. Behind the boundary it is at 0, always."""

from __future__ import annotations

from typing import Any

import torch


def lift(value: torch.Tensor, ndim: int) -> torch.Tensor:
    """A stacked value `(M, *s)` with its member part brought to `ndim` dimensions: `(M, 1, ..., *s)`."""
    missing = ndim + 1 - value.ndim
    if missing <= 0:
        return value
    return value.view(value.shape[0], *(1,) * missing, *value.shape[1:])


def member_ndim(value: Any, dim: int | None) -> int:
    """Dimensions of one member's tensor; 0 for what is no tensor."""
    if not isinstance(value, torch.Tensor):
        return 0
    return value.ndim if dim is None else value.ndim - 1


def aligned(values: Any, dims: Any) -> list[Any]:
    """Tensors ready to broadcast against each other as their member parts would."""
    ndim = max(map(member_ndim, values, dims))
    return [lift(value, ndim) if dim == 0 else value for value, dim in zip(values, dims, strict=True)]


def expanded(value: torch.Tensor, dim: int | None, size: int) -> torch.Tensor:
    """`(M, *s)`, expanded where the value is shared."""
    return value if dim == 0 else value.expand(size, *value.shape)


def shifted(dim: int, ndim: int) -> int:
    """A member's dimension as one of the stacked tensor's; `ndim` is the member's.

    >>> shifted(-1, 3), shifted(-1, 0)
    (3, 1)
    """
    count = ndim or 1  # a number has one dimension, which is none
    if not -count <= dim < count:
        expected = f"expected to be in range of [{-count}, {count - 1}], but got {dim}"
        raise IndexError(f"Dimension out of range ({expected})")
    return dim % ndim + 1 if ndim else 1


def shift_all(dims: Any, ndim: int) -> list[int]:
    """Several of a member's dimensions as the stacked tensor's."""
    return [shifted(dim, ndim) for dim in dims]
