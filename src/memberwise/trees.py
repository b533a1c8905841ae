"""Nested inputs and outputs: flattening, and `each()`, which marks a leaf that holds one entry a member."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Each(NamedTuple):
    """A value whose entries along `dim` belong to one member each."""

    value: torch.Tensor
    dim: int


def each(value: torch.Tensor, dim: int = 0) -> Each:
    """Mark a tensor as holding one entry a member: member i sees `value.select(dim, i)`.

    Shapes: `value` is `(M, *s)` for `dim=0`; a member sees `(*s)`.

    >>> import torch
    >>> each(torch.zeros(3, 5)).value.shape
    torch.Size([3, 5])
    """
    return Each(value, dim)


def is_each(value: Any) -> bool:
    """Whether `value` was made by `each()`; a leaf test for `torch.utils._pytree`."""
    return type(value) is Each
