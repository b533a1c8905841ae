"""What an `nn.Module` keeps in private attributes only.

Missing in public torch: whether a buffer is persistent (`state_dict()` tells, unless a hook or an override of the
module renames its keys), and which forward hooks a module has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


def is_persistent(module: nn.Module, buffer: str) -> bool:
    """Whether the module's own buffer of that name belongs to its state dict."""
    return buffer not in module._non_persistent_buffers_set


def forward_hooks(module: nn.Module) -> Iterator[Callable[..., Any]]:
    """The hooks that run with the module's forward, those before it first."""
    yield from module._forward_pre_hooks.values()
    yield from module._forward_hooks.values()
