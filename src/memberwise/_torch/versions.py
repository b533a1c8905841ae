"""Counts of in-place writes, by which autograd knows that a tensor it has saved was changed.

Public torch reads a count (`tensor._version`) and raises it (`increment_version`). What is missing is to set it back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["set_versions", "version"]


def version(tensor: torch.Tensor) -> int:
    """How often the tensor's memory was written; tensors of inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version


def set_versions(tensors: Sequence[torch.Tensor], versions: Sequence[int]) -> None:
    """Set the counts, which all views of the tensors share."""
    counting = [(t, count) for t, count in zip(tensors, versions, strict=True) if not t.is_inference()]
    if counting:
        torch._C._autograd._unsafe_set_version_counter(*map(tuple, zip(*counting, strict=True)))
