"""A leaf on the memory of another tensor, and the gradient that autograd keeps in it.

Missing public way: `tensor.detach()` makes such a leaf of class `torch.Tensor` only; and a subclass that answers
`.grad` itself needs the slot below to take out what autograd has put there.
"""

from __future__ import annotations

from typing import TypeVar

import torch

T = TypeVar("T", bound=torch.Tensor)

_slot = torch.Tensor.grad


def leaf_on(kind: type[T], values: torch.Tensor, requires_grad: bool) -> T:
    """A leaf of class `kind` on the memory of `values`."""
    return torch.Tensor._make_subclass(kind, values, requires_grad)


def take_gradient(leaf: torch.Tensor) -> torch.Tensor | None:
    """Take out the gradient that autograd has accumulated in `leaf`."""
    gradient = _slot.__get__(leaf)  # type: ignore[attr-defined] # a getset descriptor of C
    if gradient is not None:
        _slot.__set__(leaf, None)  # type: ignore[attr-defined] # likewise
    return gradient
