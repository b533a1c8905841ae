"""The flattening that `torch.vmap` applies to its arguments, so that `in_dims` mean the same here.

`torch.utils._pytree` is torch's own registry of structures; the public `torch.utils.pytree` does not have the
broadcast of a prefix (`in_dims=(0, None)`) onto a structure.
"""

from __future__ import annotations

from torch.utils._pytree import (
    TreeSpec,
    _broadcast_to_and_flatten,
    tree_flatten,
    tree_unflatten,
)

__all__ = ["TreeSpec", "broadcast_to_and_flatten", "tree_flatten", "tree_unflatten"]

broadcast_to_and_flatten = _broadcast_to_and_flatten
