"""The hooks on one tensor's gradient.

Missing public way: `register_hook` and `register_post_accumulate_grad_hook` add them, and nothing tells of them.
"""

from __future__ import annotations

import torch


def has_hooks(tensor: torch.Tensor) -> bool:
    """Whether anything is to be called with the tensor's gradient."""
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)  # type: ignore[attr-defined] # not in the stubs
